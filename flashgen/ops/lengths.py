"""Whether packed sequences lie inside their tensors: their boundaries are data, looked at once for each tensor."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import torch

from flashgen.errors import InputError

_KEPT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuts:
    """What cu_seqlens say: where the first sequence starts and the last one ends, and how long the longest is."""

    first: int
    last: int
    longest: int


_Key = tuple[int, int, int, torch.device]
# The tensors are kept beside what they say, so that no other can take their address.
_known: collections.OrderedDict[_Key, tuple[Cuts, torch.Tensor]] = collections.OrderedDict()


def check_cuts(name: str, cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> bool:
    """Check that sequences lie within their tensor, and return whether they surely fill it.

    The first look at a GPU tensor waits for it; an in-place change makes the next look the first one again, but not in
    inference mode, which tells of none. Inside a CUDA graph capture only what is known already is checked.

    Args:
        name: of the tensor, `cu_seqlens_q` or `cu_seqlens_k`.
        cu_seqlens: int32 [batch + 1].
        tokens: rows of the packed tensor.
        max_seqlen: what the caller says of the longest sequence.

    Raises:
        InputError: if boundaries decrease or lie outside [0, tokens], or a sequence is longer than `max_seqlen`.
    """
    inference = cu_seqlens.is_inference()
    key = (cu_seqlens.data_ptr(), -1 if inference else cu_seqlens._version, len(cu_seqlens), cu_seqlens.device)
    found = _known.get(key)
    if found is not None and inference:
        return False
    if found is None:
        if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        found = _read(name, cu_seqlens), cu_seqlens
        if cu_seqlens.is_cuda:
            _known[key] = found
            if len(_known) > _KEPT:
                _known.popitem(last=False)
    cuts = found[0]
    if cuts.last > tokens:
        side = name[-1]
        raise InputError(f"{name} ends at {cuts.last}, but {side} has {tokens} tokens")
    if cuts.longest > max_seqlen:
        raise InputError(f"max_seqlen_{name[-1]} is {max_seqlen}, but {name} has a sequence of {cuts.longest}")
    return not inference and cuts.first == 0 and cuts.last == tokens


def _read(name: str, cu_seqlens: torch.Tensor) -> Cuts:
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] < 0:
        raise InputError(f"{name} must start at 0, got {starts[0]}")
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        if end < start:
            raise InputError(f"{name} must not decrease, got {start} and then {end} at [{index}] and [{index + 1}]")
    longest = max((end - start for start, end in itertools.pairwise(starts)), default=0)
    return Cuts(first=starts[0], last=starts[-1], longest=longest)
