"""Where dropout's random numbers come from: a seed and an offset in memory of the device."""

from __future__ import annotations

import torch

from flashgen.errors import InputError

_SEEDS = range(-(2**63), 2**64)


def dropout_state(device: torch.device, seed: int | torch.Tensor | None) -> torch.Tensor:
    """Return the seed and offset of one call, int64 [2] on the device, without waiting for it.

    Args:
        device: that of Q.
        seed: a whole number, whose offset is 0; a state itself, which is checked later; or None to draw from PyTorch's
            generator of the device, as `torch.manual_seed` sets it and CUDA graphs advance it.

    Raises:
        InputError: for anything else.
    """
    if isinstance(seed, torch.Tensor):
        return seed.contiguous()
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=device, dtype=torch.int64)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in _SEEDS:
        raise InputError(f"seed must be a whole number from -2**63 to 2**64 - 1 or an int64 tensor [2], got {seed!r}")
    # 64 bits, read as signed.
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[0].fill_((seed + 2**63) % 2**64 - 2**63)
    return state
