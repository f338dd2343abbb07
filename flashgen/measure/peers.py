"""Other attention implementations, to measure beside, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flashgen.measure.flash_attention_peers import bind_fa3, bind_fa4
from flashgen.measure.flex_peer import bind_flex
from flashgen.measure.peer import Peer, gpu_peer
from flashgen.measure.sdpa_peers import bind_cudnn, bind_efficient, bind_flash

__all__ = ["CUDNN", "EFFICIENT", "FA3", "FA4", "FLASH", "FLEX", "PEERS", "Peer", "default_baselines"]

CUDNN = gpu_peer("cudnn", bind_cudnn)
FLASH = gpu_peer("flash", bind_flash)
EFFICIENT = gpu_peer("efficient", bind_efficient)
FLEX = gpu_peer("flex", bind_flex)
FA3 = gpu_peer("fa3", bind_fa3)
FA4 = gpu_peer("fa4", bind_fa4)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (CUDNN, FLASH, EFFICIENT, FLEX, FA3, FA4)}
"""Every peer by name."""


def default_baselines(device: torch.device | str) -> tuple[Peer, ...]:
    """Return what a kernel on `device` is measured beside unless told otherwise; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        return ()
    return (FLASH,) if torch.version.hip else (CUDNN, FLASH)
