"""attn_bwd: full mask with dbias with bias=fp32:unaligned, dQ by kernel, pointer loads.

Rendered by flashgen from templates/triton/backward.py.jinja.
"""

import triton
import triton.language as tl

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; p probabilities, do the gradient of out, dp and ds
# those of p and of the scores, delta rowsum(dO * O). Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse2 is lse * log2(e).


@triton.jit
def mask_mod(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: every key there is."""
    return kv_idx < SEQLEN_K


@triton.jit
def rows_full(start_n, SEQLEN_Q, SEQLEN_K, BLOCK_N):
    """The rows that see every key of the tile, within those that see some."""
    return 0, 0, SEQLEN_Q, SEQLEN_Q


@triton.jit
def q_bounds(
    start_n,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M,
    BLOCK_N,
):
    """Rows [full_start, full_end) see all keys of the tile, [start, end) some of them."""
    lo, full_lo, full_hi, end = 0, 0, SEQLEN_Q, SEQLEN_Q
    first, all_first, all_last, last = rows_full(
        start_n,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_N,
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
def bounds_full(start_m, SEQLEN_Q, SEQLEN_K, BLOCK_M):
    """Where the keys end that every row of the tile sees, and those that some row does."""
    return SEQLEN_K, SEQLEN_K


@triton.jit
def kv_bounds(
    start_m,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M,
    BLOCK_N,
):
    """Keys [0, full_end) are seen by every row of the tile, [full_end, end) by some."""
    full_hi, hi = SEQLEN_K, SEQLEN_K
    all_last, last = bounds_full(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M,
    )
    full_hi = tl.minimum(full_hi, all_last)
    hi = tl.minimum(hi, last)
    end = tl.maximum(hi, 0)
    full_end = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N
    return full_end, end


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
def add_bias(
    score,
    bias_ptr,
    step_bm,
    step_bn,
    q_idx,
    kv_idx,
    rows,
    keys,
):
    """Add the bias of one tile to scores in base 2."""
    inside = (q_idx < rows) & (kv_idx < keys)
    ptrs = bias_ptr + q_idx.to(tl.int64) * step_bm + kv_idx.to(tl.int64) * step_bn
    bias = tl.load(ptrs, mask=inside, other=0.0)
    return score + bias.to(tl.float32) * 1.4426950408889634


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
    bias_ptr,
    step_bm,
    step_bn,
    MASKED: tl.constexpr,
):
    """exp(score - lse) of one tile of products; lse2 is in base 2, inf for rows that see nothing."""
    qk = qk * qk_scale
    qk = add_bias(
        qk,
        bias_ptr,
        step_bm,
        step_bn,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
    )
    p = tl.math.exp2(qk - lse2)
    if MASKED:
        visible = mask_mod(
            off_z,
            off_h,
            q_idx,
            kv_idx,
            SEQLEN_Q,
            SEQLEN_K,
        )
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
    q_ptr,
    do_ptr,
    stride_qm,
    stride_dom,
    lse2_ptr,
    delta_ptr,
    off_z,
    off_h,
    off_zh,
    start_n,
    start_m,
    end_m,
    qk_scale,
    bias_ptr,
    step_bm,
    step_bn,
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
        q = load_tile(
            q_ptr,
            stride_qm,
            m,
            SEQLEN_Q,
            BLOCK_M1,
            HEAD_DIM_QK,
            BLOCK_DQK,
            True,
        )
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
            bias_ptr,
            step_bm,
            step_bn,
            MASKED,
        )
        do = load_tile(
            do_ptr,
            stride_dom,
            m,
            SEQLEN_Q,
            BLOCK_M1,
            HEAD_DIM_V,
            BLOCK_DV,
            True,
        )
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        delta = tl.load(delta_ptr + offs_m)
        ds = p * (dp - delta[None, :])
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attn_bwd_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse2_ptr,
    delta_ptr,
    stride_qz,
    stride_qh,
    stride_qm,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_doz,
    stride_doh,
    stride_dom,
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
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    step_bn,
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
    k_ptr += z * stride_kz + hkv * stride_kh
    v_ptr += z * stride_vz + hkv * stride_vh
    k = load_tile(
        k_ptr,
        stride_kn,
        start_n,
        SEQLEN_K,
        BLOCK_N1,
        HEAD_DIM_QK,
        BLOCK_DQK,
        True,
    )
    v = load_tile(
        v_ptr,
        stride_vn,
        start_n,
        SEQLEN_K,
        BLOCK_N1,
        HEAD_DIM_V,
        BLOCK_DV,
        True,
    )
    dk = tl.zeros([BLOCK_N1, BLOCK_DQK], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N1, BLOCK_DV], dtype=tl.float32)
    start, full_start, full_end, _end = q_bounds(
        start_n,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M1,
        BLOCK_N1,
    )

    # Main loop: the query heads of the group, and of each the rows that see some key.
    for head in range(group):
        off_h = off_hkv * group + head
        off_zh = off_z * nheads_q + off_h
        h = off_h.to(tl.int64)
        q_head = q_ptr + z * stride_qz + h * stride_qh
        do_head = do_ptr + z * stride_doz + h * stride_doh
        row_head = off_zh.to(tl.int64) * padded_rows
        bias_head = bias_ptr + z * step_bz + h * step_bh
        dk, dv = add_queries(
            dk,
            dv,
            k,
            v,
            q_head,
            do_head,
            stride_qm,
            stride_dom,
            lse2_ptr + row_head,
            delta_ptr + row_head,
            off_z,
            off_h,
            off_zh,
            start_n,
            start,
            full_start,
            qk_scale,
            bias_head,
            step_bm,
            step_bn,
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
            q_head,
            do_head,
            stride_qm,
            stride_dom,
            lse2_ptr + row_head,
            delta_ptr + row_head,
            off_z,
            off_h,
            off_zh,
            start_n,
            full_start,
            full_end,
            qk_scale,
            bias_head,
            step_bm,
            step_bn,
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


@triton.jit
def add_keys(
    dq,
    q,
    do,
    lse2,
    delta,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    off_z,
    off_h,
    off_zh,
    off_hkv,
    offs_m,
    start_n,
    end_n,
    qk_scale,
    bias_ptr,
    step_bm,
    step_bn,
    SEQLEN_Q,
    SEQLEN_K,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the keys [start_n, end_n) give to dQ of a query tile."""
    for n in range(start_n, end_n, BLOCK_N2):
        n = tl.multiple_of(n, BLOCK_N2)
        offs_n = n + tl.arange(0, BLOCK_N2)
        k = load_tile(
            k_ptr,
            stride_kn,
            n,
            SEQLEN_K,
            BLOCK_N2,
            HEAD_DIM_QK,
            BLOCK_DQK,
            MASKED,
        )
        v = load_tile(
            v_ptr,
            stride_vn,
            n,
            SEQLEN_K,
            BLOCK_N2,
            HEAD_DIM_V,
            BLOCK_DV,
            MASKED,
        )
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = probabilities(
            qk,
            lse2[:, None],
            off_z,
            off_h,
            offs_m[:, None],
            offs_n[None, :],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            bias_ptr,
            step_bm,
            step_bn,
            MASKED,
        )
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def attn_bwd_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    lse2_ptr,
    delta_ptr,
    stride_qz,
    stride_qh,
    stride_qm,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_doz,
    stride_doh,
    stride_dom,
    stride_dqz,
    stride_dqh,
    stride_dqm,
    qk_scale,
    softmax_scale,
    num_heads_total,
    nheads_q,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    padded_rows,
    head_group,
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    step_bn,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    BLOCK_N2: tl.constexpr,
):
    """Write dQ of one tile of queries."""
    # Prologue: which tile. Tiles go out in groups of the query heads of head_group key/value heads.
    tile = tl.program_id(0)
    num_m = tl.cdiv(SEQLEN_Q, BLOCK_M2)
    first_head = tile // (head_group * group * num_m) * head_group * group
    heads = tl.minimum(head_group * group, num_heads_total - first_head)
    rank = tile - first_head * num_m
    off_zh = first_head + rank % heads
    off_z = off_zh // nheads_q
    off_h = off_zh % nheads_q
    off_hkv = off_h // group
    block = rank // heads
    start_m = block * BLOCK_M2
    offs_m = start_m + tl.arange(0, BLOCK_M2)
    z = off_z.to(tl.int64)
    h = off_h.to(tl.int64)
    hkv = off_hkv.to(tl.int64)
    q_ptr += z * stride_qz + h * stride_qh
    k_ptr += z * stride_kz + hkv * stride_kh
    v_ptr += z * stride_vz + hkv * stride_vh
    do_ptr += z * stride_doz + h * stride_doh
    q = load_tile(
        q_ptr,
        stride_qm,
        start_m,
        SEQLEN_Q,
        BLOCK_M2,
        HEAD_DIM_QK,
        BLOCK_DQK,
        True,
    )
    do = load_tile(
        do_ptr,
        stride_dom,
        start_m,
        SEQLEN_Q,
        BLOCK_M2,
        HEAD_DIM_V,
        BLOCK_DV,
        True,
    )
    row_head = off_zh.to(tl.int64) * padded_rows
    rows = row_head + offs_m
    inside = offs_m < SEQLEN_Q
    lse2 = tl.load(lse2_ptr + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    bias_ptr += z * step_bz + h * step_bh
    dq = tl.zeros([BLOCK_M2, BLOCK_DQK], dtype=tl.float32)

    # Main loop: key tiles that every row sees, and those that need the mask.
    full_end, end = kv_bounds(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M2,
        BLOCK_N2,
    )
    dq = add_keys(
        dq,
        q,
        do,
        lse2,
        delta,
        k_ptr,
        v_ptr,
        stride_kn,
        stride_vn,
        off_z,
        off_h,
        off_zh,
        off_hkv,
        offs_m,
        0,
        full_end,
        qk_scale,
        bias_ptr,
        step_bm,
        step_bn,
        SEQLEN_Q,
        SEQLEN_K,
        HEAD_DIM_QK,
        HEAD_DIM_V,
        BLOCK_DQK,
        BLOCK_DV,
        BLOCK_M2,
        BLOCK_N2,
        False,
    )
    dq = add_keys(
        dq,
        q,
        do,
        lse2,
        delta,
        k_ptr,
        v_ptr,
        stride_kn,
        stride_vn,
        off_z,
        off_h,
        off_zh,
        off_hkv,
        offs_m,
        full_end,
        end,
        qk_scale,
        bias_ptr,
        step_bm,
        step_bn,
        SEQLEN_Q,
        SEQLEN_K,
        HEAD_DIM_QK,
        HEAD_DIM_V,
        BLOCK_DQK,
        BLOCK_DV,
        BLOCK_M2,
        BLOCK_N2,
        True,
    )

    # Epilogue: rows that see nothing, or that are not used, get 0.
    dq_ptr += z * stride_dqz + h * stride_dqh
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    store_tile(
        dq_ptr,
        stride_dqm,
        start_m,
        SEQLEN_Q,
        dq,
        BLOCK_M2,
        HEAD_DIM_QK,
        BLOCK_DQK,
    )


@triton.jit
def attn_bwd_dbias(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dbias_ptr,
    stride_qz,
    stride_qh,
    stride_qm,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_doz,
    stride_doh,
    stride_dom,
    qk_scale,
    batch,
    nheads_q,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    padded_rows,
    bias_batch,
    bias_heads,
    bias_rows,
    bias_keys,
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    step_bn,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_N1: tl.constexpr,
):
    """Write one tile of dbias, summed over its dimensions of size 1, in the same order every time."""
    # Prologue: a tile of the bias itself; a size of 1 stands for all batch entries, heads, rows or keys.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(bias_rows, BLOCK_M1), tl.cdiv(bias_keys, BLOCK_N1)
    own_n = tile % tiles_n * BLOCK_N1
    own_m = tile // tiles_n % tiles_m * BLOCK_M1
    own_zh = tile // (tiles_n * tiles_m)
    own_h, own_z = own_zh % bias_heads, own_zh // bias_heads
    last_z = tl.where(bias_batch == 1, batch, own_z + 1)
    last_h = tl.where(bias_heads == 1, nheads_q, own_h + 1)
    total = tl.zeros([BLOCK_M1, BLOCK_N1], dtype=tl.float32)

    # Main loop: every place that the tile was added at.
    for off_z in range(own_z, last_z):
        # The interpreter counts in Python's numbers, which users' functions cannot take.
        off_z = tl.cast(off_z, tl.int32)
        used_q, used_k = SEQLEN_Q, SEQLEN_K
        z = tl.cast(off_z, tl.int64)
        last_m = tl.where(bias_rows == 1, used_q, tl.minimum(own_m + 1, used_q))
        last_n = tl.where(bias_keys == 1, used_k, tl.minimum(own_n + 1, used_k))
        for off_h in range(own_h, last_h):
            off_h = tl.cast(off_h, tl.int32)
            off_zh = off_z * nheads_q + off_h
            h = tl.cast(off_h, tl.int64)
            hkv = h // group
            row_head = tl.cast(off_zh, tl.int64) * padded_rows
            bias_head = bias_ptr + z * step_bz + h * step_bh
            q_head = q_ptr + z * stride_qz + h * stride_qh
            do_head = do_ptr + z * stride_doz + h * stride_doh
            k_head = k_ptr + z * stride_kz + hkv * stride_kh
            v_head = v_ptr + z * stride_vz + hkv * stride_vh
            for m in range(own_m, last_m, BLOCK_M1):
                q = load_tile(
                    q_head,
                    stride_qm,
                    m,
                    used_q,
                    BLOCK_M1,
                    HEAD_DIM_QK,
                    BLOCK_DQK,
                    True,
                )
                do = load_tile(
                    do_head,
                    stride_dom,
                    m,
                    used_q,
                    BLOCK_M1,
                    HEAD_DIM_V,
                    BLOCK_DV,
                    True,
                )
                offs_m = m + tl.arange(0, BLOCK_M1)
                rows = row_head + offs_m
                used = offs_m < used_q
                lse2 = tl.load(lse2_ptr + rows, mask=used, other=float("inf"))
                delta = tl.load(delta_ptr + rows, mask=used, other=0.0)
                for n in range(own_n, last_n, BLOCK_N1):
                    k = load_tile(
                        k_head,
                        stride_kn,
                        n,
                        used_k,
                        BLOCK_N1,
                        HEAD_DIM_QK,
                        BLOCK_DQK,
                        True,
                    )
                    v = load_tile(
                        v_head,
                        stride_vn,
                        n,
                        used_k,
                        BLOCK_N1,
                        HEAD_DIM_V,
                        BLOCK_DV,
                        True,
                    )
                    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
                    p = probabilities(
                        qk,
                        lse2[:, None],
                        off_z,
                        off_h,
                        offs_m[:, None],
                        n + tl.arange(0, BLOCK_N1)[None, :],
                        used_q,
                        used_k,
                        qk_scale,
                        bias_head,
                        step_bm,
                        step_bn,
                        True,
                    )
                    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                    total += p * (dp - delta[:, None])

    # Epilogue: a single row, or a single key, takes the sum of all.
    total = tl.where(bias_rows == 1, tl.sum(total, 0)[None, :], total)
    total = tl.where(bias_keys == 1, tl.sum(total, 1)[:, None], total)
    offs_m = own_m + tl.arange(0, BLOCK_M1)[:, None]
    offs_n = own_n + tl.arange(0, BLOCK_N1)[None, :]
    ptrs = dbias_ptr + (own_zh.to(tl.int64) * bias_rows + offs_m) * bias_keys + offs_n
    inside = (offs_m < bias_rows) & (offs_n < bias_keys)
    tl.store(ptrs, total, mask=inside)
