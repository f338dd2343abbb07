"""From the tensors and options of a call of decoding to a `Problem`, or a typed error before anything is launched."""

from __future__ import annotations

import torch

from flashgen.codegen.head_tiles import head_tiles
from flashgen.errors import InputError
from flashgen.launch import readable
from flashgen.ops.call import heads_first
from flashgen.ops.checks import ORDERS, check_layout, check_numbers, dtype_of, score_mod_of
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.side_checks import check_captures, check_device
from flashgen.spec import AttentionSpec, Causal, Extras, Problem, Shape, parse_mask
from flashgen.spec.problem import Rotary

_FP8 = torch.float8_e4m3fn
_HALF = (torch.float16, torch.bfloat16)
# Of columns that are rotated, as FlashAttention has it: kernels read rows in vectors.
_ROTARY_STEP = 16
# What one query sees, whatever the lengths.
_EVERYTHING_BEHIND = Causal()


def decode_problem(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> Problem:
    """Return the problem that a call poses; seqlen_k is the capacity of one sequence, for lengths are on the device.

    Raises:
        InputError: for a rank, dtype, device, batch, head count, length, head dimension or number that does not fit;
            the message says what was got and what is allowed.
    """
    check_layout(options.layout)
    check_numbers(options.softmax_scale, options.softcap)
    if options.num_splits < 0:
        raise InputError(f"num_splits must be 'auto' or at least 0 (0: auto), got {options.num_splits}")
    _check_caches(q, k_cache, v_cache, options.layout)
    shape = _shape_of(q, k_cache, tensors, options)
    _check_side(q, shape, tensors)
    _check_places(q, k_cache, shape, tensors)
    fp8 = k_cache.dtype == _FP8
    _check_new(q, k_cache, v_cache, shape, tensors, options)
    _check_rotary(q, tensors, options)
    if tensors.k_descale is not None and not fp8:
        raise InputError(f"k_descale and v_descale belong to caches of {_FP8}, got {k_cache.dtype}")
    mask = parse_mask(options.mask)
    spec = AttentionSpec(
        phase="decode",
        dtype=dtype_of(q),
        head_dim_qk=q.shape[-1],
        head_dim_v=v_cache.shape[-1],
        # One query is the last position: it sees all that there is, and both share one kernel.
        mask=parse_mask("full") if shape.seqlen_q == 1 and mask == _EVERYTHING_BEHIND else mask,
        score_mod=score_mod_of(options.score_mod),
        softcap=options.softcap != 0,
        alibi=tensors.alibi_slopes is not None,
        sinks=tensors.sinks is not None,
        descale=tensors.k_descale is not None,
        lse=options.return_lse,
        page_size=0 if tensors.page_table is None else heads_first(k_cache, options.layout).shape[2],
        append=tensors.k_new is not None,
        rotary=_rotary_of(tensors, options),
        rotary_fp32=tensors.rotary_cos is not None and tensors.rotary_cos.dtype != q.dtype,
        leftpad=tensors.cache_leftpad is not None,
        batch_idx=tensors.cache_batch_idx is not None,
        fp8_kv=fp8,
        shared_kv=tensors.k_new is None and is_shared(k_cache, v_cache) and _cut_alike(k_cache, v_cache),
    )
    check_captures(q, spec, tensors.captures)
    return Problem(spec=spec, shape=shape)


def decode_extras(problem: Problem, tensors: DecodeTensors, options: DecodeOptions) -> Extras:
    """Return the numbers and tensors of a call; nothing is copied."""
    named = tensors._asdict()
    for name in ("k_new", "v_new"):
        if named[name] is not None:
            named[name] = heads_first(named[name], options.layout)
    return Extras(
        softmax_scale=problem.spec.default_scale if options.softmax_scale is None else options.softmax_scale,
        softcap=options.softcap,
        num_splits=options.num_splits,
        **named,
    )


def is_shared(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Return whether V is the first columns of K, in the same memory."""
    return (
        not k_cache.is_meta
        and k_cache.data_ptr() == v_cache.data_ptr()
        and k_cache.stride() == v_cache.stride()
        and k_cache.shape[:-1] == v_cache.shape[:-1]
        and v_cache.shape[-1] <= k_cache.shape[-1]
    )


def _cut_alike(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Return whether some tiles of K's columns are also V's; else each is read by itself, as if it were not shared."""
    dims = k_cache.shape[-1], v_cache.shape[-1]
    cuts = ([head_tiles(dim, most) for dim in dims] for most in (1, 2))
    return any(of_k[: len(of_v)] == of_v for of_k, of_v in cuts)


def check_in_place(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Refuse caches that kernels cannot read in place: to copy them would cost more than the call.

    Raises:
        InputError: for a last dimension that is not contiguous, other strides that are no multiples of 8 elements, or
            storage that is not 16-byte aligned.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not readable(cache) or cache.data_ptr() % 16:
            raise InputError(
                f"{name} must be readable in place: a contiguous last dimension, other strides that are multiples of 8 "
                f"elements, 16-byte aligned storage; got strides {list(cache.stride())} at offset "
                f"{cache.storage_offset()}. A cache is not copied in every call: allocate it so"
            )


def _rotary_of(tensors: DecodeTensors, options: DecodeOptions) -> Rotary:
    if tensors.rotary_cos is None:
        return ""
    return "pairs" if options.rotary_interleaved else "halves"


def _check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layout: str) -> None:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4:
            paged = "" if name == "q" else " (paged: pages in place of batch, page_size in place of seqlen)"
            raise InputError(f"{name} must have 4 dimensions {ORDERS[layout]}{paged}, got shape {tuple(tensor.shape)}")
        check_device(name, tensor, q)
    if k_cache.dtype != v_cache.dtype:
        raise InputError(f"k_cache and v_cache must have one dtype, got {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.dtype != q.dtype and not (k_cache.dtype == _FP8 and q.dtype in _HALF):
        raise InputError(
            f"the caches must have the dtype of q, or be {_FP8} beside q of float16 or bfloat16; got {k_cache.dtype} "
            f"beside {q.dtype}"
        )
    if q.shape[-1] != k_cache.shape[-1]:
        raise InputError(f"q and k_cache must have one head_dim, got {q.shape[-1]} and {k_cache.shape[-1]}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise InputError(
            f"k_cache and v_cache must differ in head_dim alone, got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )


def _shape_of(q: torch.Tensor, k_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions) -> Shape:
    batch, nheads_q, seqlen_q, _ = heads_first(q, options.layout).shape
    places, nheads_kv, rows, _ = heads_first(k_cache, options.layout).shape
    table = tensors.page_table
    if table is not None:
        _check_int32("page_table", table, q, (batch, None), "[batch, pages of a sequence]")
        if rows < 1:
            raise InputError(f"pages must hold at least one key, got caches of {list(k_cache.shape)}")
        rows *= table.shape[1]
    elif tensors.cache_batch_idx is None and places < batch:
        raise InputError(
            f"the caches must have an entry for each sequence, got {places} of a batch of {batch}; give "
            "cache_batch_idx or page_table where entries are shared"
        )
    return Shape(batch=batch, seqlen_q=seqlen_q, seqlen_k=rows, nheads_q=nheads_q, nheads_kv=nheads_kv)


def _check_places(q: torch.Tensor, k_cache: torch.Tensor, shape: Shape, tensors: DecodeTensors) -> None:
    """Check what says where the keys of each sequence are."""
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        tensor = getattr(tensors, name)
        if tensor is not None:
            _check_int32(name, tensor, q, (shape.batch,), "[batch]")
    if tensors.page_table is not None and tensors.cache_batch_idx is not None:
        raise InputError("page_table and cache_batch_idx both say where a sequence's keys are: give one of them")


def _check_int32(name: str, tensor: torch.Tensor, q: torch.Tensor, sizes: tuple[int | None, ...], meaning: str) -> None:
    fits = tensor.dim() == len(sizes) and all(
        want in (None, got) for want, got in zip(sizes, tensor.shape, strict=True)
    )
    if tensor.dtype != torch.int32 or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"{name} must be torch.int32 {meaning}, here [{wanted}]; got {tensor.dtype} {list(tensor.shape)}"
        )
    check_device(name, tensor, q)


def _check_side(q: torch.Tensor, shape: Shape, tensors: DecodeTensors) -> None:
    heads, of_batch, factors = (shape.nheads_q,), (shape.batch, shape.nheads_q), (shape.batch, shape.nheads_kv)
    allowed: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {
        "alibi_slopes": ((heads, of_batch), "[nheads_q] or [batch, nheads_q]"),
        "sinks": ((heads,), "[nheads_q]"),
        "k_descale": ((factors,), "[batch, nheads_kv]"),
        "v_descale": ((factors,), "[batch, nheads_kv]"),
    }
    for name, (shapes, meaning) in allowed.items():
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        check_device(name, tensor, q)
        if tensor.dtype != torch.float32 or tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, map(list, shapes)))
            raise InputError(
                f"{name} must be torch.float32 {meaning}, here {wanted}; got {tensor.dtype} {list(tensor.shape)}"
            )


def _check_new(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    shape: Shape,
    tensors: DecodeTensors,
    options: DecodeOptions,
) -> None:
    """Check what is appended."""
    given = {"k": (tensors.k_new, k_cache), "v": (tensors.v_new, v_cache)}
    missing = [name for name, (tensor, _) in given.items() if tensor is None]
    if len(missing) == 2:
        return
    if missing:
        raise InputError(f"k and v are appended together: {missing[0]} is missing")
    if k_cache.dtype == _FP8:
        raise InputError(
            "nothing is appended to caches of float8: scale, convert and write the new keys first, and leave k and v "
            "out"
        )
    for name, (tensor, cache) in given.items():
        assert tensor is not None
        if tensor.dim() != 4 or tensor.dtype != q.dtype:
            raise InputError(
                f"{name} must be {q.dtype}, as q, {ORDERS[options.layout]}, got {tensor.dtype} {list(tensor.shape)}"
            )
        check_device(name, tensor, q)
        batch, nheads, rows, dim = heads_first(tensor, options.layout).shape
        if (batch, nheads, dim) != (shape.batch, shape.nheads_kv, cache.shape[-1]):
            raise InputError(
                f"{name} must have batch {shape.batch}, {shape.nheads_kv} heads and head_dim {cache.shape[-1]}, got "
                f"{batch}, {nheads} and {dim}"
            )
        if not 1 <= rows <= shape.seqlen_k:
            raise InputError(
                f"{name} must have from 1 to {shape.seqlen_k} rows, what the cache of a sequence holds; got {rows}"
            )
    k_new, v_new = tensors.k_new, tensors.v_new
    assert k_new is not None
    assert v_new is not None
    if k_new.shape[:3] != v_new.shape[:3]:
        raise InputError(f"k and v must have equally many rows, got {list(k_new.shape)} and {list(v_new.shape)}")
    if not k_cache.is_meta and k_cache.data_ptr() == v_cache.data_ptr() and k_cache.numel():
        raise InputError("k_cache and v_cache share memory: k and v cannot both be appended to it")
    if shape.seqlen_q < 1:
        raise InputError("q must have at least one row where keys are appended, got seqlen_q 0")


def _check_rotary(q: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions) -> None:
    cos, sin = tensors.rotary_cos, tensors.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise InputError("rotary_cos and rotary_sin are given together or not at all")
    if tensors.k_new is None:
        raise InputError("rotary_cos and rotary_sin turn q and the keys that are appended: give k and v, too")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.dim() != 2 or table.dtype not in (q.dtype, torch.float32) or table.shape != cos.shape:
            raise InputError(
                f"{name} must be {q.dtype} or torch.float32 [positions, rotary_dim / 2], both of one shape; got "
                f"{table.dtype} {list(table.shape)}"
            )
        check_device(name, table, q)
    if cos.dtype != sin.dtype:
        raise InputError(f"rotary_cos and rotary_sin must have one dtype, got {cos.dtype} and {sin.dtype}")
    rotary_dim = 2 * cos.shape[1]
    if not 0 < rotary_dim <= q.shape[-1] or rotary_dim % _ROTARY_STEP:
        raise InputError(
            f"rotary_dim, twice the columns of rotary_cos, must be a multiple of {_ROTARY_STEP} up to head_dim "
            f"{q.shape[-1]}, got {rotary_dim}"
        )
    seqlen_new = heads_first(tensors.k_new, options.layout).shape[2]
    if cos.shape[0] < seqlen_new:
        raise InputError(
            f"rotary_cos and rotary_sin must have a row for each position, got {cos.shape[0]} and {seqlen_new} new keys"
        )
