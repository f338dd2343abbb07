"""attn_decode: causal mask with lse with append with page=64 with rotary=halves, descriptor loads.

Rendered by flashgen from templates/triton/decode.py.jinja.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; m_i row maximum, l_i row sum, acc unnormalised
# output, alpha rescale of both after a new maximum. Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse is turned back to natural log at the end.
# A tile has BLOCK_M rows: query i of head g of the group is row i * group + g. A unit is
# `step` key tiles of a tile of rows. Teams of `lanes` programs take units in order, over
# sequences; each program of a team has tiles of its own, and the same keys as the others.


@triton.jit
def mask_mod(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: the last row sees the last key."""
    return kv_idx <= q_idx + (SEQLEN_K - SEQLEN_Q)


@triton.jit
def bounds_causal(start_m, SEQLEN_Q, SEQLEN_K, BLOCK_M):
    """Where the keys end that every row of the tile sees, and those that some row does."""
    diagonal = start_m + 1 + (SEQLEN_K - SEQLEN_Q)
    return diagonal, diagonal + BLOCK_M - 1


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
    all_last, last = bounds_causal(
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
def sequence_parts(
    z,
    batch,
    SEQLEN_Q,
    splits,
    min_blocks,
    BLOCK_N: tl.constexpr,
    cache_seqlens_ptr,
    seqlen_new,
):
    """Length of a sequence, its first key and key tiles, key tiles of a unit, units of a tile of rows."""
    length = tl.load(cache_seqlens_ptr + z, mask=z < batch, other=0)
    length += seqlen_new
    _, end = kv_bounds(
        0,
        SEQLEN_Q,
        length,
        SEQLEN_Q,
        BLOCK_N,
    )
    # New keys are no part of the tiles: the last part of a tile of rows has them, too.
    end = tl.minimum(end, length - seqlen_new)
    start = end * 0
    blocks = tl.maximum(tl.cdiv(end - start, BLOCK_N), 1)
    # splits == 0: units of one key tile, divided evenly; else so many units for every tile of rows.
    step = blocks * 0 + 1
    units = blocks
    if splits > 0:
        step = tl.maximum(tl.cdiv(blocks, splits), min_blocks)
        units = tl.cdiv(blocks, step)
    return length, start, blocks, step, tl.where(z < batch, units, 0)


@triton.jit
def page_of(n, length, page_table_ptr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of the keys from n on: one where a page holds whole tiles, else one for each key."""
    if PAGE_SIZE % BLOCK_N == 0:
        return tl.load(page_table_ptr + n // PAGE_SIZE, mask=n < length, other=0)
    else:
        offs_n = n + tl.arange(0, BLOCK_N)
        return tl.load(
            page_table_ptr + offs_n // PAGE_SIZE,
            mask=offs_n < length,
            other=0,
        )


@triton.jit
def cache_rows(offs_n, stride_n, page, stride_z, PAGE_SIZE: tl.constexpr):
    """Where keys lie in the cache, by the page or the pages that hold them."""
    return page.to(tl.int64) * stride_z + (offs_n % PAGE_SIZE) * stride_n


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
    # half is a multiple of 8: so many columns in a row have partners in a row.
    partner = tl.where(offs_d < half, offs_d + half, offs_d - half)
    partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    angle = tl.minimum(offs_d, partner)
    angle = tl.max_contiguous(tl.multiple_of(angle, 8), 8)
    turned = inside & (offs_d[None, :] < rotary_dim)
    y = tl.load(ptrs + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    angles += angle[None, :]
    cos = tl.load(rotary_cos_ptr + angles, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(rotary_sin_ptr + angles, mask=turned, other=0.0).to(tl.float32)
    sin = tl.where(offs_d[None, :] < half, -sin, sin)
    return (x.to(tl.float32) * cos + y * sin).to(x.dtype)


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
    l_i,
    m_i,
    partial_ptr,
    slot,
    is_row,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
    start_n,
    end_n,
    k_desc,
    v_desc,
    off_hkv,
    page_table_ptr,
    cached,
    off_z,
    off_h,
    q_idx,
    SEQLEN_Q,
    SEQLEN_K,
    qk_scale,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to the keys [start_n, end_n) of the cache: all visible, or MASKED key by key."""
    next_page = page_of(start_n, cached, page_table_ptr, PAGE_SIZE, BLOCK_N)
    for n in tl.range(start_n, end_n, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(n, BLOCK_N)
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = offs_n < cached
        # A step ahead: where keys lie is known when their loads are to start.
        page = next_page
        next_page = page_of(n + BLOCK_N, cached, page_table_ptr, PAGE_SIZE, BLOCK_N)
        k = k_desc.load([page, off_hkv, n % PAGE_SIZE, 0])
        k = k.reshape(BLOCK_N, BLOCK_DQK)

        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        kv_idx = offs_n[None, :]
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
            visible = visible & (kv_idx < cached)

        v = v_desc.load([page, off_hkv, n % PAGE_SIZE, 0])
        v = v.reshape(BLOCK_N, BLOCK_DV)
        if MASKED:
            v = tl.where(inside[:, None], v, 0.0).to(v.dtype)

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
def attend_new(
    acc,
    l_i,
    m_i,
    q,
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
    off_z,
    off_h,
    q_idx,
    SEQLEN_Q,
    SEQLEN_K,
    qk_scale,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
        kv_idx = places[None, :]
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

        new_rows = offs_new.to(tl.int64) * stride_v_new_n
        v = load_rows(
            v_new_ptr,
            new_rows,
            is_new,
            HEAD_DIM_V,
            BLOCK_DV,
            True,
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
def attn_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
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
    page_table_ptr,
    step_pages,
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
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    # Prologue: which units are this program's, and of which sequence the first is.
    num_m = tl.cdiv(SEQLEN_Q * group, BLOCK_M)
    num_tiles = nheads_kv * num_m
    own_tiles = num_tiles // lanes
    team = tl.program_id(0) // lanes
    lane = tl.program_id(0) % lanes
    # What ran before this kernel has written what is read from here on.
    gdc_wait()
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
        pages = page_table_ptr + off_b * step_pages
        k_head = k_ptr + off_hkv.to(tl.int64) * stride_kh
        v_head = v_ptr + off_hkv.to(tl.int64) * stride_vh
        k_new = k_new_ptr + off_hkv.to(tl.int64) * stride_k_new_h
        k_new += off_b * stride_k_new_z
        v_new = v_new_ptr + off_hkv.to(tl.int64) * stride_v_new_h
        v_new += off_b * stride_v_new_z
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

        # Main loop: key tiles that every row sees, and those that need the mask.
        first_m = start_m // group
        last_m = (tl.minimum(start_m + BLOCK_M, SEQLEN_Q * group) - 1) // group
        full_end, end = kv_bounds(
            first_m,
            SEQLEN_Q,
            SEQLEN_K,
            last_m - first_m + 1,
            BLOCK_N,
        )
        end = tl.minimum(end, cached)
        full_end = tl.minimum(full_end, cached // BLOCK_N * BLOCK_N)
        acc, l_i, m_i = attend(
            acc,
            l_i,
            m_i,
            q,
            begin,
            tl.minimum(stop, full_end),
            k_desc,
            v_desc,
            off_hkv,
            pages,
            cached,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
            BLOCK_N,
            PAGE_SIZE,
            False,
            NUM_STAGES,
        )
        acc, l_i, m_i = attend(
            acc,
            l_i,
            m_i,
            q,
            tl.maximum(begin, full_end),
            tl.minimum(stop, end),
            k_desc,
            v_desc,
            off_hkv,
            pages,
            cached,
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
            BLOCK_N,
            PAGE_SIZE,
            True,
            2,
        )
        acc, l_i, m_i = attend_new(
            acc,
            l_i,
            m_i,
            q,
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
            off_z,
            heads[:, None],
            offs_m[:, None],
            SEQLEN_Q,
            SEQLEN_K,
            qk_scale,
            HEAD_DIM_QK,
            HEAD_DIM_V,
            BLOCK_DQK,
            BLOCK_DV,
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
            lse_rows = (off_b * nheads_q + heads) * SEQLEN_Q + offs_m
            tl.store(lse_ptr + lse_rows, natural_lse(l_i, m_i), mask=is_row)
        else:
            slot = 2 * tl.program_id(0) + (unit != first_unit).to(tl.int32)
            store_partial(
                acc,
                l_i,
                m_i,
                partial_ptr,
                slot,
                is_row,
                HEAD_DIM_V,
                BLOCK_DV,
                BLOCK_M,
            )
            tl.debug_barrier()
            arrivals = arrivals_ptr + off_z * num_tiles + tile
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            gdc_launch_dependents()
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
                page = tl.load(pages + places // PAGE_SIZE, mask=is_new, other=0)
                new_rows = offs_new.to(tl.int64) * stride_k_new_n
                k_rows = cache_rows(places, stride_kn, page, stride_kz, PAGE_SIZE)
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
                new_rows = offs_new.to(tl.int64) * stride_v_new_n
                v_rows = cache_rows(places, stride_vn, page, stride_vz, PAGE_SIZE)
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
        unit += parts
        if unit == before + own_tiles * num_parts:
            before = unit
            off_z += 1
