"""What the arguments of a kernel are, read off their names: the glossary is the rule.

| name | what | type |
|---|---|---|
| `*_ptr` | a tensor | pointer, to the element type that the plan names, else that of Q |
| `*_desc` | a tensor descriptor | of the element type of Q |
| `stride_*` | a stride of Q, K, V, out or a gradient, in elements, a multiple of 8 | int64 |
| `step_*` | a stride of any other tensor | int64 |
| `qk_scale`, `softmax_scale`, `softcap`, `dropout_scale` | factors | float32 |
| `dropout_threshold` | random numbers below it drop a probability | uint32 |
| everything else | sizes and numbers of masks | int32 |
"""

from __future__ import annotations

import typing

from flashgen.spec import AttentionSpec, DType

ArgumentKind = typing.Literal["pointer", "descriptor", "stride", "step", "float", "uint", "int"]

_FLOATS = frozenset({"qk_scale", "softmax_scale", "softcap", "dropout_scale"})
_TRITON_TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    # Read as bytes: a captured bool is compared with 0.
    "bool": "u8",
}
_SCALAR_TYPES = {"stride": "i64", "step": "i64", "float": "fp32", "uint": "u32", "int": "i32"}


def argument_kind(name: str) -> ArgumentKind:
    """Return what a run-time argument is."""
    if name.endswith("_ptr"):
        return "pointer"
    if name.endswith("_desc"):
        return "descriptor"
    if name.startswith("stride_"):
        return "stride"
    if name.startswith("step_"):
        return "step"
    if name in _FLOATS:
        return "float"
    return "uint" if name == "dropout_threshold" else "int"


def element_type(dtype: DType) -> str:
    """Return Triton's name of the elements of a dtype in memory."""
    return {DType.TF32: "fp32", DType.FP8: "fp8e4nv"}.get(dtype, dtype.value)


def triton_type(torch_name: str) -> str:
    """Return Triton's name of a torch dtype such as `int32`."""
    return _TRITON_TYPES[torch_name]


def scalar_type(kind: ArgumentKind) -> str:
    """Return the type of an argument that is neither a pointer nor a descriptor, as Triton's signatures spell it."""
    return _SCALAR_TYPES[kind]


def side_pointer_types(spec: AttentionSpec) -> dict[str, str]:
    """Return the element types behind the pointers that are not to Q, K or V, for every feature there is."""
    bias = {"input": element_type(spec.dtype.out), "fp32": "fp32", "bool": "i1", "none": "fp32"}[spec.bias]
    rows = ("lse_ptr", "lse2_ptr", "delta_ptr")
    floats = (*rows, "alibi_ptr", "sinks_ptr", "q_descale_ptr", "k_descale_ptr", "v_descale_ptr")
    ints = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_q_ptr", "seqused_k_ptr")
    tiles = ("tile_start_ptr", "tile_full_ptr", "tile_index_ptr")
    cache = (
        "cache_seqlens_ptr",
        "page_table_ptr",
        "cache_batch_idx_ptr",
        "cache_leftpad_ptr",
        "lengths_ptr",
        "arrivals_ptr",
    )
    row_tiles = ("row_start_ptr", "row_full_ptr", "row_index_ptr", "turn_ptr")
    return {
        **dict.fromkeys(floats, "fp32"),
        **dict.fromkeys((*ints, *tiles, *row_tiles, *cache), "i32"),
        **dict.fromkeys(("rotary_cos_ptr", "rotary_sin_ptr"), "fp32" if spec.rotary_fp32 else element_type(spec.dtype)),
        "partial_ptr": "fp32",
        "bias_ptr": bias,
        "tile_counter_ptr": "i32",
        "rng_ptr": "i64",
        "out_ptr": element_type(spec.dtype.out),
    }
