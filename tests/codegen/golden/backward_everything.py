"""attn_bwd: (causal) & (document) mask with score_mod with softcap with alibi with sinks with dropout with varlen with dbias with bias=fp32 with seqused=qk, dQ by kernel, pointer loads.

Rendered by flashgen from templates/triton/backward.py.jinja.
"""

import triton
import triton.language as tl

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; p probabilities, do the gradient of out, dp and ds
# those of p and of the scores, delta rowsum(dO * O). Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse2 is lse * log2(e).


@triton.jit
def mask_causal(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: the last row sees the last key."""
    return kv_idx <= q_idx + (SEQLEN_K - SEQLEN_Q)


@triton.jit
def mask_function(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
):
    """Whether query row q_idx sees key kv_idx: both of one document."""
    inside = q_idx < mask1_q_ids_size0
    q_ids_q_idx = tl.load(mask1_q_ids_ptr + q_idx, mask=inside, other=0)
    inside = kv_idx < mask1_kv_ids_size0
    kv_ids_kv_idx = tl.load(mask1_kv_ids_ptr + kv_idx, mask=inside, other=0)
    return q_ids_q_idx == kv_ids_kv_idx


@triton.jit
def mask_mod(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
):
    """Whether query row q_idx sees key kv_idx."""
    causal = mask_causal(
        b,
        h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
    )
    function = mask_function(
        b,
        h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
        mask1_q_ids_ptr,
        mask1_q_ids_size0,
        mask1_kv_ids_ptr,
        mask1_kv_ids_size0,
    )
    seen_0 = causal & function
    return seen_0


@triton.jit
def attn_tiles(
    kinds_ptr,
    nheads_q,
    max_seqlen_q,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write for every key tile of every query tile: 0 no pair is visible, 1 some are, 2 all."""
    row = tl.program_id(0)
    tile_n = tl.program_id(1)
    num_m = tl.cdiv(max_seqlen_q, BLOCK_M)
    block = row % num_m
    off_z, off_h = row // num_m, 0
    SEQLEN_Q = tl.load(cu_seqlens_q_ptr + off_z + 1) - tl.load(cu_seqlens_q_ptr + off_z)
    SEQLEN_K = tl.load(cu_seqlens_k_ptr + off_z + 1) - tl.load(cu_seqlens_k_ptr + off_z)
    used_q = tl.load(seqused_q_ptr + off_z)
    SEQLEN_Q = tl.minimum(used_q, SEQLEN_Q)
    used_k = tl.load(seqused_k_ptr + off_z)
    SEQLEN_K = tl.minimum(used_k, SEQLEN_K)
    q_idx = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    kv_idx = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    visible = mask_mod(
        off_z,
        off_h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
        mask1_q_ids_ptr,
        mask1_q_ids_size0,
        mask1_kv_ids_ptr,
        mask1_kv_ids_size0,
    )
    visible = visible & (kv_idx < SEQLEN_K)
    # Rows past the end decide nothing.
    some = tl.max(tl.max((visible & (q_idx < SEQLEN_Q)).to(tl.int32), 1), 0)
    whole = tl.min(tl.min((visible | (q_idx >= SEQLEN_Q)).to(tl.int32), 1), 0)
    kind = (some + some * whole).to(tl.int8)
    tl.store(kinds_ptr + row.to(tl.int64) * tl.num_programs(1) + tile_n, kind)


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
def softcap_score(score, softcap):
    """Return softcap * tanh(score / softcap), of a score that is 2 * log2(e) / softcap times too large."""
    return softcap - 2.0 * softcap / (1.0 + tl.math.exp2(score))


@triton.jit
def score_mod(
    score,
    b,
    h,
    q_idx,
    kv_idx,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
):
    """Return the score changed by the function that the caller gave, in natural units."""
    index = q_idx - kv_idx
    inside = tl.where(h < score_w_size0, (index >= 0) & (index < score_w_size1), False)
    offset = h.to(tl.int64) * score_w_size1 + index
    w_index = tl.load(score_w_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return score * 2.0 + w_index


@triton.jit
def score_derivative(
    score,
    b,
    h,
    q_idx,
    kv_idx,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
):
    """Return the derivative of score_mod with respect to its score."""
    return tl.full(score.shape, 2.0, tl.float32)


@triton.jit
def add_bias(
    score,
    bias_ptr,
    step_bm,
    q_idx,
    kv_idx,
    rows,
    keys,
):
    """Add the bias of one tile to scores in base 2."""
    inside = (q_idx < rows) & (kv_idx < keys)
    ptrs = bias_ptr + q_idx.to(tl.int64) * step_bm + kv_idx
    bias = tl.load(ptrs, mask=inside, other=0.0)
    return score + bias.to(tl.float32) * 1.4426950408889634


@triton.jit
def dropout_keep(
    seed,
    philox_offset,
    off_zh,
    offs_m,
    n,
    dropout_threshold,
    BLOCK_N: tl.constexpr,
):
    """Which probabilities of a tile are kept: Philox4x32-10 (Salmon et al. 2011) of their position."""
    fours = n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    rows = offs_m[:, None] + tl.zeros_like(fours)
    fours = fours + tl.zeros_like(rows)
    head = tl.zeros_like(rows) + off_zh
    call = tl.zeros_like(rows) + philox_offset.to(tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, fours, rows, head, call)
    # One counter serves four keys in a row.
    r = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    r = r.reshape(offs_m.shape[0], BLOCK_N)
    return r.to(tl.uint32, bitcast=True) >= dropout_threshold


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
    softcap,
    bias_ptr,
    step_bm,
    slope,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
    MASKED: tl.constexpr,
):
    """exp(score - lse) of one tile of products, and the score's derivative by the scaled product."""
    qk = qk * qk_scale
    qk = softcap_score(qk, softcap)
    capped = qk / softcap
    slope_qk = 1.0 - capped * capped
    slope_qk = slope_qk * score_derivative(
        qk,
        off_z,
        off_h,
        q_idx,
        kv_idx,
        score_w_ptr,
        score_w_size0,
        score_w_size1,
    )
    qk = score_mod(
        qk,
        off_z,
        off_h,
        q_idx,
        kv_idx,
        score_w_ptr,
        score_w_size0,
        score_w_size1,
    )
    qk = qk * 1.4426950408889634
    qk = add_bias(
        qk,
        bias_ptr,
        step_bm,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
    )
    qk -= slope * tl.abs(q_idx + (SEQLEN_K - SEQLEN_Q) - kv_idx)
    p = tl.math.exp2(qk - lse2)
    # Of a row past the last one, score_mod may make NaN.
    p = tl.where(lse2 < float("inf"), p, 0.0)
    if MASKED:
        visible = mask_mod(
            off_z,
            off_h,
            q_idx,
            kv_idx,
            SEQLEN_Q,
            SEQLEN_K,
            mask1_q_ids_ptr,
            mask1_q_ids_size0,
            mask1_kv_ids_ptr,
            mask1_kv_ids_size0,
        )
        visible = visible & (kv_idx < SEQLEN_K)
        p = tl.where(visible, p, 0.0)
    return p, slope_qk


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
    row_index_ptr,
    seed,
    philox_offset,
    dropout_threshold,
    dropout_scale,
    qk_scale,
    softcap,
    bias_ptr,
    step_bm,
    slope,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
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
    """Add what the query tiles [start_m, end_m) of the table give to dK and dV of a key tile."""
    for tile in range(start_m, end_m):
        m = tl.load(row_index_ptr + tile) * BLOCK_M1
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
        lse2 = tl.load(lse2_ptr + offs_m, mask=offs_m < SEQLEN_Q, other=float("inf"))
        qk = tl.dot(k, tl.trans(q), input_precision="ieee")
        p, slope_qk = probabilities(
            qk,
            lse2[None, :],
            off_z,
            off_h,
            offs_m[None, :],
            offs_n[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            bias_ptr,
            step_bm,
            slope,
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            mask1_q_ids_ptr,
            mask1_q_ids_size0,
            mask1_kv_ids_ptr,
            mask1_kv_ids_size0,
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
        keep = dropout_keep(
            seed,
            philox_offset,
            off_zh,
            offs_m,
            start_n,
            dropout_threshold,
            BLOCK_N1,
        )
        keep = tl.trans(keep)
        dropped = tl.where(keep, p * dropout_scale, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        dp = tl.where(keep, dp * dropout_scale, 0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < SEQLEN_Q, other=0.0)
        ds = p * (dp - delta[None, :])
        # Where nothing is seen, the derivative may be anything.
        ds = tl.where(p > 0.0, ds * slope_qk, 0.0)
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
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_doh,
    stride_dom,
    stride_dkh,
    stride_dkn,
    stride_dvh,
    stride_dvn,
    qk_scale,
    softmax_scale,
    num_heads_total,
    nheads_q,
    nheads_kv,
    group,
    max_seqlen_k,
    head_group,
    softcap,
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    alibi_ptr,
    step_alibi_z,
    rng_ptr,
    dropout_threshold,
    dropout_scale,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    step_lh,
    seqused_q_ptr,
    seqused_k_ptr,
    row_start_ptr,
    row_full_ptr,
    row_index_ptr,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
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
    num_n = tl.cdiv(max_seqlen_k, BLOCK_N1)
    first_head = tile // (head_group * num_n) * head_group
    heads = tl.minimum(head_group, num_heads_total - first_head)
    rank = tile - first_head * num_n
    off_zhkv = first_head + rank % heads
    off_z = off_zhkv // nheads_kv
    off_hkv = off_zhkv % nheads_kv
    block = rank // heads
    start_n = block * BLOCK_N1
    q_start = tl.load(cu_seqlens_q_ptr + off_z)
    k_start = tl.load(cu_seqlens_k_ptr + off_z)
    SEQLEN_Q = tl.load(cu_seqlens_q_ptr + off_z + 1) - q_start
    SEQLEN_K = tl.load(cu_seqlens_k_ptr + off_z + 1) - k_start
    if start_n >= SEQLEN_K:
        return
    SEQLEN_Q = tl.minimum(tl.load(seqused_q_ptr + off_z), SEQLEN_Q)
    keys_k = SEQLEN_K
    SEQLEN_K = tl.minimum(tl.load(seqused_k_ptr + off_z), SEQLEN_K)
    z = off_z.to(tl.int64)
    hkv = off_hkv.to(tl.int64)
    k_ptr += k_start.to(tl.int64) * stride_kn + hkv * stride_kh
    v_ptr += k_start.to(tl.int64) * stride_vn + hkv * stride_vh
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
    seed = tl.load(rng_ptr)
    philox_offset = tl.load(rng_ptr + 1)

    # Main loop: the query heads of the group, and of each the rows that see some key.
    for head in range(group):
        off_h = off_hkv * group + head
        off_zh = off_z * nheads_q + off_h
        h = off_h.to(tl.int64)
        q_head = q_ptr + q_start.to(tl.int64) * stride_qm + h * stride_qh
        do_head = do_ptr + q_start.to(tl.int64) * stride_dom + h * stride_doh
        row_head = h * step_lh + q_start
        bias_head = bias_ptr + z * step_bz + h * step_bh
        slope = tl.load(alibi_ptr + off_z * step_alibi_z + off_h) * 1.4426950408889634
        table_row = off_z * num_n + block
        start = tl.load(row_start_ptr + table_row)
        full_end = tl.load(row_full_ptr + table_row)
        end = tl.load(row_start_ptr + table_row + 1)
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
            full_end,
            row_index_ptr,
            seed,
            philox_offset,
            dropout_threshold,
            dropout_scale,
            qk_scale,
            softcap,
            bias_head,
            step_bm,
            slope,
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            mask1_q_ids_ptr,
            mask1_q_ids_size0,
            mask1_kv_ids_ptr,
            mask1_kv_ids_size0,
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
            full_end,
            end,
            row_index_ptr,
            seed,
            philox_offset,
            dropout_threshold,
            dropout_scale,
            qk_scale,
            softcap,
            bias_head,
            step_bm,
            slope,
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            mask1_q_ids_ptr,
            mask1_q_ids_size0,
            mask1_kv_ids_ptr,
            mask1_kv_ids_size0,
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
    dk_ptr += k_start.to(tl.int64) * stride_dkn + hkv * stride_dkh
    dv_ptr += k_start.to(tl.int64) * stride_dvn + hkv * stride_dvh
    dk = (dk * softmax_scale).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dv_ptr.dtype.element_ty)
    store_tile(
        dk_ptr,
        stride_dkn,
        start_n,
        keys_k,
        dk,
        BLOCK_N1,
        HEAD_DIM_QK,
        BLOCK_DQK,
    )
    store_tile(
        dv_ptr,
        stride_dvn,
        start_n,
        keys_k,
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
    tile_index_ptr,
    seed,
    philox_offset,
    dropout_threshold,
    dropout_scale,
    qk_scale,
    softcap,
    bias_ptr,
    step_bm,
    slope,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
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
    """Add what the key tiles [start_n, end_n) of the table give to dQ of a query tile."""
    for tile in range(start_n, end_n):
        n = tl.load(tile_index_ptr + tile) * BLOCK_N2
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
        p, slope_qk = probabilities(
            qk,
            lse2[:, None],
            off_z,
            off_h,
            offs_m[:, None],
            offs_n[None, :],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            bias_ptr,
            step_bm,
            slope,
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            mask1_q_ids_ptr,
            mask1_q_ids_size0,
            mask1_kv_ids_ptr,
            mask1_kv_ids_size0,
            MASKED,
        )
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        keep = dropout_keep(
            seed,
            philox_offset,
            off_zh,
            offs_m,
            n,
            dropout_threshold,
            BLOCK_N2,
        )
        dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        # Where nothing is seen, the derivative may be anything.
        ds = tl.where(p > 0.0, ds * slope_qk, 0.0)
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
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_doh,
    stride_dom,
    stride_dqh,
    stride_dqm,
    qk_scale,
    softmax_scale,
    num_heads_total,
    nheads_q,
    group,
    max_seqlen_q,
    head_group,
    softcap,
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    alibi_ptr,
    step_alibi_z,
    rng_ptr,
    dropout_threshold,
    dropout_scale,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    step_lh,
    seqused_q_ptr,
    seqused_k_ptr,
    tile_start_ptr,
    tile_full_ptr,
    tile_index_ptr,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
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
    num_m = tl.cdiv(max_seqlen_q, BLOCK_M2)
    first_head = tile // (head_group * group * num_m) * head_group * group
    heads = tl.minimum(head_group * group, num_heads_total - first_head)
    rank = tile - first_head * num_m
    off_zh = first_head + rank % heads
    off_z = off_zh // nheads_q
    off_h = off_zh % nheads_q
    off_hkv = off_h // group
    block = rank // heads
    block = num_m - 1 - block
    start_m = block * BLOCK_M2
    offs_m = start_m + tl.arange(0, BLOCK_M2)
    q_start = tl.load(cu_seqlens_q_ptr + off_z)
    k_start = tl.load(cu_seqlens_k_ptr + off_z)
    SEQLEN_Q = tl.load(cu_seqlens_q_ptr + off_z + 1) - q_start
    SEQLEN_K = tl.load(cu_seqlens_k_ptr + off_z + 1) - k_start
    if start_m >= SEQLEN_Q:
        return
    rows_q = SEQLEN_Q
    SEQLEN_Q = tl.minimum(tl.load(seqused_q_ptr + off_z), SEQLEN_Q)
    SEQLEN_K = tl.minimum(tl.load(seqused_k_ptr + off_z), SEQLEN_K)
    z = off_z.to(tl.int64)
    h = off_h.to(tl.int64)
    hkv = off_hkv.to(tl.int64)
    q_ptr += q_start.to(tl.int64) * stride_qm + h * stride_qh
    k_ptr += k_start.to(tl.int64) * stride_kn + hkv * stride_kh
    v_ptr += k_start.to(tl.int64) * stride_vn + hkv * stride_vh
    do_ptr += q_start.to(tl.int64) * stride_dom + h * stride_doh
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
    row_head = h * step_lh + q_start
    rows = row_head + offs_m
    inside = offs_m < SEQLEN_Q
    lse2 = tl.load(lse2_ptr + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    bias_ptr += z * step_bz + h * step_bh
    slope = tl.load(alibi_ptr + off_z * step_alibi_z + off_h) * 1.4426950408889634
    seed = tl.load(rng_ptr)
    philox_offset = tl.load(rng_ptr + 1)
    dq = tl.zeros([BLOCK_M2, BLOCK_DQK], dtype=tl.float32)

    # Main loop: key tiles that every row sees, and those that need the mask.
    table_row = off_z * num_m + block
    start = tl.load(tile_start_ptr + table_row)
    full_end = tl.load(tile_full_ptr + table_row)
    end = tl.load(tile_start_ptr + table_row + 1)
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
        start,
        full_end,
        tile_index_ptr,
        seed,
        philox_offset,
        dropout_threshold,
        dropout_scale,
        qk_scale,
        softcap,
        bias_ptr,
        step_bm,
        slope,
        score_w_ptr,
        score_w_size0,
        score_w_size1,
        mask1_q_ids_ptr,
        mask1_q_ids_size0,
        mask1_kv_ids_ptr,
        mask1_kv_ids_size0,
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
        tile_index_ptr,
        seed,
        philox_offset,
        dropout_threshold,
        dropout_scale,
        qk_scale,
        softcap,
        bias_ptr,
        step_bm,
        slope,
        score_w_ptr,
        score_w_size0,
        score_w_size1,
        mask1_q_ids_ptr,
        mask1_q_ids_size0,
        mask1_kv_ids_ptr,
        mask1_kv_ids_size0,
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
    dq_ptr += q_start.to(tl.int64) * stride_dqm + h * stride_dqh
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    store_tile(
        dq_ptr,
        stride_dqm,
        start_m,
        rows_q,
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
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_doh,
    stride_dom,
    qk_scale,
    batch,
    nheads_q,
    group,
    bias_batch,
    bias_heads,
    bias_rows,
    bias_keys,
    softcap,
    bias_ptr,
    step_bz,
    step_bh,
    step_bm,
    alibi_ptr,
    step_alibi_z,
    rng_ptr,
    dropout_threshold,
    dropout_scale,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    step_lh,
    seqused_q_ptr,
    seqused_k_ptr,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    mask1_q_ids_ptr,
    mask1_q_ids_size0,
    mask1_kv_ids_ptr,
    mask1_kv_ids_size0,
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
    seed = tl.load(rng_ptr)
    philox_offset = tl.load(rng_ptr + 1)

    # Main loop: every place that the tile was added at.
    for off_z in range(own_z, last_z):
        # The interpreter counts in Python's numbers, which users' functions cannot take.
        off_z = tl.cast(off_z, tl.int32)
        q_start = tl.load(cu_seqlens_q_ptr + off_z)
        k_start = tl.load(cu_seqlens_k_ptr + off_z)
        used_q = tl.load(cu_seqlens_q_ptr + off_z + 1) - q_start
        used_k = tl.load(cu_seqlens_k_ptr + off_z + 1) - k_start
        used_q = tl.minimum(tl.load(seqused_q_ptr + off_z), used_q)
        used_k = tl.minimum(tl.load(seqused_k_ptr + off_z), used_k)
        z = tl.cast(off_z, tl.int64)
        last_m = tl.where(bias_rows == 1, used_q, tl.minimum(own_m + 1, used_q))
        last_n = tl.where(bias_keys == 1, used_k, tl.minimum(own_n + 1, used_k))
        for off_h in range(own_h, last_h):
            off_h = tl.cast(off_h, tl.int32)
            off_zh = off_z * nheads_q + off_h
            h = tl.cast(off_h, tl.int64)
            hkv = h // group
            row_head = h * step_lh + q_start
            bias_head = bias_ptr + z * step_bz + h * step_bh
            slope = tl.load(alibi_ptr + off_z * step_alibi_z + off_h)
            slope = slope * 1.4426950408889634
            q_head = q_ptr + q_start.to(tl.int64) * stride_qm + h * stride_qh
            do_head = do_ptr + q_start.to(tl.int64) * stride_dom + h * stride_doh
            k_head = k_ptr + k_start.to(tl.int64) * stride_kn + hkv * stride_kh
            v_head = v_ptr + k_start.to(tl.int64) * stride_vn + hkv * stride_vh
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
                    p, _slope_qk = probabilities(
                        qk,
                        lse2[:, None],
                        off_z,
                        off_h,
                        offs_m[:, None],
                        n + tl.arange(0, BLOCK_N1)[None, :],
                        used_q,
                        used_k,
                        qk_scale,
                        softcap,
                        bias_head,
                        step_bm,
                        slope,
                        score_w_ptr,
                        score_w_size0,
                        score_w_size1,
                        mask1_q_ids_ptr,
                        mask1_q_ids_size0,
                        mask1_kv_ids_ptr,
                        mask1_kv_ids_size0,
                        True,
                    )
                    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                    keep = dropout_keep(
                        seed,
                        philox_offset,
                        off_zh,
                        offs_m,
                        n,
                        dropout_threshold,
                        BLOCK_N1,
                    )
                    dp = tl.where(keep, dp * dropout_scale, 0.0)
                    total += p * (dp - delta[:, None])

    # Epilogue: a single row, or a single key, takes the sum of all.
    total = tl.where(bias_rows == 1, tl.sum(total, 0)[None, :], total)
    total = tl.where(bias_keys == 1, tl.sum(total, 1)[:, None], total)
    offs_m = own_m + tl.arange(0, BLOCK_M1)[:, None]
    offs_n = own_n + tl.arange(0, BLOCK_N1)[None, :]
    ptrs = dbias_ptr + (own_zh.to(tl.int64) * bias_rows + offs_m) * bias_keys + offs_n
    inside = (offs_m < bias_rows) & (offs_n < bias_keys)
    tl.store(ptrs, total, mask=inside)
