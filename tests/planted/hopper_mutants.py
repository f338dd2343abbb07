"""Bugs of the forward kernel for Hopper in Gluon. Those of its barriers may hang: they run where they can be killed.

Their reasons are not those of one check: what reads too early may give any number, or none.
"""

from __future__ import annotations

from mutants import Mutant

from flashgen.codegen import HopperForwardConfig

CONFIG = HopperForwardConfig(consumers=2, block_n=64, num_warps=4, num_stages=2)
_SIZES = "b=2 hq=4 hkv=2 s=1024 d=64 fp16"
_OFF = "out"
_LOST = "out|timeout|crashed|context is lost|launch failure|illegal"


def _edited(words: str, says: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(problem=f"{_SIZES} {words}", config=CONFIG, says=says, edits=edits)


HOPPER_MUTANTS = {
    "causal, without the diagonal": _edited("causal", _OFF, ("mask_mod", "kv_idx <= q_idx", "kv_idx < q_idx")),
    "output not rescaled": _edited("full", _OFF, ("attend", "acc = acc * row_of(alpha, acc)", "acc = acc")),
    "last tile of keys forgotten": _edited(
        "full", _OFF, ("key_tiles", "gl.maximum(gl.cdiv(end, BLOCK_N), 1)", "gl.maximum(end // BLOCK_N, 1)")
    ),
    "keys of another head": _edited(
        "full", _OFF, ("producer", "off_hkv = off_h // group", "off_hkv = off_h % (nheads_q // group)")
    ),
    "both consumers with the first one's rows": _edited(
        "causal", _OFF, ("consumer", "start_m += CONSUMER * ROWS", "start_m += 0 * CONSUMER * ROWS")
    ),
    "values of the step after": _edited("full", _LOST, ("attend", "v_smem.index(before)", "v_smem.index(stage)")),
    "counter of tiles not put back": _edited(
        "full", f"counters|{_LOST}", ("producer", "        gl.store(tile_counter_ptr, 0)\n", "")
    ),
    "lse in base 2": _edited("full", "lse", ("normalise", ") * 0.6931471805599453", ")")),
    "keys not waited for": _edited(
        "full", _LOST, ("attend", "    wait(k_full.index(stage), step // NUM_STAGES & 1)\n", "")
    ),
    "values of the wrong phase": _edited(
        "full",
        _LOST,
        ("attend", "wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)", "wait(v_full.index(before), step & 1)"),
    ),
    "more bytes expected than come": _edited(
        "full",
        _LOST,
        (
            "producer",
            "expect(k_full.index((step + 1) % NUM_STAGES), k_bytes)",
            "expect(k_full.index((step + 1) % NUM_STAGES), 2 * k_bytes)",
        ),
    ),
    "keys never given back": _edited("full", _LOST, ("attend", "    arrive(k_empty.index(stage))\n", "")),
    "keys of other rows not given back": _edited(
        "causal", _LOST, ("pass_over", "        arrive(k_empty.index(step % NUM_STAGES))\n", "")
    ),
}
