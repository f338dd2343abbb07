"""Which probabilities dropout keeps: Philox4x32-10 in plain PyTorch integers, bit for bit what a kernel computes.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_KEYS_PER_COUNTER = 4


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four random words of each counter.

    Args:
        counter: four int64 tensors of 32-bit words that broadcast against each other.
        key: two int64 tensors of 32-bit words.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64 bits of the product: int64 wraps as uint64 does, and the mask takes off what the signed shift brings in.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((high >> 32) & _WORD) ^ c1 ^ k0, ((low >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = high & _WORD, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep(rng_state: Tensor, p: float, heads_linear: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Return which probabilities dropout keeps; a share of about 1 - p of them.

    The counter is (kv_idx // 4, q_idx, heads_linear, offset), the key the two halves of the seed; word kv_idx % 4 keeps
    its probability where it is at least p * 2**32.

    Args:
        rng_state: int64 [2], seed and offset; of the offset the low 32 bits count.
        p: share that is dropped, from 0 to 1.
        heads_linear: int64, batch entry * nheads_q + query head.
        q_idx: int64, query row within its sequence.
        kv_idx: int64, key within its sequence. The three broadcast against each other.

    Returns:
        bool, of the broadcast shape.
    """
    seed, offset = rng_state[0], rng_state[1]
    counter = (kv_idx // _KEYS_PER_COUNTER, q_idx & _WORD, heads_linear & _WORD, offset & _WORD)
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    lane = kv_idx % _KEYS_PER_COUNTER
    word = words[0]
    for index in range(1, _KEYS_PER_COUNTER):
        word = torch.where(lane == index, words[index], word)
    return word >= min(int(p * 2**32), _WORD)
