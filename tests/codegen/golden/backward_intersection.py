"""attn_bwd: (chunked(chunk_size)) & (prefix_lm(prefix_length)) mask, dQ by atomic, descriptor loads.

Rendered by flashgen from templates/triton/backward.py.jinja.
"""

import triton
import triton.language as tl

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; p probabilities, do the gradient of out, dp and ds
# those of p and of the scores, delta rowsum(dO * O). Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse2 is lse * log2(e).


@triton.jit
def mask_chunked(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    chunk_size,
):
    """Whether query row q_idx sees key kv_idx: one of its own chunk."""
    # Rows before the first key have a negative position: division must round down.
    own = q_idx + (SEQLEN_K - SEQLEN_Q)
    start = own // chunk_size * chunk_size
    start = tl.where(start > own, start - chunk_size, start)
    return (kv_idx >= start) & (kv_idx < start + chunk_size)


@triton.jit
def mask_prefix_lm(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    prefix_length,
):
    """Whether query row q_idx sees key kv_idx: one of the prefix, or none ahead of it."""
    return (kv_idx < prefix_length) | (kv_idx <= q_idx + (SEQLEN_K - SEQLEN_Q))


@triton.jit
def mask_mod(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    chunk_size,
    prefix_length,
):
    """Whether query row q_idx sees key kv_idx."""
    chunked = mask_chunked(
        b,
        h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
        chunk_size,
    )
    prefix_lm = mask_prefix_lm(
        b,
        h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
        prefix_length,
    )
    seen_0 = chunked & prefix_lm
    return seen_0


@triton.jit
def rows_chunked(
    start_n,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_N,
    chunk_size,
):
    """The rows that see every key of the tile, within those that see some."""
    offset = SEQLEN_K - SEQLEN_Q
    first = start_n // chunk_size * chunk_size
    last = (start_n + BLOCK_N - 1) // chunk_size * chunk_size
    # No row sees keys of two chunks.
    all_last = first + chunk_size - offset
    return first - offset, last - offset, all_last, last + chunk_size - offset


@triton.jit
def rows_prefix_lm(
    start_n,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_N,
    prefix_length,
):
    """The rows that see every key of the tile, within those that see some."""
    diagonal = start_n - (SEQLEN_K - SEQLEN_Q)
    first = tl.where(start_n < prefix_length, 0, diagonal)
    whole = start_n + BLOCK_N <= prefix_length
    return first, tl.where(whole, 0, diagonal + BLOCK_N - 1), SEQLEN_Q, SEQLEN_Q


@triton.jit
def q_bounds(
    start_n,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M,
    BLOCK_N,
    chunk_size,
    prefix_length,
):
    """Rows [full_start, full_end) see all keys of the tile, [start, end) some of them."""
    lo, full_lo, full_hi, end = 0, 0, SEQLEN_Q, SEQLEN_Q
    first, all_first, all_last, last = rows_chunked(
        start_n,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_N,
        chunk_size,
    )
    lo = tl.maximum(lo, first)
    full_lo = tl.maximum(full_lo, all_first)
    full_hi = tl.minimum(full_hi, all_last)
    end = tl.minimum(end, last)
    first, all_first, all_last, last = rows_prefix_lm(
        start_n,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_N,
        prefix_length,
    )
    lo = tl.maximum(lo, first)
    full_lo = tl.maximum(full_lo, all_first)
    full_hi = tl.minimum(full_hi, all_last)
    end = tl.minimum(end, last)
    start = lo // BLOCK_M * BLOCK_M
    full_start = tl.cdiv(full_lo, BLOCK_M) * BLOCK_M
    # Rows past the last one weigh nothing: the tile that holds it may count as whole.
    full_end = tl.maximum(full_hi, 0) // BLOCK_M * BLOCK_M
    full_end = tl.where(full_hi < SEQLEN_Q, full_end, SEQLEN_Q)
    # Keys past the last one must be masked: then the first loop walks all rows.
    none = (full_end <= full_start) | (start_n + BLOCK_N > SEQLEN_K)
    full_start = tl.where(none, end, full_start)
    full_end = tl.where(none, end, full_end)
    return start, full_start, full_end, end


@triton.jit
def load_tile(
    ptr,
    stride_row,
    start,
    length,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows [start, start + ROWS) of one head, zero past its length and head dimension."""
    offs = start + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride_row + offs_d[None, :]
    if CHECK_ROWS and HEAD_DIM < BLOCK_D:
        inside = (offs[:, None] < length) & (offs_d[None, :] < HEAD_DIM)
        return tl.load(ptrs, mask=inside, other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=offs[:, None] < length, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    ptr,
    stride_row,
    start,
    length,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows [start, start + ROWS) of one head, nothing past its length."""
    offs = start + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None].to(tl.int64) * stride_row + offs_d[None, :]
    inside = (offs[:, None] < length) & (offs_d[None, :] < HEAD_DIM)
    tl.store(ptrs, tile, mask=inside)


@triton.jit
def probabilities(
    qk,
    lse2,
    off_z,
    off_h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    qk_scale,
    chunk_size,
    prefix_length,
    MASKED: tl.constexpr,
):
    """exp(score - lse) of one tile of products; lse2 is in base 2, inf for rows that see nothing."""
    p = tl.math.exp2(qk * qk_scale - lse2)
    if MASKED:
        visible = mask_mod(
            off_z,
            off_h,
            q_idx,
            kv_idx,
            SEQLEN_Q,
            SEQLEN_K,
            chunk_size,
            prefix_length,
        )
        visible = visible & (kv_idx < SEQLEN_K)
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def attn_bwd_delta(
    out_ptr,
    do_ptr,
    lse_ptr,
    lse2_ptr,
    delta_ptr,
    stride_oz,
    stride_oh,
    stride_om,
    stride_doz,
    stride_doh,
    stride_dom,
    nheads_q,
    rows,
    padded_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write delta = rowsum(dO * O), and lse in base 2: inf where a row sees nothing."""
    num_m = tl.cdiv(padded_rows, BLOCK_ROWS)
    off_zh = tl.program_id(0) // num_m
    start_m = tl.program_id(0) % num_m * BLOCK_ROWS
    z = (off_zh // nheads_q).to(tl.int64)
    h = (off_zh % nheads_q).to(tl.int64)
    out = load_tile(
        out_ptr + z * stride_oz + h * stride_oh,
        stride_om,
        start_m,
        rows,
        BLOCK_ROWS,
        HEAD_DIM_V,
        BLOCK_DV,
        True,
    )
    do = load_tile(
        do_ptr + z * stride_doz + h * stride_doh,
        stride_dom,
        start_m,
        rows,
        BLOCK_ROWS,
        HEAD_DIM_V,
        BLOCK_DV,
        True,
    )
    offs_m = start_m + tl.arange(0, BLOCK_ROWS)
    lse_ptrs = lse_ptr + off_zh.to(tl.int64) * rows + offs_m
    lse = tl.load(lse_ptrs, mask=offs_m < rows, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    # Rows up to a whole tile: whoever reads them needs no mask.
    own = off_zh.to(tl.int64) * padded_rows + offs_m
    inside = offs_m < padded_rows
    tl.store(lse2_ptr + own, lse2, mask=inside)
    tl.store(delta_ptr + own, delta, mask=inside)


@triton.jit
def add_queries(
    dk,
    dv,
    k,
    v,
    q_desc,
    do_desc,
    lse2_ptr,
    delta_ptr,
    dq_desc,
    off_z,
    off_h,
    off_zh,
    start_n,
    start_m,
    end_m,
    qk_scale,
    chunk_size,
    prefix_length,
    SEQLEN_Q,
    SEQLEN_K,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the queries [start_m, end_m) give to dK and dV of a key tile."""
    for m in range(start_m, end_m, BLOCK_M1):
        m = tl.multiple_of(m, BLOCK_M1)
        offs_m = m + tl.arange(0, BLOCK_M1)
        offs_n = start_n + tl.arange(0, BLOCK_N1)
        q = q_desc.load([off_z, off_h, m, 0]).reshape(BLOCK_M1, BLOCK_DQK)
        lse2 = tl.load(lse2_ptr + offs_m)
        qk = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = probabilities(
            qk,
            lse2[None, :],
            off_z,
            off_h,
            offs_m[None, :],
            offs_n[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            chunk_size,
            prefix_length,
            MASKED,
        )
        do = do_desc.load([off_z, off_h, m, 0]).reshape(BLOCK_M1, BLOCK_DV)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        delta = tl.load(delta_ptr + offs_m)
        ds = p * (dp - delta[None, :])
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        dq_desc.atomic_add([off_z, off_h, m, 0], dq.reshape(1, 1, BLOCK_M1, BLOCK_DQK))
    return dk, dv


@triton.jit
def attn_bwd_dkdv(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dk_ptr,
    dv_ptr,
    dq_desc,
    lse2_ptr,
    delta_ptr,
    stride_dkz,
    stride_dkh,
    stride_dkn,
    stride_dvz,
    stride_dvh,
    stride_dvn,
    qk_scale,
    softmax_scale,
    num_heads_total,
    nheads_q,
    nheads_kv,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    padded_rows,
    head_group,
    chunk_size,
    prefix_length,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_N1: tl.constexpr,
):
    """Write dK and dV of one tile of keys, summed over the query heads of its group."""
    # Prologue: which tile. Tiles go out in groups of head_group key/value heads.
    tile = tl.program_id(0)
    num_n = tl.cdiv(SEQLEN_K, BLOCK_N1)
    first_head = tile // (head_group * num_n) * head_group
    heads = tl.minimum(head_group, num_heads_total - first_head)
    rank = tile - first_head * num_n
    off_zhkv = first_head + rank % heads
    off_z = off_zhkv // nheads_kv
    off_hkv = off_zhkv % nheads_kv
    block = rank // heads
    start_n = block * BLOCK_N1
    z = off_z.to(tl.int64)
    hkv = off_hkv.to(tl.int64)
    k = k_desc.load([off_z, off_hkv, start_n, 0]).reshape(BLOCK_N1, BLOCK_DQK)
    v = v_desc.load([off_z, off_hkv, start_n, 0]).reshape(BLOCK_N1, BLOCK_DV)
    dk = tl.zeros([BLOCK_N1, BLOCK_DQK], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N1, BLOCK_DV], dtype=tl.float32)
    start, full_start, full_end, end = q_bounds(
        start_n,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M1,
        BLOCK_N1,
        chunk_size,
        prefix_length,
    )

    # Main loop: the query heads of the group, and of each the rows that see some key.
    for head in range(group):
        off_h = off_hkv * group + head
        off_zh = off_z * nheads_q + off_h
        row_head = off_zh.to(tl.int64) * padded_rows
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            q_desc,
            do_desc,
            lse2_ptr + row_head,
            delta_ptr + row_head,
            dq_desc,
            off_z,
            off_h,
            off_zh,
            start_n,
            start,
            full_start,
            qk_scale,
            chunk_size,
            prefix_length,
            SEQLEN_Q,
            SEQLEN_K,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
            BLOCK_M1,
            BLOCK_N1,
            True,
        )
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            q_desc,
            do_desc,
            lse2_ptr + row_head,
            delta_ptr + row_head,
            dq_desc,
            off_z,
            off_h,
            off_zh,
            start_n,
            full_start,
            full_end,
            qk_scale,
            chunk_size,
            prefix_length,
            SEQLEN_Q,
            SEQLEN_K,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
            BLOCK_M1,
            BLOCK_N1,
            False,
        )
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            q_desc,
            do_desc,
            lse2_ptr + row_head,
            delta_ptr + row_head,
            dq_desc,
            off_z,
            off_h,
            off_zh,
            start_n,
            full_end,
            end,
            qk_scale,
            chunk_size,
            prefix_length,
            SEQLEN_Q,
            SEQLEN_K,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
            BLOCK_M1,
            BLOCK_N1,
            True,
        )

    # Epilogue: keys that nobody sees, or that are not used, get 0.
    dk_ptr += z * stride_dkz + hkv * stride_dkh
    dv_ptr += z * stride_dvz + hkv * stride_dvh
    dk = (dk * softmax_scale).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dv_ptr.dtype.element_ty)
    store_tile(
        dk_ptr,
        stride_dkn,
        start_n,
        SEQLEN_K,
        dk,
        BLOCK_N1,
        HEAD_DIM_QK,
        BLOCK_DQK,
    )
    store_tile(
        dv_ptr,
        stride_dvn,
        start_n,
        SEQLEN_K,
        dv,
        BLOCK_N1,
        HEAD_DIM_V,
        BLOCK_DV,
    )
