"""attn_fwd: causal(align=top_left) mask, 2 consumers.

Rendered by flashgen from templates/gluon/hopper_forward.py.jinja.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# isort: split
from flashgen.primitives.hopper import (
    arrive,
    barriers,
    expect,
    get_numbers,
    load_tile,
    mma,
    mma_first,
    mma_wait,
    number_of,
    opaque,
    own_sums,
    product_layout,
    put_numbers,
    rescale_rarely,
    row_of,
    store_wait,
    wait,
    write_tile,
)

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; m_i row maximum, l_i row sum, acc unnormalised
# output, alpha rescale of both after a new maximum. Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse is turned back to natural log at the end.
# Tiles are numbered along the keys, and walked from the last. Counts of uses, of tiles
# (turn) and of steps over the keys (step), say which buffer of a ring is next.


@triton.jit
def mask_mod(b, h, q_idx, kv_idx, SEQLEN_Q, SEQLEN_K):
    """Whether query row q_idx sees key kv_idx: the first row sees the first key."""
    return kv_idx <= q_idx


@triton.jit
def bounds_causal(start_m, SEQLEN_Q, SEQLEN_K, BLOCK_M):
    """Where the keys end that every row of the tile sees, and those that some row does."""
    diagonal = start_m + 1
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


@gluon.jit
def tile_position(
    tile,
    num_heads_total,
    nheads_q,
    SEQLEN_Q,
    head_group,
    tail_heads,
    BLOCK_M: gl.constexpr,
):
    """Where a tile lies: groups of heads go out one by one, the longest tiles first, the last tail_heads as one."""
    num_m = gl.cdiv(SEQLEN_Q, BLOCK_M)
    body = gl.maximum(num_heads_total - tail_heads, 0)
    in_tail = tile >= body * num_m
    first_head = gl.where(in_tail, body, 0)
    heads = gl.where(in_tail, num_heads_total - body, body)
    size = gl.where(in_tail, heads, gl.minimum(head_group, heads))
    rank = tile - first_head * num_m
    first = rank // (size * num_m) * size
    size_here = gl.minimum(size, heads - first)
    rank = rank - first * num_m
    off_zh = first_head + first + rank % size_here
    block = rank // size_here
    block = num_m - 1 - block
    off_z = off_zh // nheads_q
    off_h = off_zh % nheads_q
    return off_z, off_h, block * BLOCK_M


@gluon.jit
def key_tiles(
    start_m,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Key tiles [lo, hi) are seen by some of BLOCK_M rows, [full_lo, full_hi) by all."""
    full_end, end = kv_bounds(
        start_m,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_M,
        BLOCK_N,
    )
    # At least one tile, even if nothing in it is seen: zeros are written too.
    return 0, 0, full_end // BLOCK_N, gl.maximum(gl.cdiv(end, BLOCK_N), 1)


@gluon.jit
def producer(
    q_ring,
    k_ring,
    v_ring,
    tile_ring,
    q_desc,
    k_desc,
    v_desc,
    tile_counter_ptr,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    num_heads_total,
    nheads_q,
    head_group,
    tail_heads,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    OUT_BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    RESCALE_AT: gl.constexpr,
):
    """Take tiles from the counter, and copy their Q, K and V ahead of the consumers."""
    q_smem, q_full, q_empty = q_ring
    k_smem, k_full, k_empty = k_ring
    v_smem, v_full, v_empty = v_ring
    tile_smem, tile_full, tile_empty = tile_ring
    q_bytes: gl.constexpr = q_desc.block_type.nbytes
    k_bytes: gl.constexpr = k_desc.block_type.nbytes
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    num_tiles = gl.cdiv(SEQLEN_Q, 2 * ROWS) * num_heads_total
    turn = 0
    step = 0
    tile = gl.program_id(0)
    off_z, off_h, start_m = tile_position(
        gl.minimum(tile, num_tiles - 1),
        num_heads_total,
        nheads_q,
        SEQLEN_Q,
        head_group,
        tail_heads,
        2 * ROWS,
    )
    wait(tile_empty.index(turn & 1), turn // 2 & 1 ^ 1)
    put_numbers(
        tile_smem.index(turn & 1),
        (
            (tile < num_tiles).to(gl.int32),
            off_z,
            off_h,
            start_m,
        ),
        4,
    )
    arrive(tile_full.index(turn & 1))
    while tile < num_tiles:
        off_hkv = off_h // group
        lo, _full_lo, _full_hi, hi = key_tiles(
            start_m,
            SEQLEN_Q,
            SEQLEN_K,
            2 * ROWS,
            BLOCK_N,
        )
        for c in gl.static_range(2):
            wait(q_empty.index(c), turn & 1 ^ 1)
            expect(q_full.index(c), q_bytes)
            load_tile(
                q_desc,
                [off_z, off_h, start_m + c * ROWS, 0],
                q_full.index(c),
                q_smem.index(c),
            )
        n = (hi - 1) * BLOCK_N
        wait(
            k_empty.index(step % NUM_STAGES),
            step // NUM_STAGES & 1 ^ 1,
        )
        expect(k_full.index(step % NUM_STAGES), k_bytes)
        load_tile(
            k_desc,
            [off_z, off_hkv, n, 0],
            k_full.index(step % NUM_STAGES),
            k_smem.index(step % NUM_STAGES),
        )
        # The next tile: asked for here, where the rings are full and nobody waits for it.
        next_tile = gl.atomic_add(tile_counter_ptr, 1) + gl.num_programs(0)
        turn += 1
        next_off_z, next_off_h, next_start_m = tile_position(
            gl.minimum(next_tile, num_tiles - 1),
            num_heads_total,
            nheads_q,
            SEQLEN_Q,
            head_group,
            tail_heads,
            2 * ROWS,
        )
        wait(tile_empty.index(turn & 1), turn // 2 & 1 ^ 1)
        put_numbers(
            tile_smem.index(turn & 1),
            (
                (next_tile < num_tiles).to(gl.int32),
                next_off_z,
                next_off_h,
                next_start_m,
            ),
            4,
        )
        arrive(tile_full.index(turn & 1))
        for i in range(1, hi - lo):
            next_n = (hi - 1 - i) * BLOCK_N
            wait(
                k_empty.index((step + 1) % NUM_STAGES),
                (step + 1) // NUM_STAGES & 1 ^ 1,
            )
            expect(k_full.index((step + 1) % NUM_STAGES), k_bytes)
            load_tile(
                k_desc,
                [off_z, off_hkv, next_n, 0],
                k_full.index((step + 1) % NUM_STAGES),
                k_smem.index((step + 1) % NUM_STAGES),
            )
            wait(
                v_empty.index(step % NUM_STAGES),
                step // NUM_STAGES & 1 ^ 1,
            )
            expect(v_full.index(step % NUM_STAGES), v_bytes)
            load_tile(
                v_desc,
                [off_z, off_hkv, n, 0],
                v_full.index(step % NUM_STAGES),
                v_smem.index(step % NUM_STAGES),
            )
            n = next_n
            step += 1
        wait(
            v_empty.index(step % NUM_STAGES),
            step // NUM_STAGES & 1 ^ 1,
        )
        expect(v_full.index(step % NUM_STAGES), v_bytes)
        load_tile(
            v_desc,
            [off_z, off_hkv, n, 0],
            v_full.index(step % NUM_STAGES),
            v_smem.index(step % NUM_STAGES),
        )
        step += 1
        tile = next_tile
        off_z = next_off_z
        off_h = next_off_h
        start_m = next_start_m
    # The last program leaves the counter as it found it.
    ended = gl.atomic_add(tile_counter_ptr + 1, 1)
    if ended == gl.num_programs(0) - 1:
        gl.store(tile_counter_ptr, 0)
        gl.store(tile_counter_ptr + 1, 0)


@gluon.jit
def scores(
    q,
    k,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Start the product of a consumer's queries and a tile of keys."""
    layout: gl.constexpr = product_layout(BLOCK_N)
    qk = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    qk = mma_first(q, k.permute((1, 0)), qk)
    return qk


@gluon.jit
def mask_scores(
    qk,
    off_z,
    off_h,
    offs_m,
    n,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_N: gl.constexpr,
):
    """Return the scores that the mask leaves, -inf elsewhere."""
    # Computed where the branch is taken: outside of it, it would hold registers in every step.
    n = opaque(n)
    offs_n = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, qk.type.layout))
    kv_idx = gl.expand_dims(offs_n, 0)
    q_idx = row_of(offs_m, qk)
    visible = mask_mod(
        off_z,
        off_h,
        q_idx,
        kv_idx,
        SEQLEN_Q,
        SEQLEN_K,
    )
    visible = visible & (kv_idx < SEQLEN_K)
    return gl.where(visible, qk, float("-inf"))


@gluon.jit
def seen_scores(
    qk,
    masked,
    off_z,
    off_h,
    offs_m,
    n,
    qk_scale,
    SEQLEN_Q,
    SEQLEN_K,
    BLOCK_N: gl.constexpr,
):
    """Return the scores of a tile of keys, which is masked or not as the case may be."""
    if masked:
        qk = mask_scores(
            qk,
            off_z,
            off_h,
            offs_m,
            n,
            SEQLEN_Q,
            SEQLEN_K,
            BLOCK_N,
        )
    return qk


@gluon.jit
def safe_maximum(m_i):
    """Return row maxima to subtract: a row that has seen no key yet keeps -inf, which would give NaN."""
    return gl.where(m_i == float("-inf"), 0.0, m_i)


@gluon.jit
def exponentials(qk, m_safe, qk_scale):
    """Return 2 to the power of what scores are below their row's maximum."""
    scale = gl.full(qk.shape, qk_scale, gl.float32, qk.type.layout)
    below = gl.expand_dims(-m_safe, 1) + gl.zeros_like(qk)
    return gl.exp2(gl.fma(qk, scale, below))


@gluon.jit
def attend(
    acc,
    l_i,
    m_i,
    p,
    q,
    k_ring,
    v_ring,
    step,
    off_z,
    off_h,
    offs_m,
    n,
    masked,
    qk_scale,
    SEQLEN_Q,
    SEQLEN_K,
    CONSUMER: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    OUT_BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    RESCALE_AT: gl.constexpr,
):
    """Attend to the keys from n: their scores beside the product of the step before, then their softmax."""
    k_smem, k_full, k_empty = k_ring
    v_smem, v_full, v_empty = v_ring
    stage = step % NUM_STAGES
    before = (step - 1) % NUM_STAGES
    wait(k_full.index(stage), step // NUM_STAGES & 1)
    qk = scores(
        q,
        k_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK]),
        ROWS,
        BLOCK_N,
    )
    wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)
    acc = mma(
        p,
        v_smem.index(before).reshape([BLOCK_N, BLOCK_DV]),
        acc,
    )
    qk = mma_wait(1, deps=[qk])
    arrive(k_empty.index(stage))
    qk = seen_scores(
        qk,
        masked,
        off_z,
        off_h,
        offs_m,
        n,
        qk_scale,
        SEQLEN_Q,
        SEQLEN_K,
        BLOCK_N,
    )
    m_new = gl.maximum(m_i, gl.max(qk, 1) * qk_scale)
    # A maximum that grew little stays as it is, and so does what was divided by it.
    m_new = gl.where(m_new - m_i > RESCALE_AT, m_new, m_i)
    m_safe = safe_maximum(m_new)
    p_new = exponentials(qk, m_safe, qk_scale)
    alpha = gl.exp2(m_i - m_safe)
    l_i = l_i * row_of(alpha, l_i) + own_sums(p_new, BLOCK_N)
    acc, p_new = mma_wait(0, deps=[acc, p_new])
    p_new = gl.convert_layout(p_new.to(p.dtype), p.type.layout)
    p = p_new
    arrive(v_empty.index(before))
    acc = rescale_rarely(acc, alpha)
    return acc, l_i, m_new, p


@gluon.jit
def pass_over(k_ring, v_ring, step, count, NUM_STAGES: gl.constexpr):
    """Give back key tiles that only rows of other consumers see; return the next step."""
    _k_smem, k_full, k_empty = k_ring
    _v_smem, v_full, v_empty = v_ring
    for i in range(count):
        wait(k_full.index(step % NUM_STAGES), step // NUM_STAGES & 1)
        arrive(k_empty.index(step % NUM_STAGES))
        wait(v_full.index(step % NUM_STAGES), step // NUM_STAGES & 1)
        arrive(v_empty.index(step % NUM_STAGES))
        step += 1
    return step


@gluon.jit
def normalise(
    acc,
    out_desc,
    l_i,
    m_i,
):
    """Return a consumer's output; a row that saw no key gives 0."""
    l_i = gl.convert_layout(gl.sum(l_i, 1), m_i.type.layout)
    norm = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
    acc = acc * row_of(norm, acc)
    out = acc.to(out_desc.dtype)
    return out


@gluon.jit
def write_out(
    out,
    out_smem,
    out_desc,
    off_z,
    off_h,
    start_m,
    ROWS: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    OUT_BLOCK_DV: gl.constexpr,
):
    """Start writing a consumer's rows."""
    halves = gl.permute(gl.reshape(out, [ROWS, 2, OUT_BLOCK_DV]), (0, 2, 1))
    left, right = gl.split(halves)
    write_tile(
        out_desc,
        [off_z, off_h, start_m, 0],
        out_smem,
        left,
    )
    write_tile(
        out_desc,
        [off_z, off_h, start_m, OUT_BLOCK_DV],
        out_smem,
        right,
    )


@gluon.jit
def consumer(
    q_ring,
    k_ring,
    v_ring,
    tile_ring,
    out_smem,
    out_desc,
    qk_scale,
    nheads_q,
    SEQLEN_Q,
    SEQLEN_K,
    CONSUMER: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    OUT_BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    RESCALE_AT: gl.constexpr,
):
    """Attend with the rows of one warpgroup, tile after tile, as the producer hands them out."""
    q_smem, q_full, q_empty = q_ring
    k_smem, k_full, k_empty = k_ring
    v_smem, v_full, v_empty = v_ring
    tile_smem, tile_full, tile_empty = tile_ring
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK_DV), 2)
    turn = 0
    step = 0
    wait(tile_full.index(turn & 1), turn // 2 & 1)
    numbers = get_numbers(tile_smem.index(turn & 1))
    arrive(tile_empty.index(turn & 1))
    more = number_of(numbers, 0) != 0
    off_z = number_of(numbers, 1)
    off_h = number_of(numbers, 2)
    start_m = number_of(numbers, 3)
    while more:
        lo, _full_lo, full_hi, hi = key_tiles(
            start_m,
            SEQLEN_Q,
            SEQLEN_K,
            2 * ROWS,
            BLOCK_N,
        )
        start_m += CONSUMER * ROWS
        offs_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        # Of the keys that the producer copies, those that this consumer's rows see.
        tiles_lo, tiles_hi = lo, hi
        lo, _full_lo, full_hi, hi = key_tiles(
            start_m,
            SEQLEN_Q,
            SEQLEN_K,
            ROWS,
            BLOCK_N,
        )
        lo = gl.minimum(gl.maximum(lo, tiles_lo), tiles_hi - 1)
        hi = gl.maximum(gl.minimum(hi, tiles_hi), lo + 1)
        step = pass_over(k_ring, v_ring, step, tiles_hi - hi, NUM_STAGES)
        wait(q_full.index(CONSUMER), turn & 1)
        q = q_smem.index(CONSUMER).reshape([ROWS, BLOCK_DQK])
        # The last tile of keys starts the sums.
        j = hi - 1
        n = j * BLOCK_N
        stage = step % NUM_STAGES
        wait(k_full.index(stage), step // NUM_STAGES & 1)
        qk = scores(
            q,
            k_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK]),
            ROWS,
            BLOCK_N,
        )
        qk = mma_wait(0, deps=[qk])
        arrive(k_empty.index(stage))
        qk = seen_scores(
            qk,
            j >= full_hi,
            off_z,
            off_h,
            offs_m,
            n,
            qk_scale,
            SEQLEN_Q,
            SEQLEN_K,
            BLOCK_N,
        )
        m_i = gl.max(qk, 1) * qk_scale
        p_first = exponentials(qk, safe_maximum(m_i), qk_scale)
        l_i = own_sums(p_first, BLOCK_N)

        step += 1
        p = gl.convert_layout(p_first.to(q_smem.dtype), p_layout)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
        if full_hi >= hi - 1:
            # No other tile needs the mask.
            for i in range(hi - 1 - lo):
                j -= 1
                n = j * BLOCK_N
                acc, l_i, m_i, p = attend(
                    acc,
                    l_i,
                    m_i,
                    p,
                    q,
                    k_ring,
                    v_ring,
                    step,
                    off_z,
                    off_h,
                    offs_m,
                    n,
                    False,
                    qk_scale,
                    SEQLEN_Q,
                    SEQLEN_K,
                    CONSUMER,
                    BLOCK_DQK,
                    BLOCK_DV,
                    OUT_BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    RESCALE_AT,
                )
                step += 1
        else:
            for i in range(hi - 1 - lo):
                j -= 1
                n = j * BLOCK_N
                acc, l_i, m_i, p = attend(
                    acc,
                    l_i,
                    m_i,
                    p,
                    q,
                    k_ring,
                    v_ring,
                    step,
                    off_z,
                    off_h,
                    offs_m,
                    n,
                    j >= full_hi,
                    qk_scale,
                    SEQLEN_Q,
                    SEQLEN_K,
                    CONSUMER,
                    BLOCK_DQK,
                    BLOCK_DV,
                    OUT_BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    RESCALE_AT,
                )
                step += 1
        arrive(q_empty.index(CONSUMER))
        before = (step - 1) % NUM_STAGES
        wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)
        acc = mma(
            p,
            v_smem.index(before).reshape([BLOCK_N, BLOCK_DV]),
            acc,
        )
        acc = mma_wait(0, deps=[acc])
        arrive(v_empty.index(before))
        step = pass_over(k_ring, v_ring, step, lo - tiles_lo, NUM_STAGES)
        out = normalise(
            acc,
            out_desc,
            l_i,
            m_i,
        )
        write_out(
            out,
            out_smem.index(CONSUMER),
            out_desc,
            off_z,
            off_h,
            start_m,
            ROWS,
            BLOCK_DV,
            OUT_BLOCK_DV,
        )
        turn += 1
        wait(tile_full.index(turn & 1), turn // 2 & 1)
        numbers = get_numbers(tile_smem.index(turn & 1))
        arrive(tile_empty.index(turn & 1))
        more = number_of(numbers, 0) != 0
        off_z = number_of(numbers, 1)
        off_h = number_of(numbers, 2)
        start_m = number_of(numbers, 3)
    # Epilogue: what is still on its way.
    store_wait(0)


@gluon.jit
def attn_fwd(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    tile_counter_ptr,
    qk_scale,
    num_heads_total,
    nheads_q,
    group,
    SEQLEN_Q,
    SEQLEN_K,
    head_group,
    tail_heads,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    OUT_BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    RESCALE_AT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    # Prologue: shared memory, and barriers for each buffer: one says full, one empty.
    q_smem = gl.allocate_shared_memory(
        q_desc.dtype,
        [2, 1, 1, ROWS, BLOCK_DQK],
        q_desc.layout,
    )
    k_smem = gl.allocate_shared_memory(
        k_desc.dtype,
        [NUM_STAGES, 1, 1, BLOCK_N, BLOCK_DQK],
        k_desc.layout,
    )
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype,
        [NUM_STAGES, 1, 1, BLOCK_N, BLOCK_DV],
        v_desc.layout,
    )
    out_smem = gl.allocate_shared_memory(
        out_desc.dtype,
        [2, 1, 1, ROWS, OUT_BLOCK_DV],
        out_desc.layout,
    )
    q_full = barriers(2, 1)
    q_empty = barriers(2, 1)
    k_full = barriers(NUM_STAGES, 1)
    k_empty = barriers(NUM_STAGES, 2)
    v_full = barriers(NUM_STAGES, 1)
    v_empty = barriers(NUM_STAGES, 2)
    tile_smem = gl.allocate_shared_memory(
        gl.int32,
        [2, 4],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
    )
    tile_full = barriers(2, 1)
    tile_empty = barriers(2, 2)

    q_ring = (q_smem, q_full, q_empty)
    k_ring = (k_smem, k_full, k_empty)
    v_ring = (v_smem, v_full, v_empty)
    tile_ring = (tile_smem, tile_full, tile_empty)

    # Main loop: each role walks the same tiles.
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    q_ring,
                    k_ring,
                    v_ring,
                    tile_ring,
                    out_smem,
                    out_desc,
                    qk_scale,
                    nheads_q,
                    SEQLEN_Q,
                    SEQLEN_K,
                    0,
                    BLOCK_DQK,
                    BLOCK_DV,
                    OUT_BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    RESCALE_AT,
                ),
            ),
            (
                consumer,
                (
                    q_ring,
                    k_ring,
                    v_ring,
                    tile_ring,
                    out_smem,
                    out_desc,
                    qk_scale,
                    nheads_q,
                    SEQLEN_Q,
                    SEQLEN_K,
                    1,
                    BLOCK_DQK,
                    BLOCK_DV,
                    OUT_BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    RESCALE_AT,
                ),
            ),
            (
                producer,
                (
                    q_ring,
                    k_ring,
                    v_ring,
                    tile_ring,
                    q_desc,
                    k_desc,
                    v_desc,
                    tile_counter_ptr,
                    group,
                    SEQLEN_Q,
                    SEQLEN_K,
                    num_heads_total,
                    nheads_q,
                    head_group,
                    tail_heads,
                    BLOCK_DQK,
                    BLOCK_DV,
                    OUT_BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    RESCALE_AT,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
