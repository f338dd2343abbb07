"""Outputs of rows that see no key, where no kernel writes them."""

from __future__ import annotations

import torch

from flashgen.launch import fill_unseen
from flashgen.ops.call import Tensors


def unseen_outputs(
    out: torch.Tensor, lse: torch.Tensor | None, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the outputs of a call in which no row sees a key: out 0, lse -inf or, where it is used, the sink.

    Args:
        out: of any layout.
        lse: [batch, nheads_q, seqlen_q], or packed [nheads_q, tokens].
        tensors: of the call.
    """
    fill_unseen(out, lse)
    if lse is None or tensors.sinks is None:
        return out, lse
    used = used_rows(lse.shape[-1], tensors)
    if used is not None and used.dim() == 2:
        used = used[:, None]
    sinks = tensors.sinks[:, None]
    lse.copy_(sinks.expand_as(lse) if used is None else torch.where(used, sinks, lse))
    return out, lse


def used_rows(rows: int, tensors: Tensors) -> torch.Tensor | None:
    """Return which query rows a sequence owns and uses: [rows], [batch, rows] of dense tensors, None for all."""
    starts, used = tensors.cu_seqlens_q, tensors.seqused_q
    if starts is None:
        return None if used is None else torch.arange(rows, device=used.device) < used[:, None]
    row = torch.arange(rows, device=starts.device, dtype=torch.int32)
    # Sequences of no token share their start with the next: the last of them owns the row.
    entry = torch.searchsorted(starts, row, right=True) - 1
    owned = (entry >= 0) & (entry < len(starts) - 1)
    if used is None or not len(used):
        return owned
    entry = entry.clamp(0, len(starts) - 2)
    return owned & (row - starts[entry] < used[entry])
