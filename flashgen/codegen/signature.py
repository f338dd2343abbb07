"""The arguments of a kernel: which ones a spec and the structure of a config ask for, in order."""

from __future__ import annotations

from flashgen.codegen.arguments import triton_type
from flashgen.codegen.head_tiles import HeadTile
from flashgen.codegen.mask_plan import MaskPlan, capture_names
from flashgen.codegen.mods import mod_arguments
from flashgen.spec import AttentionSpec

SCORE_PREFIX = "score_"


def capture_pointers(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the pointer arguments of the captured tensors, the mask's and then score_mod's, in order."""
    score = () if spec.score_mod is None else tuple(f"{SCORE_PREFIX}{c.name}" for c in spec.score_mod.captures)
    return tuple(f"{name}_ptr" for name in (*capture_names(spec.mask), *score))


def capture_types(spec: AttentionSpec) -> dict[str, str]:
    """Return the element types behind the pointers of `capture_pointers`."""
    captures = [capture for leaf in spec.mask.leaves for capture in leaf.captures]
    captures += spec.score_mod.captures if spec.score_mod else ()
    return {name: triton_type(capture.dtype) for name, capture in zip(capture_pointers(spec), captures, strict=True)}


def kernel_arguments(
    spec: AttentionSpec,
    mask: MaskPlan,
    descriptor: bool,
    qk_tiles: tuple[HeadTile, ...],
    v_tiles: tuple[HeadTile, ...],
) -> tuple[str, ...]:
    """Return the run-time arguments."""
    rows = {"q": "m", "k": "n", "v": "n", "out": "m"}
    tiles = {"q": qk_tiles, "k": qk_tiles, "v": v_tiles, "out": v_tiles}
    tensors: list[str] = []
    strides: list[str] = []
    for name, row in rows.items():
        if descriptor and not (name == "out" and spec.varlen):
            tensors += [f"{name}{tile.suffix}_desc" for tile in tiles[name]]
            continue
        tensors.append(f"{name}_ptr")
        axes = ("h", row) if spec.varlen else ("z", "h", row)
        strides += [f"stride_{name[0]}{axis}" for axis in axes]
    score = mod_arguments(spec.score_mod, SCORE_PREFIX) if spec.score_mod else ()
    return (
        *tensors,
        *(("lse_ptr",) if spec.lse else ()),
        *strides,
        "qk_scale",
        "num_heads_total",
        "nheads_q",
        "group",
        *(("max_seqlen_q",) if spec.varlen else ("SEQLEN_Q", "SEQLEN_K")),
        "head_group",
        *side_arguments(spec),
        *(("tile_start_ptr", "tile_full_ptr", "tile_index_ptr") if mask.table else ()),
        *score,
        *mask.arguments,
    )


def side_arguments(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the arguments of the features, in the order of `AttentionSpec`."""
    bias_steps = ("step_bz", "step_bh", "step_bm", *(() if spec.bias_aligned else ("step_bn",)))
    descales = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr")
    return (
        *(("softcap",) if spec.softcap else ()),
        *(("bias_ptr", *bias_steps) if spec.bias != "none" else ()),
        *(("alibi_ptr", "step_alibi_z") if spec.alibi else ()),
        *(("sinks_ptr",) if spec.sinks else ()),
        *(("rng_ptr", "dropout_threshold", "dropout_scale") if spec.dropout else ()),
        *(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr") if spec.varlen else ()),
        *(("step_lh",) if spec.varlen and spec.lse else ()),
        *(f"seqused_{side}_ptr" for side in spec.seqused),
        *(descales if spec.descale else ()),
    )


def constant_names(qk_tiles: tuple[HeadTile, ...], v_tiles: tuple[HeadTile, ...]) -> tuple[str, ...]:
    """Return the compile-time arguments."""
    blocks = [tile.block for tile in (*qk_tiles, *v_tiles)]
    return ("HEAD_DIM_QK", "HEAD_DIM_V", *blocks, "BLOCK_M", "BLOCK_N")
