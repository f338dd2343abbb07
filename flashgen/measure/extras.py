"""Random numbers and tensors for everything that a spec asks of a call besides Q, K and V."""

from __future__ import annotations

import itertools
import typing

import torch
from torch import Tensor

from flashgen.measure.arithmetic import torch_dtype
from flashgen.spec import AttentionSpec, Extras, Problem
from flashgen.spec.masks import Document
from flashgen.spec.mods import Capture

# Low enough to bend scores of standard deviation 1, so that a kernel without it is caught.
_SOFTCAP = 3.0
_DROPOUT_P = 0.17
_BOOL_BIAS_SHARE = 0.8
_DOCUMENTS = 4
_CAPTURED_INTS = 8
# Beyond it a bias is one for all batch entries and heads: what would be 64 GiB otherwise fits beside Q, K and V.
_MAX_BIAS_ELEMENTS = 2**30
# Elements in 16 bytes of the narrowest bias.
_ALIGNED_ELEMENTS = 16


def random_extras(
    problem: Problem, *, device: torch.device | str, seed: int, softmax_scale: float | None = None
) -> Extras:
    """Return what a call of `problem` needs besides Q, K and V, each large enough that leaving it out shows.

    Args:
        problem: gives sizes and what is needed.
        device: where tensors are made.
        seed: the same seed gives the same numbers on the same kind of device. It also picks forms: whether a bias is
            one for all batch entries (seed % 3 == 0), one for all heads (1) or each its own, and whether alibi_slopes
            are [nheads_q] (even seeds) or [batch, nheads_q].
        softmax_scale: factor of the scores; None is the spec's default.
    """
    make = _Maker(problem, device, seed)
    spec = problem.spec
    lengths_q, lengths_k = [q for q, _ in problem.lengths()], [k for _, k in problem.lengths()]
    descales = [make.uniform(0.5, 2.0, problem.shape.batch, problem.shape.nheads_kv) for _ in range(3 * spec.descale)]
    q_descale, k_descale, v_descale = descales or (None, None, None)
    return Extras(
        softmax_scale=spec.default_scale if softmax_scale is None else softmax_scale,
        softcap=_SOFTCAP if spec.softcap else 0.0,
        dropout_p=_DROPOUT_P if spec.dropout else 0.0,
        bias=make.bias() if spec.bias != "none" else None,
        alibi_slopes=make.slopes() if spec.alibi else None,
        sinks=make.sinks() if spec.sinks else None,
        rng_state=make.integers(-(2**62), 2**62, 2) if spec.dropout else None,
        cu_seqlens_q=make.starts(lengths_q) if spec.varlen else None,
        cu_seqlens_k=make.starts(lengths_k) if spec.varlen else None,
        seqused_q=make.used(lengths_q) if "q" in spec.seqused else None,
        seqused_k=make.used(lengths_k) if "k" in spec.seqused else None,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        captures=make.captures(),
    )


class _Maker:
    """Random tensors of one problem from one generator."""

    def __init__(self, problem: Problem, device: torch.device | str, seed: int) -> None:
        self._spec: AttentionSpec = problem.spec
        self._shape = problem.shape
        self._device = torch.device(device)
        self._seed = seed
        self._generator = torch.Generator(device=device).manual_seed(seed + 1)

    def uniform(self, low: float, high: float, *sizes: int) -> Tensor:
        return torch.rand(sizes, generator=self._generator, device=self._device).mul_(high - low).add_(low)

    def integers(self, low: int, high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, sizes, generator=self._generator, device=self._device, dtype=dtype)

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self._generator, device=self._device, dtype=dtype)

    def bias(self) -> Tensor:
        """Return [batch, nheads_q, seqlen_q, seqlen_k], of stride 0 where it is broadcast."""
        shape = self._shape
        sizes = (shape.batch, shape.nheads_q, shape.seqlen_q, shape.seqlen_k)
        too_large = sizes[0] * sizes[1] * sizes[2] * sizes[3] > _MAX_BIAS_ELEMENTS
        batch = 1 if too_large or self._seed % 3 == 0 else shape.batch
        heads = 1 if too_large or self._seed % 3 == 1 else shape.nheads_q
        first, width = 0, -(-shape.seqlen_k // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
        if not self._spec.bias_aligned:
            # Rows of odd length, and the first one off.
            first, width = 1, (shape.seqlen_k + 1) | 1
        whole = self._bias_numbers(batch, heads, shape.seqlen_q, width)
        return whole[..., first : first + shape.seqlen_k].expand(sizes)

    def _bias_numbers(self, *sizes: int) -> Tensor:
        if self._spec.bias == "bool":
            return self.uniform(0.0, 1.0, *sizes) < _BOOL_BIAS_SHARE
        dtype = torch.float32 if self._spec.bias == "fp32" else torch_dtype(self._spec.dtype.out)
        return self.normal(*sizes, dtype=dtype)

    def slopes(self) -> Tensor:
        """Return ALiBi slopes [nheads_q] or [batch, nheads_q]."""
        sizes = (self._shape.nheads_q,) if self._seed % 2 == 0 else (self._shape.batch, self._shape.nheads_q)
        return self.uniform(0.01, 0.5, *sizes)

    def sinks(self) -> Tensor:
        """Return logits [nheads_q] that weigh as much as all keys together."""
        return self.normal(self._shape.nheads_q) + torch.tensor(self._shape.seqlen_k + 1.0).log().item()

    def starts(self, lengths: list[int]) -> Tensor:
        """Return int32 cu_seqlens [batch + 1]."""
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self._device)

    def used(self, lengths: list[int]) -> Tensor:
        """Return int32 seqused [batch], from half of each length to all of it."""
        shares = self.uniform(0.5, 1.0, len(lengths)).cpu()
        most = torch.tensor(lengths, dtype=torch.float32)
        return (most * shares).ceil().to(torch.int32).to(self._device)

    def captures(self) -> tuple[Tensor, ...]:
        """Return what the mask's functions and then score_mod capture."""
        tensors: list[Tensor] = []
        for leaf in self._spec.mask.leaves:
            if isinstance(leaf, Document):
                tensors += self._document_ids(leaf.batched)
            else:
                tensors += [self._captured(capture) for capture in leaf.captures]
        score_mod = self._spec.score_mod
        return (*tensors, *(self._captured(capture) for capture in (score_mod.captures if score_mod else ())))

    def _captured(self, capture: Capture) -> Tensor:
        shape = self._shape
        extents = {
            "b": shape.batch,
            "h": shape.nheads_q,
            "q_idx": shape.seqlen_q,
            "kv_idx": shape.seqlen_k,
            "any": max(shape.seqlen_q, shape.seqlen_k),
        }
        sizes = [extents[axis] for axis in capture.axes]
        dtype = typing.cast("torch.dtype", getattr(torch, capture.dtype))
        if dtype.is_floating_point:
            return self.normal(*sizes, dtype=dtype)
        if dtype == torch.bool:
            return self.integers(0, 2, *sizes).bool()
        return self.integers(0, _CAPTURED_INTS, *sizes, dtype=dtype)

    def _cuts(self, batched: bool) -> Tensor:
        """Return where documents end, as shares of the length: one after each even part, moved by up to half of one."""
        moved = self.uniform(-0.5, 0.5, *([self._shape.batch] if batched else []), _DOCUMENTS - 1)
        return (torch.arange(1, _DOCUMENTS, device=self._device) + moved) / _DOCUMENTS

    def _document_ids(self, batched: bool) -> tuple[Tensor, Tensor]:
        """Return sorted ids of queries and keys that are cut at the same shares of their lengths."""
        cuts = self._cuts(batched).unsqueeze(-1)
        ids = []
        for seqlen in (self._shape.seqlen_q, self._shape.seqlen_k):
            places = torch.arange(seqlen, device=self._device)
            ids.append((places >= cuts * seqlen).sum(dim=-2).to(torch.int32))
        return ids[0], ids[1]
