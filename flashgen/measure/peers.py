"""Other attention implementations, to measure beside, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from flashgen.measure.decode_peers import BindDecode, decode_peer, through_forward
from flashgen.measure.flash_attention_peers import bind_fa3, bind_fa3_decode, bind_fa4
from flashgen.measure.flex_peer import bind_flex
from flashgen.measure.peer import Bind, Peer, gpu_peer
from flashgen.measure.sdpa_peers import bind_cudnn, bind_efficient, bind_flash

__all__ = ["CUDNN", "EFFICIENT", "FA3", "FA4", "FLASH", "FLEX", "PEERS", "Peer", "default_baselines"]


def _peer(name: str, bind: Bind, bind_decode: BindDecode | None = None) -> Peer:
    decode = decode_peer(name, through_forward(bind) if bind_decode is None else bind_decode)
    return dataclasses.replace(gpu_peer(name, bind), make_decode=decode)


CUDNN = _peer("cudnn", bind_cudnn)
FLASH = _peer("flash", bind_flash)
EFFICIENT = _peer("efficient", bind_efficient)
FLEX = _peer("flex", bind_flex)
FA3 = _peer("fa3", bind_fa3, bind_fa3_decode)
FA4 = _peer("fa4", bind_fa4)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (CUDNN, FLASH, EFFICIENT, FLEX, FA3, FA4)}
"""Every peer by name."""


def default_baselines(device: torch.device | str) -> tuple[Peer, ...]:
    """Return what a kernel on `device` is measured beside unless told otherwise; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        return ()
    return (FLASH,) if torch.version.hip else (CUDNN, FLASH)
