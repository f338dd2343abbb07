"""A Llama-shaped model for `llama_generation.py`, and three ways to keep its keys and values and attend over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgen

# Takes the layer's number and q, k and v of new tokens, [sequences, seqlen, heads, head_dim]; returns out likewise.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ROTARY_BASE = 500_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How big the model is; heads are those of this GPU."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int


SIZES = {
    "tiny": Size(layers=2, width=64, heads=4, kv_heads=2, head_dim=32, hidden=128, vocabulary=256),
    "1b": Size(layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, hidden=8192, vocabulary=128256),
    "8b-shard": Size(layers=32, width=4096, heads=8, kv_heads=2, head_dim=128, hidden=3584, vocabulary=32064),
    "8b": Size(layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14336, vocabulary=128256),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs share: `prompt` is the longest prompt, `tokens` what each sequence gets on top of its own."""

    batch: int
    prompt: int
    tokens: int
    chunk: int
    page_size: int
    seed: int
    device: str


class Cache:
    """Keys and values of every layer, and how many rows each sequence has, for one way to compute attention."""

    def __init__(self, size: Size, settings: Settings, dtype: torch.dtype) -> None:
        self.size, self.dtype, self.device = size, dtype, torch.device(settings.device)
        # Up to whole pages, for all caches alike.
        self.capacity = math.ceil((settings.prompt + settings.tokens) / settings.page_size) * settings.page_size
        self.lengths = torch.zeros(settings.batch, dtype=torch.int32, device=self.device)
        powers = torch.arange(0, size.head_dim, 2, device=self.device) / size.head_dim
        angles = torch.arange(self.capacity, device=self.device)[:, None] / ROTARY_BASE**powers
        self.cos, self.sin = angles.cos(), angles.sin()

    def reserve(self, sequence: int, rows: int) -> None:
        """Make sure that a sequence has room for so many rows."""

    def clear(self) -> None:
        """Forget what all sequences hold."""
        self.lengths.zero_()

    def begin(self, sequences: slice, seqlen: int) -> Attend:
        """Return what appends `seqlen` tokens to each of the sequences and attends, in one layer after the other."""
        raise NotImplementedError


class PagedCache(Cache):
    """Pages [layers, pages, page_size, kv_heads, head_dim] that sequences take as they grow; attention by flashgen."""

    def __init__(self, size: Size, settings: Settings, dtype: torch.dtype) -> None:
        super().__init__(size, settings, dtype)
        self.page_size = settings.page_size
        columns = self.capacity // self.page_size
        count = settings.batch * columns
        pages = (size.layers, count, self.page_size, size.kv_heads, size.head_dim)
        self.k, self.v = (torch.zeros(pages, dtype=dtype, device=self.device) for _ in range(2))
        # In no order, as after hours of serving.
        self.free = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
        self.held: list[list[int]] = [[] for _ in range(settings.batch)]
        self.page_table = torch.zeros(settings.batch, columns, dtype=torch.int32, device=self.device)

    def reserve(self, sequence: int, rows: int) -> None:
        held = self.held[sequence]
        while len(held) * self.page_size < rows:
            page = self.free.pop()
            self.page_table[sequence, len(held)] = page
            held.append(page)

    def clear(self) -> None:
        super().clear()
        for held in self.held:
            self.free.extend(held)
            held.clear()

    def begin(self, sequences: slice, seqlen: int) -> Attend:
        lengths, page_table = self.lengths[sequences], self.page_table[sequences]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = flashgen.attention_with_kvcache(
                q,
                self.k[layer],
                self.v[layer],
                k=k,
                v=v,
                cache_seqlens=lengths,
                page_table=page_table,
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                rotary_interleaved=False,
                causal=True,
                layout="bshd",
            )
            return out

        return attend


class DenseCache(Cache):
    """Rows [layers, batch, kv_heads, capacity, head_dim] for the longest that any sequence may get."""

    def __init__(self, size: Size, settings: Settings, dtype: torch.dtype) -> None:
        super().__init__(size, settings, dtype)
        rows = (size.layers, settings.batch, size.kv_heads, self.capacity, size.head_dim)
        self.k, self.v = (torch.zeros(rows, dtype=dtype, device=self.device) for _ in range(2))
        self.entries = torch.arange(settings.batch, device=self.device)[:, None]
        self.keys = torch.arange(self.capacity, device=self.device)

    def begin(self, sequences: slice, seqlen: int) -> Attend:
        entries = self.entries[sequences]
        positions = self.lengths[sequences, None] + self.keys[:seqlen]
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        seen = (self.keys <= positions[..., None])[:, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            self.k[layer][entries, :, positions] = k
            self.v[layer][entries, :, positions] = v
            out = self.attention(q.transpose(1, 2), self.k[layer, sequences], self.v[layer, sequences], seen)
            return out.transpose(1, 2)

        return attend

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return attention of q [sequences, heads, seqlen, head_dim]; `seen` is bool [sequences, 1, seqlen, keys]."""
        raise NotImplementedError


class EagerCache(DenseCache):
    """Attention written out: all scores in memory."""

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        grouped = q.unflatten(1, (k.shape[1], -1))
        scores = grouped @ k[:, :, None].transpose(-2, -1) / math.sqrt(q.shape[-1])
        shares = scores.masked_fill(~seen[:, :, None], -math.inf).softmax(dim=-1)
        out: torch.Tensor = shares @ v[:, :, None]
        return out.flatten(1, 2)


class SdpaCache(DenseCache):
    """Attention by PyTorch's fused kernels, the first of them that takes grouped heads and a mask."""

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        fastest_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(fastest_first, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


CACHES: dict[str, type[Cache]] = {"flashgen": PagedCache, "sdpa": SdpaCache}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [..., head_dim] with column i and column i + head_dim / 2 turned by an angle, computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        heads = (size.heads + 2 * size.kv_heads) * size.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(size.width, eps=1e-5), nn.RMSNorm(size.width, eps=1e-5)
        self.qkv = nn.Linear(size.width, heads, bias=False)
        self.project = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: torch.Tensor, layer: int, attend: Attend) -> torch.Tensor:
        """Return the layer's output, [sequences, seqlen, width] like x."""
        size = self.size
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, size.head_dim))
        q, k, v = heads.split((size.heads, size.kv_heads, size.kv_heads), dim=-2)
        x = x + self.project(attend(layer, q, k, v).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        return x


class Llama(nn.Module):
    """The layers between an embedding and an output layer of their own."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Scores that differ between keys, so that the next token hangs on where attention looks.
                sharpness = 2.0 if name.endswith("qkv.weight") else 1.0
                nn.init.normal_(parameter, std=sharpness / math.sqrt(parameter.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the weights."""
        return self.head.weight.dtype

    def forward(self, ids: torch.Tensor, cache: Cache, sequences: slice) -> torch.Tensor:
        """Append `ids` int64 [sequences, seqlen] and return the logits after the last of them, [sequences, vocabulary].

        Lengths grow on the device, where the next step finds them.
        """
        attend = cache.begin(sequences, ids.shape[1])
        x = self.tokens(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        cache.lengths[sequences] += ids.shape[1]
        logits: torch.Tensor = self.head(self.norm(x[:, -1]))
        return logits
