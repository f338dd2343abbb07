"""attn_fwd: full mask, pointer loads.

Rendered by flashgen from templates/triton/forward.py.jinja.
"""

import triton
import triton.language as tl

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; m_i row maximum, l_i row sum, acc unnormalised
# output, alpha rescale of both after a new maximum. Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse is turned back to natural log at the end.


@triton.jit
def mask_mod(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: every key there is."""
    return kv_idx < SEQLEN_K


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
def softmax_step(
    l_i,
    m_i,
    qk,
    qk_scale,
    visible,
    MASKED: tl.constexpr,
):
    """Online softmax over one key tile (FlashAttention-2, algorithm 1), in base 2."""
    if MASKED:
        qk = tl.where(visible, qk * qk_scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        # A row that has seen no key yet keeps -inf; subtracting it would give NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(qk - m_safe[:, None])
        alpha = tl.math.exp2(m_i - m_safe)
    else:
        m_new = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
        p = tl.math.exp2(qk * qk_scale - m_new[:, None])
        alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    return p, alpha, l_i, m_new


@triton.jit
def attend(
    acc,
    l_i,
    m_i,
    q,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    off_z,
    off_h,
    off_hkv,
    offs_m,
    start_n,
    end_n,
    qk_scale,
    SEQLEN_Q,
    SEQLEN_K,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the keys [start_n, end_n): all visible, or MASKED key by key."""
    for n in range(start_n, end_n, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        k = load_tile(
            k_ptr,
            stride_kn,
            n,
            SEQLEN_K,
            BLOCK_N,
            HEAD_DIM_QK,
            BLOCK_DQK,
            MASKED,
        )
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        q_idx = offs_m[:, None]
        kv_idx = n + tl.arange(0, BLOCK_N)[None, :]
        visible = None
        if MASKED:
            visible = mask_mod(
                off_z,
                off_h,
                q_idx,
                kv_idx,
                SEQLEN_Q,
                SEQLEN_K,
            )
        v = load_tile(
            v_ptr,
            stride_vn,
            n,
            SEQLEN_K,
            BLOCK_N,
            HEAD_DIM_V,
            BLOCK_DV,
            MASKED,
        )
        p, alpha, l_i, m_i = softmax_step(
            l_i,
            m_i,
            qk,
            qk_scale,
            visible,
            MASKED,
        )
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, l_i, m_i


@triton.jit
def attn_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
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
    num_heads_total,
    nheads_q,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    head_group,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Prologue: which tile, and its queries. Tiles go out in groups of head_group heads.
    tile = tl.program_id(0)
    num_m = tl.cdiv(SEQLEN_Q, BLOCK_M)
    first_head = tile // (head_group * num_m) * head_group
    heads = tl.minimum(head_group, num_heads_total - first_head)
    rank = tile - first_head * num_m
    off_zh = first_head + rank % heads
    off_z = off_zh // nheads_q
    off_h = off_zh % nheads_q
    off_hkv = off_h // group
    block = rank // heads
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    h = off_h.to(tl.int64)
    hkv = off_hkv.to(tl.int64)
    z = off_z.to(tl.int64)
    q_ptr += z * stride_qz + h * stride_qh
    k_ptr += z * stride_kz + hkv * stride_kh
    v_ptr += z * stride_vz + hkv * stride_vh
    out_ptr += z * stride_oz + h * stride_oh
    q = load_tile(
        q_ptr,
        stride_qm,
        start_m,
        SEQLEN_Q,
        BLOCK_M,
        HEAD_DIM_QK,
        BLOCK_DQK,
        True,
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    # Main loop: key tiles that every row sees, and those that need the mask.
    full_end, end = kv_bounds(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M,
        BLOCK_N,
    )
    acc, l_i, m_i = attend(
        acc,
        l_i,
        m_i,
        q,
        k_ptr,
        v_ptr,
        stride_kn,
        stride_vn,
        off_z,
        off_h,
        off_hkv,
        offs_m,
        0,
        full_end,
        qk_scale,
        SEQLEN_Q,
        SEQLEN_K,
        HEAD_DIM_QK,
        HEAD_DIM_V,
        BLOCK_DQK,
        BLOCK_DV,
        BLOCK_N,
        False,
    )
    acc, l_i, m_i = attend(
        acc,
        l_i,
        m_i,
        q,
        k_ptr,
        v_ptr,
        stride_kn,
        stride_vn,
        off_z,
        off_h,
        off_hkv,
        offs_m,
        full_end,
        end,
        qk_scale,
        SEQLEN_Q,
        SEQLEN_K,
        HEAD_DIM_QK,
        HEAD_DIM_V,
        BLOCK_DQK,
        BLOCK_DV,
        BLOCK_N,
        True,
    )

    # Epilogue: normalise once; a row that saw no key gives 0 and lse -inf.
    norm = tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    out = acc / norm
    out = out.to(out_ptr.dtype.element_ty)
    store_tile(
        out_ptr,
        stride_om,
        start_m,
        SEQLEN_Q,
        out,
        BLOCK_M,
        HEAD_DIM_V,
        BLOCK_DV,
    )
