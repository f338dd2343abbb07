"""What each kernel of a backward module takes."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen.config import TritonBackwardConfig
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.head_tiles import next_power_of_two
from flashgen.codegen.signature import side_arguments
from flashgen.spec import AttentionSpec

if typing.TYPE_CHECKING:
    from flashgen.codegen.backward_plan import BackwardPlan

BLOCK_ROWS = 32
"""Rows of one program of the delta kernel: a few loads in flight for each of its threads."""

_WIDTHS = ("HEAD_DIM_QK", "HEAD_DIM_V", "BLOCK_DQK", "BLOCK_DV")
_QUERIES_KEYS = {"q": "m", "k": "n", "v": "n", "do": "m"}


def delta_entry(plan: BackwardPlan) -> EntryPlan:
    """Return the kernel of delta = rowsum(dO * O)."""
    tensors = ("out_ptr", "do_ptr", "lse_ptr", "lse2_ptr", "delta_ptr")
    strides = tuple(f"stride_{name}{axis}" for name in ("o", "do") for axis in "zhm")
    return EntryPlan(
        name="attn_bwd_delta",
        arguments=(*tensors, *strides, "nheads_q", "rows", "padded_rows"),
        constants=("HEAD_DIM_V", "BLOCK_DV", "BLOCK_ROWS"),
        pointer_types=plan.pointer_types,
    )


def dkdv_entry(plan: BackwardPlan) -> EntryPlan:
    """Return the kernel of dK and dV."""
    spec, table = plan.spec, ("row_start_ptr", "row_full_ptr", "row_index_ptr")
    tensors, strides = _tensors(plan, {**_QUERIES_KEYS, "dk": "n", "dv": "n"}, never=("dk", "dv"))
    if not plan.own_dq:
        dq, dq_strides = _tensors(plan, {"dq": "m"}, never=() if plan.dq_descriptor else ("dq",))
        tensors, strides = (*tensors, *dq), (*strides, *dq_strides)
    boxes = {"q_desc": ("BLOCK_M1", "BLOCK_DQK"), "do_desc": ("BLOCK_M1", "BLOCK_DV")}
    boxes |= {"k_desc": ("BLOCK_N1", "BLOCK_DQK"), "v_desc": ("BLOCK_N1", "BLOCK_DV")}
    boxes |= {"dq_desc": ("BLOCK_M1", "BLOCK_DQK")}
    types = dict(plan.pointer_types) | {"dq_ptr": "fp32"}
    lengths: tuple[str, ...] = ("max_seqlen_k",) if spec.varlen else ("SEQLEN_Q", "SEQLEN_K", "padded_rows")
    if spec.varlen and plan.ordered:
        lengths = ("max_seqlen_q", "max_seqlen_k")
    return EntryPlan(
        name="attn_bwd_dkdv",
        arguments=(
            *tensors,
            "lse2_ptr",
            "delta_ptr",
            *(("turn_ptr",) if plan.ordered else ()),
            *strides,
            "qk_scale",
            "softmax_scale",
            "num_heads_total",
            "nheads_q",
            "nheads_kv",
            "group",
            *lengths,
            "head_group",
            *_sides(plan, table),
        ),
        constants=(*_WIDTHS, "BLOCK_M1", "BLOCK_N1"),
        pointer_types=tuple(sorted(types.items())),
        boxes=tuple(boxes.items()),
    )


def dq_entry(plan: BackwardPlan) -> EntryPlan:
    """Return the kernel of dQ."""
    table = ("tile_start_ptr", "tile_full_ptr", "tile_index_ptr")
    tensors, strides = _tensors(plan, {**_QUERIES_KEYS, "dq": "m"}, never=("dq",))
    boxes = {"q_desc": ("BLOCK_M2", "BLOCK_DQK"), "do_desc": ("BLOCK_M2", "BLOCK_DV")}
    boxes |= {"k_desc": ("BLOCK_N2", "BLOCK_DQK"), "v_desc": ("BLOCK_N2", "BLOCK_DV")}
    return EntryPlan(
        name="attn_bwd_dq",
        arguments=(
            *tensors,
            "lse2_ptr",
            "delta_ptr",
            *strides,
            "qk_scale",
            "softmax_scale",
            "num_heads_total",
            "nheads_q",
            "group",
            *(("max_seqlen_q",) if plan.spec.varlen else ("SEQLEN_Q", "SEQLEN_K", "padded_rows")),
            "head_group",
            *_sides(plan, table),
        ),
        constants=(*_WIDTHS, "BLOCK_M2", "BLOCK_N2"),
        pointer_types=plan.pointer_types,
        boxes=tuple(boxes.items()),
    )


def dbias_entry(plan: BackwardPlan) -> EntryPlan:
    """Return the kernel of dbias."""
    axes = ("h", "m") if plan.spec.varlen else ("z", "h", "m")
    strides = tuple(
        f"stride_{name}{row if axis == 'm' else axis}" for name, row in _QUERIES_KEYS.items() for axis in axes
    )
    return EntryPlan(
        name="attn_bwd_dbias",
        arguments=(
            *(f"{name}_ptr" for name in _QUERIES_KEYS),
            "lse2_ptr",
            "delta_ptr",
            "dbias_ptr",
            *strides,
            "qk_scale",
            "batch",
            "nheads_q",
            "group",
            *(() if plan.spec.varlen else ("SEQLEN_Q", "SEQLEN_K", "padded_rows")),
            "bias_batch",
            "bias_heads",
            "bias_rows",
            "bias_keys",
            *_sides(plan, ()),
        ),
        constants=(*_WIDTHS, "BLOCK_M1", "BLOCK_N1"),
        pointer_types=tuple(sorted((dict(plan.pointer_types) | {"dbias_ptr": "fp32"}).items())),
    )


def _tensors(
    plan: BackwardPlan, rows: dict[str, str], never: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments of tensors, by descriptor but for those in `never`, and the strides of the others."""
    tensors: list[str] = []
    strides: list[str] = []
    for name, row in rows.items():
        if plan.descriptor and name not in never:
            tensors.append(f"{name}_desc")
            continue
        tensors.append(f"{name}_ptr")
        strides += [f"stride_{name}{axis}" for axis in (("h", row) if plan.spec.varlen else ("z", "h", row))]
    return tuple(tensors), tuple(strides)


def _sides(plan: BackwardPlan, table: tuple[str, ...]) -> tuple[str, ...]:
    # A sink is part of lse, and has no other part in these kernels.
    spec = dataclasses.replace(plan.spec.forward(), sinks=False)
    return (
        *side_arguments(spec),
        *(table if plan.mask.table else ()),
        *plan.score_arguments,
        *plan.mask_arguments,
    )


def backward_constants(spec: AttentionSpec, config: TritonBackwardConfig) -> dict[str, int]:
    """Return the value of every compile-time argument of every kernel, by name."""
    return {
        "HEAD_DIM_QK": spec.head_dim_qk,
        "HEAD_DIM_V": spec.head_dim_v,
        "BLOCK_DQK": next_power_of_two(spec.head_dim_qk),
        "BLOCK_DV": next_power_of_two(spec.head_dim_v),
        "BLOCK_M1": config.block_m1,
        "BLOCK_N1": config.block_n1,
        "BLOCK_M2": config.block_m2,
        "BLOCK_N2": config.block_n2,
        "BLOCK_ROWS": BLOCK_ROWS,
    }
