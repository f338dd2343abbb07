"""attn_decode: (causal) & (chunked(chunk_size)) mask with lse with score_mod with softcap with alibi with sinks with append with rotary_fp32 with leftpad with batch_idx with rotary=pairs, pointer loads.

Rendered by flashgen from templates/triton/decode.py.jinja.
"""

import triton
import triton.language as tl

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; m_i row maximum, l_i row sum, acc unnormalised
# output, alpha rescale of both after a new maximum. Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse is turned back to natural log at the end.
# A tile has BLOCK_M rows: query i of head g of the group is row i * group + g. A unit is
# `step` key tiles of a tile of rows. Teams of `lanes` programs take units in order, over
# sequences; each program of a team has tiles of its own, and the same keys as the others.


@triton.jit
def mask_causal(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: the last row sees the last key."""
    return kv_idx <= q_idx + (SEQLEN_K - SEQLEN_Q)


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
def mask_mod(
    b,
    h,
    q_idx,
    kv_idx,
    SEQLEN_Q,
    SEQLEN_K,
    chunk_size,
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
    chunked = mask_chunked(
        b,
        h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
        chunk_size,
    )
    seen_0 = causal & chunked
    return seen_0


@triton.jit
def bounds_causal(start_m, SEQLEN_Q, SEQLEN_K, BLOCK_M):
    """Where the keys end that every row of the tile sees, and those that some row does."""
    diagonal = start_m + 1 + (SEQLEN_K - SEQLEN_Q)
    return diagonal, diagonal + BLOCK_M - 1


@triton.jit
def bounds_chunked(
    start_m,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M,
    chunk_size,
):
    """The keys that every row of the tile sees, within those that some row does."""
    first_own = start_m + (SEQLEN_K - SEQLEN_Q)
    last_own = first_own + BLOCK_M - 1
    # Division rounds to zero: positions before the first key see nothing.
    first = tl.maximum(first_own, 0) // chunk_size * chunk_size
    all_first = tl.maximum(last_own, 0) // chunk_size * chunk_size
    last = tl.where(last_own < 0, 0, all_first + chunk_size)
    all_last = tl.where(first_own < 0, 0, first + chunk_size)
    return first, all_first, all_last, last


@triton.jit
def kv_bounds(
    start_m,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M,
    BLOCK_N,
    chunk_size,
):
    """Keys [full_start, full_end) are seen by all rows of the tile, [start, end) by some."""
    lo, full_lo = 0, 0
    full_hi, hi = SEQLEN_K, SEQLEN_K
    all_last, last = bounds_causal(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M,
    )
    full_hi = tl.minimum(full_hi, all_last)
    hi = tl.minimum(hi, last)
    first, all_first, all_last, last = bounds_chunked(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M,
        chunk_size,
    )
    lo = tl.maximum(lo, first)
    full_lo = tl.maximum(full_lo, all_first)
    full_hi = tl.minimum(full_hi, all_last)
    hi = tl.minimum(hi, last)
    end = tl.maximum(hi, 0)
    full_end = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N
    start = lo // BLOCK_N * BLOCK_N
    full_start = tl.cdiv(full_lo, BLOCK_N) * BLOCK_N
    # Where no tile is seen whole, the last loop walks all of them.
    none = full_end <= full_start
    full_start = tl.where(none, start, full_start)
    full_end = tl.where(none, start, full_end)
    return start, full_start, full_end, end


@triton.jit
def sequence_parts(
    z,
    batch,
    SEQLEN_Q,
    splits,
    min_blocks,
    BLOCK_N: tl.constexpr,
    cache_seqlens_ptr,
    seqlen_new,
    cache_leftpad_ptr,
    chunk_size,
):
    """Length of a sequence, its first key and key tiles, key tiles of a unit, units of a tile of rows."""
    length = tl.load(cache_seqlens_ptr + z, mask=z < batch, other=0)
    length += seqlen_new
    start, _, _, end = kv_bounds(
        0,
        SEQLEN_Q,
        length,
        SEQLEN_Q,
        BLOCK_N,
        chunk_size,
    )
    # New keys are no part of the tiles: the last part of a tile of rows has them, too.
    end = tl.minimum(end, length - seqlen_new)
    pad = tl.load(cache_leftpad_ptr + z, mask=z < batch, other=0)
    start = tl.maximum(start, pad // BLOCK_N * BLOCK_N)
    blocks = tl.maximum(tl.cdiv(end - start, BLOCK_N), 1)
    # splits == 0: units of one key tile, divided evenly; else so many units for every tile of rows.
    step = blocks * 0 + 1
    units = blocks
    if splits > 0:
        step = tl.maximum(tl.cdiv(blocks, splits), min_blocks)
        units = tl.cdiv(blocks, step)
    return length, start, blocks, step, tl.where(z < batch, units, 0)


@triton.jit
def cache_rows(offs_n, stride_n):
    """Where keys lie in the cache of their sequence."""
    return offs_n.to(tl.int64) * stride_n


@triton.jit
def load_rows(
    ptr,
    rows,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows at these offsets from ptr, zero where they are not inside, and past the head dimension."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] + offs_d[None, :]
    inside = inside[:, None]
    if CHECK_ROWS and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=inside & (offs_d[None, :] < HEAD_DIM), other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rotated(
    ptr,
    rows,
    inside,
    positions,
    rotary_cos_ptr,
    rotary_sin_ptr,
    step_rotary,
    rotary_dim,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows at these offsets, from column FIRST on, turned by the angles of their positions."""
    offs_d = FIRST + tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None]
    inside = inside[:, None]
    is_column = offs_d[None, :] < HEAD_DIM
    x = tl.load(ptrs + offs_d[None, :], mask=inside & is_column, other=0.0)
    half = rotary_dim // 2
    angles = positions.to(tl.int64)[:, None] * step_rotary
    angle = FIRST // 2 + tl.arange(0, BLOCK_D // 2)
    turned = inside & (angle[None, :] < half)
    angles += angle[None, :]
    cos = tl.load(rotary_cos_ptr + angles, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(rotary_sin_ptr + angles, mask=turned, other=0.0).to(tl.float32)
    even, odd = tl.split(x.to(tl.float32).reshape(x.shape[0], BLOCK_D // 2, 2))
    pairs = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return pairs.reshape(x.shape[0], BLOCK_D).to(x.dtype)


@triton.jit
def store_rows(
    ptr,
    rows,
    inside,
    tile,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows at these offsets from ptr, none that is not inside, nothing past the head dimension."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] + offs_d[None, :]
    tl.store(ptrs, tile, mask=inside[:, None] & (offs_d[None, :] < HEAD_DIM))


@triton.jit
def write_out(
    acc,
    l_i,
    ptr,
    rows,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise and write; a row that saw no key gives 0."""
    norm = tl.where(l_i == 0.0, 1.0, l_i)
    out = (acc / norm[:, None]).to(ptr.dtype.element_ty)
    store_rows(ptr, rows, inside, out, HEAD_DIM, BLOCK_D)


@triton.jit
def natural_lse(l_i, m_i):
    """Log-sum-exp of rows; -inf of one that saw no key."""
    return (m_i + tl.math.log2(l_i)) * 0.6931471805599453


@triton.jit
def store_partial(
    acc,
    acc_1,
    l_i,
    m_i,
    partial_ptr,
    slot,
    is_row,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Leave the output of some keys of a tile of rows, and its log-sum-exp, for those that merge."""
    offs_m = tl.arange(0, BLOCK_M)
    rows = slot.to(tl.int64) * BLOCK_M + offs_m
    lse2_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * 2 * BLOCK_M * HEAD_DIM_V
    tl.store(lse2_ptr + rows, m_i + tl.math.log2(l_i), mask=is_row)
    norm = tl.where(l_i == 0.0, 1.0, l_i)
    offs_d = tl.arange(0, BLOCK_DV)
    ptrs = partial_ptr + rows[:, None] * HEAD_DIM_V + offs_d[None, :]
    inside = is_row[:, None] & (offs_d[None, :] < HEAD_DIM_V)
    tl.store(ptrs, acc / norm[:, None], mask=inside)
    offs_d = tl.arange(0, BLOCK_DV_1)
    ptrs = partial_ptr + rows[:, None] * HEAD_DIM_V + offs_d[None, :] + BLOCK_DV
    inside = is_row[:, None] & (offs_d[None, :] < HEAD_DIM_V - BLOCK_DV)
    tl.store(ptrs, acc_1 / norm[:, None], mask=inside)


@triton.jit
def merge_partials(
    partial_ptr,
    first_program,
    last_program,
    lanes,
    first_slot,
    row,
    end_row,
    column,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Output and log-sum-exp over all that the programs of a tile left, some rows and columns: always in one order."""
    offs_m = row + tl.arange(0, ROWS)
    offs_d = column + tl.arange(0, COLUMNS)
    lse2_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * 2 * BLOCK_M * HEAD_DIM_V
    m_i = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(first_program, last_program + 1, PARTS * lanes, num_stages=1):
        # No load waits for what another one brings.
        lse2 = ()
        parts = ()
        for i in tl.static_range(PARTS):
            program = start + i * lanes
            slot = tl.where(program == first_program, first_slot, 2 * program)
            rows = slot.to(tl.int64) * BLOCK_M + offs_m
            there = tl.where(program <= last_program, offs_m < end_row, False)
            of_rows = tl.load(
                lse2_ptr + rows,
                mask=there,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            lse2 = lse2 + (of_rows,)
            ptrs = partial_ptr + rows[:, None] * HEAD_DIM_V + offs_d[None, :]
            inside = there[:, None] & (offs_d[None, :] < HEAD_DIM_V)
            part = tl.load(ptrs, mask=inside, other=0.0, cache_modifier=".cg")
            parts = parts + (part,)
        m_new = m_i
        for i in tl.static_range(PARTS):
            m_new = tl.maximum(m_new, lse2[i])
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.math.exp2(m_i - m_safe)
        l_i = l_i * alpha
        acc = acc * alpha[:, None]
        for i in tl.static_range(PARTS):
            beta = tl.math.exp2(lse2[i] - m_safe)
            l_i += beta
            acc += parts[i] * beta[:, None]
        m_i = m_new
    norm = tl.where(l_i == 0.0, 1.0, l_i)
    return acc / norm[:, None], m_i + tl.math.log2(l_i)


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
def softmax_step(
    l_i,
    m_i,
    qk,
    visible,
    MASKED: tl.constexpr,
):
    """Online softmax over one key tile (FlashAttention-2, algorithm 1), in base 2."""
    if MASKED:
        qk = tl.where(visible, qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    # A row that has seen no key yet keeps -inf; subtracting it would give NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(qk - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    return p, alpha, l_i, m_new


@triton.jit
def attend(
    acc,
    acc_1,
    l_i,
    m_i,
    q,
    q_1,
    start_n,
    end_n,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    cached,
    pad,
    off_z,
    off_h,
    q_idx,
    SEQLEN_Q,
    SEQLEN_K,
    qk_scale,
    softcap,
    slope,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    chunk_size,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DQK_1: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to the keys [start_n, end_n) of the cache: all visible, or MASKED key by key."""
    for n in tl.range(start_n, end_n, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(n, BLOCK_N)
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = offs_n < cached
        # Padding may hold anything, NaN too, of which 0 times is no 0.
        inside = inside & (offs_n >= pad)
        k_rows = cache_rows(offs_n, stride_kn)
        k = load_rows(
            k_ptr,
            k_rows,
            inside,
            HEAD_DIM_QK,
            BLOCK_DQK,
            MASKED,
        )

        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        k_1 = load_rows(
            k_ptr + BLOCK_DQK,
            k_rows,
            inside,
            HEAD_DIM_QK - BLOCK_DQK,
            BLOCK_DQK_1,
            MASKED,
        )

        qk = tl.dot(q_1, tl.trans(k_1), qk, input_precision="ieee")
        kv_idx = offs_n[None, :]
        qk = qk * qk_scale
        qk = softcap_score(qk, softcap)
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
        qk -= slope * tl.abs(q_idx + (SEQLEN_K - SEQLEN_Q) - kv_idx)
        visible = None
        if MASKED:
            visible = mask_mod(
                off_z,
                off_h,
                q_idx,
                kv_idx,
                SEQLEN_Q,
                SEQLEN_K,
                chunk_size,
            )
            visible = visible & (kv_idx < cached)
            visible = visible & (kv_idx >= pad)

        v_rows = cache_rows(offs_n, stride_vn)
        v = load_rows(
            v_ptr,
            v_rows,
            inside,
            HEAD_DIM_V,
            BLOCK_DV,
            MASKED,
        )

        v_1 = load_rows(
            v_ptr + BLOCK_DV,
            v_rows,
            inside,
            HEAD_DIM_V - BLOCK_DV,
            BLOCK_DV_1,
            MASKED,
        )

        p, alpha, l_i, m_i = softmax_step(
            l_i,
            m_i,
            qk,
            visible,
            MASKED,
        )
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        acc_1 = acc_1 * alpha[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")
    return acc, acc_1, l_i, m_i


@triton.jit
def attend_new(
    acc,
    acc_1,
    l_i,
    m_i,
    q,
    q_1,
    end_new,
    k_new_ptr,
    v_new_ptr,
    stride_k_new_n,
    stride_v_new_n,
    rotary_cos_ptr,
    rotary_sin_ptr,
    step_rotary,
    rotary_dim,
    cached,
    pad,
    off_z,
    off_h,
    q_idx,
    SEQLEN_Q,
    SEQLEN_K,
    qk_scale,
    softcap,
    slope,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    chunk_size,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DQK_1: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_1: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the first end_new keys that come with the call, behind those of the cache."""
    for first_new in tl.range(0, end_new, BLOCK_NEW, num_stages=1):
        offs_new = first_new + tl.arange(0, BLOCK_NEW)
        is_new = offs_new < end_new
        places = cached + offs_new
        new_rows = offs_new.to(tl.int64) * stride_k_new_n
        k = load_rotated(
            k_new_ptr,
            new_rows,
            is_new,
            places,
            rotary_cos_ptr,
            rotary_sin_ptr,
            step_rotary,
            rotary_dim,
            0,
            HEAD_DIM_QK,
            BLOCK_DQK,
        )
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        k_1 = load_rotated(
            k_new_ptr,
            new_rows,
            is_new,
            places,
            rotary_cos_ptr,
            rotary_sin_ptr,
            step_rotary,
            rotary_dim,
            BLOCK_DQK,
            HEAD_DIM_QK,
            BLOCK_DQK_1,
        )
        qk = tl.dot(q_1, tl.trans(k_1), qk, input_precision="ieee")
        kv_idx = places[None, :]
        qk = qk * qk_scale
        qk = softcap_score(qk, softcap)
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
        qk -= slope * tl.abs(q_idx + (SEQLEN_K - SEQLEN_Q) - kv_idx)
        visible = None
        if MASKED:
            visible = mask_mod(
                off_z,
                off_h,
                q_idx,
                kv_idx,
                SEQLEN_Q,
                SEQLEN_K,
                chunk_size,
            )
            visible = visible & (kv_idx < SEQLEN_K)
            visible = visible & (kv_idx >= pad)

        new_rows = offs_new.to(tl.int64) * stride_v_new_n
        v = load_rows(
            v_new_ptr,
            new_rows,
            is_new,
            HEAD_DIM_V,
            BLOCK_DV,
            True,
        )
        v_1 = load_rows(
            v_new_ptr + BLOCK_DV,
            new_rows,
            is_new,
            HEAD_DIM_V - BLOCK_DV,
            BLOCK_DV_1,
            True,
        )
        p, alpha, l_i, m_i = softmax_step(
            l_i,
            m_i,
            qk,
            visible,
            MASKED,
        )
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        acc_1 = acc_1 * alpha[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")
    return acc, acc_1, l_i, m_i


@triton.jit
def attn_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qz,
    stride_qh,
    stride_qm,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_oz,
    stride_oh,
    stride_om,
    qk_scale,
    batch,
    nheads_q,
    nheads_kv,
    group,
    SEQLEN_Q,
    splits,
    lanes,
    waits,
    min_blocks,
    cache_seqlens_ptr,
    partial_ptr,
    arrivals_ptr,
    softcap,
    alibi_ptr,
    step_alibi_z,
    sinks_ptr,
    cache_batch_idx_ptr,
    cache_leftpad_ptr,
    k_new_ptr,
    v_new_ptr,
    stride_k_new_z,
    stride_k_new_h,
    stride_k_new_n,
    stride_v_new_z,
    stride_v_new_h,
    stride_v_new_n,
    seqlen_new,
    rotary_cos_ptr,
    rotary_sin_ptr,
    step_rotary,
    rotary_dim,
    score_w_ptr,
    score_w_size0,
    score_w_size1,
    chunk_size,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DQK_1: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DV_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Prologue: which units are this program's, and of which sequence the first is.
    num_m = tl.cdiv(SEQLEN_Q * group, BLOCK_M)
    num_tiles = nheads_kv * num_m
    own_tiles = num_tiles // lanes
    team = tl.program_id(0) // lanes
    lane = tl.program_id(0) % lanes
    total = 0
    for z in range(0, batch, BLOCK_Z):
        units = sequence_parts(
            z + tl.arange(0, BLOCK_Z),
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
            seqlen_new,
            cache_leftpad_ptr,
            chunk_size,
        )[4]
        total += tl.sum(units, 0) * own_tiles
    share = 1
    if splits == 0:
        share = tl.maximum(tl.cdiv(total, tl.num_programs(0) // lanes), min_blocks)
    first_unit = team * share
    last_unit = tl.minimum(first_unit + share, total)
    off_z = 0
    before = 0
    passed = 0
    for z in range(0, tl.where(batch > 1, batch, 0), BLOCK_Z):
        units = sequence_parts(
            z + tl.arange(0, BLOCK_Z),
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
            seqlen_new,
            cache_leftpad_ptr,
            chunk_size,
        )[4]
        units = units * own_tiles
        ends = passed + tl.cumsum(units, 0)
        earlier = (ends <= first_unit) & (units > 0)
        off_z += tl.sum(earlier.to(tl.int32), 0)
        before += tl.sum(tl.where(earlier, units, 0), 0)
        passed += tl.sum(units, 0)

    unit = first_unit
    while unit < last_unit:
        # The next tile of rows, and which of its keys.
        SEQLEN_K, first_key, blocks, step, num_parts = sequence_parts(
            off_z,
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
            seqlen_new,
            cache_leftpad_ptr,
            chunk_size,
        )
        own_tile = (unit - before) // num_parts
        tile_unit = before + own_tile * num_parts
        tile = own_tile * lanes + lane
        part = unit - tile_unit
        parts = tl.minimum(num_parts - part, last_unit - unit)
        off_hkv = tile // num_m
        start_m = tile % num_m * BLOCK_M
        rows = start_m + tl.arange(0, BLOCK_M)
        is_row = rows < SEQLEN_Q * group
        offs_m = rows // group
        heads = off_hkv * group + rows % group
        begin = first_key + part * step * BLOCK_N
        stop = first_key + tl.minimum((part + parts) * step, blocks) * BLOCK_N
        off_b = off_z.to(tl.int64)
        cached = SEQLEN_K - seqlen_new
        pad = tl.load(cache_leftpad_ptr + off_z)
        q_rows = heads.to(tl.int64) * stride_qh + offs_m.to(tl.int64) * stride_qm
        q_rows += off_b * stride_qz
        q = load_rotated(
            q_ptr,
            q_rows,
            is_row,
            cached + offs_m,
            rotary_cos_ptr,
            rotary_sin_ptr,
            step_rotary,
            rotary_dim,
            0,
            HEAD_DIM_QK,
            BLOCK_DQK,
        )
        q_1 = load_rotated(
            q_ptr,
            q_rows,
            is_row,
            cached + offs_m,
            rotary_cos_ptr,
            rotary_sin_ptr,
            step_rotary,
            rotary_dim,
            BLOCK_DQK,
            HEAD_DIM_QK,
            BLOCK_DQK_1,
        )
        entry = tl.load(cache_batch_idx_ptr + off_z)
        k_head = k_ptr + off_hkv.to(tl.int64) * stride_kh
        k_head += entry.to(tl.int64) * stride_kz
        v_head = v_ptr + off_hkv.to(tl.int64) * stride_vh
        v_head += entry.to(tl.int64) * stride_vz
        k_new = k_new_ptr + off_hkv.to(tl.int64) * stride_k_new_h
        k_new += off_b * stride_k_new_z
        v_new = v_new_ptr + off_hkv.to(tl.int64) * stride_v_new_h
        v_new += off_b * stride_v_new_z
        slopes = alibi_ptr + off_z * step_alibi_z + heads
        slope = tl.load(slopes, mask=is_row, other=0.0) * 1.4426950408889634
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        acc_1 = tl.zeros([BLOCK_M, BLOCK_DV_1], dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        # The sink is one more logit: it starts the maximum and the sum of every row, once.
        sink = tl.load(sinks_ptr + heads, mask=is_row, other=0.0)
        m_i = tl.where(part == 0, sink * 1.4426950408889634, m_i)
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)

        # Main loop: key tiles that every row sees, and those that need the mask.
        first_m = start_m // group
        last_m = (tl.minimum(start_m + BLOCK_M, SEQLEN_Q * group) - 1) // group
        start, full_start, full_end, end = kv_bounds(
            first_m,
            SEQLEN_Q,
            SEQLEN_K,
            last_m - first_m + 1,
            BLOCK_N,
            chunk_size,
        )
        end = tl.minimum(end, cached)
        full_end = tl.minimum(full_end, cached // BLOCK_N * BLOCK_N)
        start = tl.maximum(start, pad // BLOCK_N * BLOCK_N)
        first_full = tl.cdiv(pad, BLOCK_N) * BLOCK_N
        full_start = tl.maximum(full_start, first_full)
        none = full_end < full_start
        full_start = tl.where(none, start, full_start)
        full_end = tl.where(none, start, full_end)
        acc, acc_1, l_i, m_i = attend(
            acc,
            acc_1,
            l_i,
            m_i,
            q,
            q_1,
            tl.maximum(begin, start),
            tl.minimum(stop, full_start),
            k_head,
            v_head,
            stride_kn,
            stride_vn,
            cached,
            pad,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            slope[:, None],
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            chunk_size,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DQK_1,
            BLOCK_DV,
            BLOCK_DV_1,
            BLOCK_N,
            True,
            2,
        )
        acc, acc_1, l_i, m_i = attend(
            acc,
            acc_1,
            l_i,
            m_i,
            q,
            q_1,
            tl.maximum(begin, full_start),
            tl.minimum(stop, full_end),
            k_head,
            v_head,
            stride_kn,
            stride_vn,
            cached,
            pad,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            slope[:, None],
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            chunk_size,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DQK_1,
            BLOCK_DV,
            BLOCK_DV_1,
            BLOCK_N,
            False,
            NUM_STAGES,
        )
        acc, acc_1, l_i, m_i = attend(
            acc,
            acc_1,
            l_i,
            m_i,
            q,
            q_1,
            tl.maximum(begin, full_end),
            tl.minimum(stop, end),
            k_head,
            v_head,
            stride_kn,
            stride_vn,
            cached,
            pad,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            slope[:, None],
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            chunk_size,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DQK_1,
            BLOCK_DV,
            BLOCK_DV_1,
            BLOCK_N,
            True,
            2,
        )
        acc, acc_1, l_i, m_i = attend_new(
            acc,
            acc_1,
            l_i,
            m_i,
            q,
            q_1,
            tl.where(part + parts == num_parts, seqlen_new, 0),
            k_new,
            v_new,
            stride_k_new_n,
            stride_v_new_n,
            rotary_cos_ptr,
            rotary_sin_ptr,
            step_rotary,
            rotary_dim,
            cached,
            pad,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            softcap,
            slope[:, None],
            score_w_ptr,
            score_w_size0,
            score_w_size1,
            chunk_size,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DQK_1,
            BLOCK_DV,
            BLOCK_DV_1,
            BLOCK_NEW,
            True,
        )

        # Epilogue: the programs of a tile merge what they left, a piece of it each.
        if parts == num_parts:
            out_rows = heads.to(tl.int64) * stride_oh + offs_m.to(tl.int64) * stride_om
            out_rows += off_b * stride_oz
            write_out(
                acc,
                l_i,
                out_ptr,
                out_rows,
                is_row,
                HEAD_DIM_V,
                BLOCK_DV,
            )
            write_out(
                acc_1,
                l_i,
                out_ptr + BLOCK_DV,
                out_rows,
                is_row,
                HEAD_DIM_V - BLOCK_DV,
                BLOCK_DV_1,
            )
            lse_rows = (off_b * nheads_q + heads) * SEQLEN_Q + offs_m
            tl.store(lse_ptr + lse_rows, natural_lse(l_i, m_i), mask=is_row)
        else:
            slot = 2 * tl.program_id(0) + (unit != first_unit).to(tl.int32)
            store_partial(
                acc,
                acc_1,
                l_i,
                m_i,
                partial_ptr,
                slot,
                is_row,
                HEAD_DIM_V,
                BLOCK_DV,
                BLOCK_DV_1,
                BLOCK_M,
            )
            tl.debug_barrier()
            arrivals = arrivals_ptr + off_z * num_tiles + tile
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            first_team = tile_unit // share
            last_team = (tile_unit + num_parts - 1) // share
            others = last_team - first_team
            # Alone, the last to arrive merges. Where all programs run at once (`waits`), those that
            # have nothing else to do wait for the others: the last one, too, if it ends here.
            merges = arrived == others
            member = 0
            members = 1
            if waits != 0:
                merges = unit + parts == last_unit
                member = team - first_team
                last_end = tl.minimum((last_team + 1) * share, total)
                members = others + (last_end == tile_unit + num_parts).to(tl.int32)
                if merges:
                    while arrived < others:
                        arrived = tl.atomic_add(arrivals, 0, sem="acquire") - 1
            if merges:
                # A program leaves two outputs at most: of its first tile, and of its last one.
                is_second = first_team * share < tile_unit
                first_program = first_team * lanes + lane
                first_slot = 2 * first_program + is_second.to(tl.int32)
                end_row = tl.minimum(SEQLEN_Q * group - start_m, BLOCK_M)
                pieces = tl.cdiv(end_row, MERGED_ROWS) * (BLOCK_DV // MERGED_COLUMNS)
                for piece in tl.range(member, pieces, members, num_stages=1):
                    row = piece // (BLOCK_DV // MERGED_COLUMNS) * MERGED_ROWS
                    column = piece % (BLOCK_DV // MERGED_COLUMNS) * MERGED_COLUMNS
                    out, lse2 = merge_partials(
                        partial_ptr,
                        first_program,
                        last_team * lanes + lane,
                        lanes,
                        first_slot,
                        row,
                        end_row,
                        column,
                        HEAD_DIM_V,
                        BLOCK_M,
                        MERGED_PARTS,
                        MERGED_ROWS,
                        MERGED_COLUMNS,
                    )
                    offs_r = row + tl.arange(0, MERGED_ROWS)
                    offs_d = column + tl.arange(0, MERGED_COLUMNS)
                    is_merged = offs_r < end_row
                    m_merged = (start_m + offs_r) // group
                    h_merged = off_hkv * group + (start_m + offs_r) % group
                    to_rows = off_b * stride_oz + h_merged.to(tl.int64) * stride_oh
                    to_rows += m_merged.to(tl.int64) * stride_om
                    tl.store(
                        out_ptr + to_rows[:, None] + offs_d[None, :],
                        out.to(out_ptr.dtype.element_ty),
                        mask=is_merged[:, None] & (offs_d[None, :] < HEAD_DIM_V),
                    )
                    if column == 0:
                        lse = lse2 * 0.6931471805599453
                        to_lse = (off_b * nheads_q + h_merged) * SEQLEN_Q + m_merged
                        tl.store(lse_ptr + to_lse, lse, mask=is_merged)
                pieces = tl.cdiv(end_row, MERGED_ROWS) * (BLOCK_DV_1 // MERGED_COLUMNS)
                for piece in tl.range(member, pieces, members, num_stages=1):
                    row = piece // (BLOCK_DV_1 // MERGED_COLUMNS) * MERGED_ROWS
                    column = piece % (BLOCK_DV_1 // MERGED_COLUMNS) * MERGED_COLUMNS
                    out, lse2 = merge_partials(
                        partial_ptr,
                        first_program,
                        last_team * lanes + lane,
                        lanes,
                        first_slot,
                        row,
                        end_row,
                        column + BLOCK_DV,
                        HEAD_DIM_V,
                        BLOCK_M,
                        MERGED_PARTS,
                        MERGED_ROWS,
                        MERGED_COLUMNS,
                    )
                    offs_r = row + tl.arange(0, MERGED_ROWS)
                    offs_d = column + tl.arange(0, MERGED_COLUMNS) + BLOCK_DV
                    is_merged = offs_r < end_row
                    m_merged = (start_m + offs_r) // group
                    h_merged = off_hkv * group + (start_m + offs_r) % group
                    to_rows = off_b * stride_oz + h_merged.to(tl.int64) * stride_oh
                    to_rows += m_merged.to(tl.int64) * stride_om
                    tl.store(
                        out_ptr + to_rows[:, None] + offs_d[None, :],
                        out.to(out_ptr.dtype.element_ty),
                        mask=is_merged[:, None] & (offs_d[None, :] < HEAD_DIM_V),
                    )
                # The last to leave sets the counter back for the next launch.
                left = others + members
                if waits != 0:
                    left = tl.atomic_add(arrivals, 1, sem="relaxed")
                if left == others + members:
                    tl.store(arrivals, 0)
        # Nobody reads in the cache what is written here: new keys are taken from the call.
        if (start_m == 0) & (part == 0):
            for first_new in tl.range(0, seqlen_new, BLOCK_NEW, num_stages=1):
                offs_new = first_new + tl.arange(0, BLOCK_NEW)
                is_new = offs_new < seqlen_new
                places = cached + offs_new
                new_rows = offs_new.to(tl.int64) * stride_k_new_n
                k_rows = cache_rows(places, stride_kn)
                new = load_rotated(
                    k_new,
                    new_rows,
                    is_new,
                    places,
                    rotary_cos_ptr,
                    rotary_sin_ptr,
                    step_rotary,
                    rotary_dim,
                    0,
                    HEAD_DIM_QK,
                    BLOCK_DQK,
                )
                store_rows(
                    k_head,
                    k_rows,
                    is_new,
                    new,
                    HEAD_DIM_QK,
                    BLOCK_DQK,
                )
                new = load_rotated(
                    k_new,
                    new_rows,
                    is_new,
                    places,
                    rotary_cos_ptr,
                    rotary_sin_ptr,
                    step_rotary,
                    rotary_dim,
                    BLOCK_DQK,
                    HEAD_DIM_QK,
                    BLOCK_DQK_1,
                )
                store_rows(
                    k_head + BLOCK_DQK,
                    k_rows,
                    is_new,
                    new,
                    HEAD_DIM_QK - BLOCK_DQK,
                    BLOCK_DQK_1,
                )
                new_rows = offs_new.to(tl.int64) * stride_v_new_n
                v_rows = cache_rows(places, stride_vn)
                new = load_rows(
                    v_new,
                    new_rows,
                    is_new,
                    HEAD_DIM_V,
                    BLOCK_DV,
                    True,
                )
                store_rows(
                    v_head,
                    v_rows,
                    is_new,
                    new,
                    HEAD_DIM_V,
                    BLOCK_DV,
                )
                new = load_rows(
                    v_new + BLOCK_DV,
                    new_rows,
                    is_new,
                    HEAD_DIM_V - BLOCK_DV,
                    BLOCK_DV_1,
                    True,
                )
                store_rows(
                    v_head + BLOCK_DV,
                    v_rows,
                    is_new,
                    new,
                    HEAD_DIM_V - BLOCK_DV,
                    BLOCK_DV_1,
                )
        unit += parts
        if unit == before + own_tiles * num_parts:
            before = unit
            off_z += 1
