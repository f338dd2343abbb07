"""attn_decode: causal mask with append with page=16 with rotary=pairs, 2 consumers.

Rendered by flashgen from templates/gluon/hopper_decode.py.jinja.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# isort: split
from flashgen.primitives.hopper import (
    RAGGED,
    arrive,
    barriers,
    expect,
    get_numbers,
    load_tile,
    mma,
    mma_first,
    mma_wait,
    number_of,
    own_sums,
    product_layout,
    put_numbers,
    row_of,
    wait,
)
from flashgen.primitives.hopper_decode import (
    add,
    meet,
    row_layout,
)

# Names: off_z batch, off_h query head, off_hkv key/value head, offs_m query rows,
# offs_n keys, offs_d head dimension; m_i row maximum, l_i row sum, acc unnormalised
# output, alpha rescale of both after a new maximum. Scores are in base 2: qk_scale
# holds softmax_scale * log2(e), and lse is turned back to natural log at the end.
# Tiles are numbered along the keys, and walked from the last. Counts of uses, of tiles
# (turn) and of steps over the keys (step), say which buffer of a ring is next.
# A unit is `unit_tiles` key tiles of a tile of rows. Teams of `lanes` programs take units in
# order, over sequences; each program of a team has tiles of its own, and the same keys as
# the others. Units of one tile that follow each other in a program are its part of the tile.


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
):
    """Length of a sequence, its first key and key tiles, key tiles of a unit, units of a tile of rows."""
    length = tl.load(cache_seqlens_ptr + z, mask=z < batch, other=0)
    _, end = kv_bounds(
        0,
        SEQLEN_Q,
        length,
        SEQLEN_Q,
        BLOCK_N,
    )
    start = end * 0
    blocks = tl.maximum(tl.cdiv(end - start, BLOCK_N), 1)
    # splits == 0: units of one key tile, divided evenly; else so many units for every tile of rows.
    step = blocks * 0 + 1
    units = blocks
    if splits > 0:
        step = tl.maximum(tl.cdiv(blocks, splits), min_blocks)
        units = tl.cdiv(blocks, step)
    return length, start, blocks, step, tl.where(z < batch, units, 0)


@gluon.jit
def find_share(
    own_tiles,
    team,
    teams,
    batch,
    SEQLEN_Q,
    splits,
    min_blocks,
    BLOCK_N: gl.constexpr,
    cache_seqlens_ptr,
):
    """All units, those of a team, the first and the end of this one's; the sequence of the first, the units before it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    total = 0
    for z in range(0, batch, 32):
        units = sequence_parts(
            z + gl.arange(0, 32, layout),
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
        )[4]
        total += gl.sum(units, 0) * own_tiles
    share = 1
    if splits == 0:
        share = gl.maximum(gl.cdiv(total, teams), min_blocks)
    first_unit = team * share
    last_unit = gl.minimum(first_unit + share, total)
    off_z = 0
    before = 0
    passed = 0
    for z in range(0, gl.where(batch > 1, batch, 0), 32):
        units = sequence_parts(
            z + gl.arange(0, 32, layout),
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
        )[4]
        units = units * own_tiles
        ends = passed + gl.associative_scan(units, 0, add)
        earlier = (ends <= first_unit) & (units > 0)
        off_z += gl.sum(earlier.to(gl.int32), 0)
        before += gl.sum(gl.where(earlier, units, 0), 0)
        passed += gl.sum(units, 0)
    return total, share, first_unit, last_unit, off_z, before


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
    q_1_desc,
    k_desc,
    k_1_desc,
    v_desc,
    batch,
    nheads_q,
    group,
    rows_k,
    rows_v,
    lanes,
    waits,
    SEQLEN_Q,
    splits,
    min_blocks,
    cache_seqlens_ptr,
    page_table_ptr,
    step_pages,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DQK_1: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Hand out this program's share, a part of a tile after the other, and copy Q, K and V ahead of the consumers."""
    q_smem, q_1_smem, q_full, q_empty = q_ring
    k_smem, k_1_smem, k_full, k_empty = k_ring
    v_smem, v_full, v_empty = v_ring
    tile_smem, tile_full, tile_empty = tile_ring
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + q_1_desc.block_type.nbytes
    k_bytes: gl.constexpr = k_desc.block_type.nbytes + k_1_desc.block_type.nbytes
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    num_m = gl.cdiv(SEQLEN_Q, 2 * ROWS)
    num_tiles = nheads_q * num_m
    own_tiles = num_tiles // lanes
    team = gl.program_id(0) // lanes
    lane = gl.program_id(0) % lanes
    total, share, first_unit, last_unit, off_z, before = find_share(
        own_tiles,
        team,
        gl.num_programs(0) // lanes,
        batch,
        SEQLEN_Q,
        splits,
        min_blocks,
        BLOCK_N,
        cache_seqlens_ptr,
    )
    turn = 0
    step = 0
    unit = first_unit
    while unit < last_unit:
        # The next tile of rows, and which of its keys.
        SEQLEN_K, first_key, blocks, unit_tiles, num_parts = sequence_parts(
            off_z,
            batch,
            SEQLEN_Q,
            splits,
            min_blocks,
            BLOCK_N,
            cache_seqlens_ptr,
        )
        own_tile = (unit - before) // num_parts
        tile_unit = before + own_tile * num_parts
        tile = own_tile * lanes + lane
        part = unit - tile_unit
        parts = gl.minimum(num_parts - part, last_unit - unit)
        off_h = tile // num_m
        start_m = tile % num_m * (2 * ROWS)
        lo = first_key // BLOCK_N + part * unit_tiles
        hi = first_key // BLOCK_N + gl.minimum((part + parts) * unit_tiles, blocks)
        # A program leaves two outputs at most: of its first tile, and of its last one.
        first_team = tile_unit // share
        last_team = (tile_unit + num_parts - 1) // share
        first_program = first_team * lanes + lane
        slot = 2 * gl.program_id(0) + (unit != first_unit).to(gl.int32)
        # Alone, the last to arrive merges. Where all programs run at once (`waits`), those that
        # have nothing else to do wait for the others: the last one, too, if it ends here.
        member = 0
        members = 1
        if waits != 0:
            member = team - first_team
            last_end = gl.minimum((last_team + 1) * share, total)
            members = last_team - first_team
            members += (last_end == tile_unit + num_parts).to(gl.int32)
        wait(tile_empty.index(turn & 1), turn // 2 & 1 ^ 1)
        put_numbers(
            tile_smem.index(turn & 1),
            (
                1,
                off_z,
                off_h,
                start_m,
                SEQLEN_K,
                lo,
                hi,
                gl.where(parts == num_parts, -1, slot),
                off_z * num_tiles + tile,
                2 * first_program + (first_team * share < tile_unit).to(gl.int32),
                first_program,
                last_team * lanes + lane,
                member,
                members,
                (unit + parts == last_unit).to(gl.int32),
            ),
            15,
        )
        arrive(tile_full.index(turn & 1))
        for c in gl.static_range(2):
            wait(q_empty.index(c), turn & 1 ^ 1)
            expect(q_full.index(c), q_bytes)
            load_tile(
                q_desc,
                [off_z, off_h, start_m + c * ROWS, 0],
                q_full.index(c),
                q_smem.index(c),
            )
            load_tile(
                q_1_desc,
                [off_z, off_h, start_m + c * ROWS, BLOCK_DQK],
                q_full.index(c),
                q_1_smem.index(c),
            )
        off_hkv = off_h // group
        pages = page_table_ptr + off_z * step_pages
        n = (hi - 1) * BLOCK_N
        left = SEQLEN_K - n
        k_row = n // PAGE_SIZE
        v_row = n // PAGE_SIZE
        wait(
            k_empty.index(step % NUM_STAGES),
            step // NUM_STAGES & 1 ^ 1,
        )
        expect(
            k_full.index(step % NUM_STAGES),
            BLOCK_N // PAGE_SIZE * k_bytes,
        )
        for i in gl.static_range(BLOCK_N // PAGE_SIZE):
            page_left = left - i * PAGE_SIZE
            page = gl.load(pages + k_row + i, mask=page_left > 0, other=0)
            load_tile(
                k_desc,
                [
                    RAGGED,
                    page * rows_k + page_left,
                    off_hkv,
                    RAGGED - page_left,
                    0,
                ],
                k_full.index(step % NUM_STAGES),
                k_smem.index(step % NUM_STAGES).slice(
                    i * PAGE_SIZE,
                    PAGE_SIZE,
                    3,
                ),
            )
            load_tile(
                k_1_desc,
                [
                    RAGGED,
                    page * rows_k + page_left,
                    off_hkv,
                    RAGGED - page_left,
                    BLOCK_DQK,
                ],
                k_full.index(step % NUM_STAGES),
                k_1_smem.index(step % NUM_STAGES).slice(
                    i * PAGE_SIZE,
                    PAGE_SIZE,
                    3,
                ),
            )
        for i in range(1, hi - lo):
            n = (hi - 1 - i) * BLOCK_N
            next_left = SEQLEN_K - n
            next_k_row = n // PAGE_SIZE
            next_v_row = n // PAGE_SIZE
            wait(
                k_empty.index((step + 1) % NUM_STAGES),
                (step + 1) // NUM_STAGES & 1 ^ 1,
            )
            expect(
                k_full.index((step + 1) % NUM_STAGES),
                BLOCK_N // PAGE_SIZE * k_bytes,
            )
            for i in gl.static_range(BLOCK_N // PAGE_SIZE):
                page_left = next_left - i * PAGE_SIZE
                page = gl.load(pages + next_k_row + i, mask=page_left > 0, other=0)
                load_tile(
                    k_desc,
                    [
                        RAGGED,
                        page * rows_k + page_left,
                        off_hkv,
                        RAGGED - page_left,
                        0,
                    ],
                    k_full.index((step + 1) % NUM_STAGES),
                    k_smem.index((step + 1) % NUM_STAGES).slice(
                        i * PAGE_SIZE,
                        PAGE_SIZE,
                        3,
                    ),
                )
                load_tile(
                    k_1_desc,
                    [
                        RAGGED,
                        page * rows_k + page_left,
                        off_hkv,
                        RAGGED - page_left,
                        BLOCK_DQK,
                    ],
                    k_full.index((step + 1) % NUM_STAGES),
                    k_1_smem.index((step + 1) % NUM_STAGES).slice(
                        i * PAGE_SIZE,
                        PAGE_SIZE,
                        3,
                    ),
                )
            wait(
                v_empty.index(step % NUM_STAGES),
                step // NUM_STAGES & 1 ^ 1,
            )
            expect(
                v_full.index(step % NUM_STAGES),
                BLOCK_N // PAGE_SIZE * v_bytes,
            )
            for i in gl.static_range(BLOCK_N // PAGE_SIZE):
                page_left = left - i * PAGE_SIZE
                page = gl.load(pages + v_row + i, mask=page_left > 0, other=0)
                load_tile(
                    v_desc,
                    [
                        RAGGED,
                        page * rows_v + page_left,
                        off_hkv,
                        RAGGED - page_left,
                        0,
                    ],
                    v_full.index(step % NUM_STAGES),
                    v_smem.index(step % NUM_STAGES).slice(
                        i * PAGE_SIZE,
                        PAGE_SIZE,
                        3,
                    ),
                )
            left = next_left
            v_row = next_v_row
            step += 1
        wait(
            v_empty.index(step % NUM_STAGES),
            step // NUM_STAGES & 1 ^ 1,
        )
        expect(
            v_full.index(step % NUM_STAGES),
            BLOCK_N // PAGE_SIZE * v_bytes,
        )
        for i in gl.static_range(BLOCK_N // PAGE_SIZE):
            page_left = left - i * PAGE_SIZE
            page = gl.load(pages + v_row + i, mask=page_left > 0, other=0)
            load_tile(
                v_desc,
                [
                    RAGGED,
                    page * rows_v + page_left,
                    off_hkv,
                    RAGGED - page_left,
                    0,
                ],
                v_full.index(step % NUM_STAGES),
                v_smem.index(step % NUM_STAGES).slice(
                    i * PAGE_SIZE,
                    PAGE_SIZE,
                    3,
                ),
            )
        step += 1
        turn += 1
        unit += parts
        if unit == before + own_tiles * num_parts:
            before = unit
            off_z += 1
    # No more.
    wait(tile_empty.index(turn & 1), turn // 2 & 1 ^ 1)
    put_numbers(tile_smem.index(turn & 1), (0,), 1)
    arrive(tile_full.index(turn & 1))


@gluon.jit
def scores(
    q,
    k,
    q_1,
    k_1,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Start the product of a consumer's queries and a tile of keys."""
    layout: gl.constexpr = product_layout(BLOCK_N)
    qk = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    qk = mma_first(q, k.permute((1, 0)), qk)
    qk = mma(q_1, k_1.permute((1, 0)), qk)
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
    q_1,
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
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DQK_1: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Attend to the keys from n: their scores beside the product of the step before, then their softmax."""
    k_smem, k_1_smem, k_full, k_empty = k_ring
    v_smem, v_full, v_empty = v_ring
    stage = step % NUM_STAGES
    before = (step - 1) % NUM_STAGES
    wait(k_full.index(stage), step // NUM_STAGES & 1)
    qk = scores(
        q,
        k_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK]),
        q_1,
        k_1_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK_1]),
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
    m_safe = safe_maximum(m_new)
    p_new = exponentials(qk, m_safe, qk_scale)
    alpha = gl.exp2(m_i - m_safe)
    l_i = l_i * row_of(alpha, l_i) + own_sums(p_new, BLOCK_N)
    p_new = gl.convert_layout(p_new.to(p.dtype), p.type.layout)
    acc, p = mma_wait(0, deps=[acc, p_new])
    arrive(v_empty.index(before))
    acc = acc * row_of(alpha, acc)
    return acc, l_i, m_new, p


@gluon.jit
def normalise(
    acc,
    l_i,
    m_i,
    out_ptr,
):
    """Return a consumer's output; a row that saw no key gives 0."""
    norm = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
    acc = acc * row_of(norm, acc)
    out = acc.to(out_ptr.dtype.element_ty)
    return out


@gluon.jit
def write_rows(
    acc,
    l_i,
    m_i,
    off_z,
    off_h,
    start_m,
    out_ptr,
    stride_oz,
    stride_oh,
    stride_om,
    SEQLEN_Q,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DV: gl.constexpr,
):
    """Normalise and write rows of a head from start_m on."""
    out = normalise(
        acc,
        l_i,
        m_i,
        out_ptr,
    )
    head_ptr = out_ptr + off_z * stride_oz + off_h * stride_oh
    layout: gl.constexpr = out.type.layout
    rows = start_m + gl.arange(0, out.shape[0], gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, layout))
    ptrs = head_ptr + gl.expand_dims(rows * stride_om, 1) + gl.expand_dims(columns, 0)
    is_row = gl.expand_dims(rows < SEQLEN_Q, 1)
    is_column = gl.expand_dims(columns < HEAD_DIM_V, 0)
    gl.store(ptrs, out, mask=is_row & is_column)


@gluon.jit
def part_ptrs(partial_ptr, first_row, column, like, WIDTH: gl.constexpr):
    """Where a tile of a part is in scratch memory, in the layout of `like`."""
    layout: gl.constexpr = like.type.layout
    rows = first_row + gl.arange(0, like.shape[0], gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, like.shape[1], gl.SliceLayout(0, layout))
    return partial_ptr + gl.expand_dims(rows * WIDTH, 1) + gl.expand_dims(columns, 0)


@gluon.jit
def store_part(
    acc,
    l_i,
    m_i,
    partial_ptr,
    slot,
    ROWS: gl.constexpr,
    BLOCK_DV: gl.constexpr,
):
    """Leave the output of some keys of a consumer's rows, and its log-sum-exp, for those that merge."""
    WIDTH: gl.constexpr = BLOCK_DV
    slots = gl.num_programs(0).to(gl.int64) * 4
    lse2_ptr = partial_ptr + slots * (ROWS * WIDTH)
    first_row = slot.to(gl.int64) * ROWS
    offs_r = gl.arange(0, ROWS, m_i.type.layout)
    gl.store(lse2_ptr + first_row + offs_r, m_i + gl.log2(l_i))
    norm = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
    part = acc * row_of(norm, acc)
    gl.store(part_ptrs(partial_ptr, first_row, 0, part, WIDTH), part)


@gluon.jit
def merge_parts(
    partial_ptr,
    first_program,
    last_program,
    lanes,
    first_slot,
    member,
    members,
    off_z,
    off_h,
    start_m,
    out_ptr,
    stride_oz,
    stride_oh,
    stride_om,
    SEQLEN_Q,
    CONSUMER: gl.constexpr,
    ROWS: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DV: gl.constexpr,
):
    """Merge what the programs of a tile left of a consumer's rows, a piece of them: always in one order."""
    WIDTH: gl.constexpr = BLOCK_DV
    PIECE: gl.constexpr = 8
    AT_ONCE: gl.constexpr = 8
    slots = gl.num_programs(0).to(gl.int64) * 4
    lse2_ptr = partial_ptr + slots * (ROWS * WIDTH)
    layout: gl.constexpr = row_layout(BLOCK_DV)
    offs_r = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    for piece in range(member, ROWS // PIECE, members):
        l_i = gl.zeros([PIECE], gl.float32, gl.SliceLayout(1, layout))
        m_i = l_i - float("inf")
        acc = gl.zeros([PIECE, BLOCK_DV], gl.float32, layout)
        for start in range(first_program, last_program + 1, AT_ONCE * lanes):
            # No load waits for what another one brings.
            lse2 = ()
            parts = ()
            for i in gl.static_range(AT_ONCE):
                program = start + i * lanes
                there = program <= last_program
                slot = gl.where(program == first_program, first_slot, 2 * program)
                first_row = (slot * 2 + CONSUMER).to(gl.int64) * ROWS
                first_row += piece * PIECE
                of_rows = gl.load(
                    lse2_ptr + first_row + offs_r,
                    mask=gl.where(there, offs_r < PIECE, False),
                    other=float("-inf"),
                    cache_modifier=".cg",
                )
                lse2 = lse2 + (of_rows,)
                ptrs = part_ptrs(partial_ptr, first_row, 0, acc, WIDTH)
                part = gl.load(ptrs, mask=there, other=0.0, cache_modifier=".cg")
                parts = parts + (part,)
            m_new = m_i
            for i in gl.static_range(AT_ONCE):
                m_new = gl.maximum(m_new, lse2[i])
            m_safe = safe_maximum(m_new)
            alpha = gl.exp2(m_i - m_safe)
            l_i = l_i * alpha
            acc = acc * row_of(alpha, acc)
            for i in gl.static_range(AT_ONCE):
                beta = gl.exp2(lse2[i] - m_safe)
                l_i += beta
                acc += parts[i] * row_of(beta, acc)
            m_i = m_new
        write_rows(
            acc,
            l_i,
            m_i,
            off_z,
            off_h,
            start_m + piece * PIECE,
            out_ptr,
            stride_oz,
            stride_oh,
            stride_om,
            SEQLEN_Q,
            HEAD_DIM_V,
            BLOCK_DV,
        )


@gluon.jit
def consumer(
    q_ring,
    k_ring,
    v_ring,
    tile_ring,
    out_ptr,
    stride_oz,
    stride_oh,
    stride_om,
    qk_scale,
    nheads_q,
    SEQLEN_Q,
    lanes,
    waits,
    partial_ptr,
    arrivals_ptr,
    CONSUMER: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DQK_1: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Attend with the rows of one warpgroup, tile after tile, as the producer hands them out."""
    q_smem, q_1_smem, q_full, q_empty = q_ring
    k_smem, k_1_smem, k_full, k_empty = k_ring
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
    SEQLEN_K = number_of(numbers, 4)
    lo = number_of(numbers, 5)
    hi = number_of(numbers, 6)
    slot = number_of(numbers, 7)
    tile = number_of(numbers, 8)
    first_slot = number_of(numbers, 9)
    first_program = number_of(numbers, 10)
    last_program = number_of(numbers, 11)
    member = number_of(numbers, 12)
    members = number_of(numbers, 13)
    ends = number_of(numbers, 14)
    while more:
        start_m += CONSUMER * ROWS
        offs_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        # Of the keys of this part, those that need no mask.
        _, _full_lo, full_hi, _ = key_tiles(
            start_m,
            SEQLEN_Q,
            SEQLEN_K,
            ROWS,
            BLOCK_N,
        )
        full_hi = gl.minimum(gl.maximum(full_hi, lo), hi)
        wait(q_full.index(CONSUMER), turn & 1)
        q = q_smem.index(CONSUMER).reshape([ROWS, BLOCK_DQK])
        q = q.load(gl.DotOperandLayout(0, s_layout, 2))
        q_1 = q_1_smem.index(CONSUMER).reshape([ROWS, BLOCK_DQK_1])
        q_1 = q_1.load(gl.DotOperandLayout(0, s_layout, 2))
        # The last tile of keys starts the sums.
        j = hi - 1
        n = j * BLOCK_N
        stage = step % NUM_STAGES
        wait(k_full.index(stage), step // NUM_STAGES & 1)
        qk = scores(
            q,
            k_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK]),
            q_1,
            k_1_smem.index(stage).reshape([BLOCK_N, BLOCK_DQK_1]),
            ROWS,
            BLOCK_N,
        )
        qk = mma_wait(0, deps=[qk])
        arrive(k_empty.index(stage))
        # Not before: a barrier does not wait for loads that nobody has used, which a copy overtakes.
        arrive(q_empty.index(CONSUMER))
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
        for i in range(hi - 1 - gl.minimum(gl.maximum(full_hi, lo), hi - 1)):
            j -= 1
            n = j * BLOCK_N
            acc, l_i, m_i, p = attend(
                acc,
                l_i,
                m_i,
                p,
                q,
                q_1,
                k_ring,
                v_ring,
                step,
                off_z,
                off_h,
                offs_m,
                n,
                True,
                qk_scale,
                SEQLEN_Q,
                SEQLEN_K,
                CONSUMER,
                HEAD_DIM_V,
                BLOCK_DQK,
                BLOCK_DQK_1,
                BLOCK_DV,
                ROWS,
                BLOCK_N,
                NUM_STAGES,
                PAGE_SIZE,
            )
            step += 1
        for i in range(gl.minimum(hi - 1, full_hi) - lo):
            j -= 1
            n = j * BLOCK_N
            acc, l_i, m_i, p = attend(
                acc,
                l_i,
                m_i,
                p,
                q,
                q_1,
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
                HEAD_DIM_V,
                BLOCK_DQK,
                BLOCK_DQK_1,
                BLOCK_DV,
                ROWS,
                BLOCK_N,
                NUM_STAGES,
                PAGE_SIZE,
            )
            step += 1
        before = (step - 1) % NUM_STAGES
        wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)
        acc = mma(
            p,
            v_smem.index(before).reshape([BLOCK_N, BLOCK_DV]),
            acc,
        )
        acc = mma_wait(0, deps=[acc])
        arrive(v_empty.index(before))
        l_i = gl.convert_layout(gl.sum(l_i, 1), m_i.type.layout)
        if slot < 0:
            write_rows(
                acc,
                l_i,
                m_i,
                off_z,
                off_h,
                start_m,
                out_ptr,
                stride_oz,
                stride_oh,
                stride_om,
                SEQLEN_Q,
                HEAD_DIM_V,
                BLOCK_DV,
            )
        else:
            # Other programs have other keys of these rows.
            store_part(
                acc,
                l_i,
                m_i,
                partial_ptr,
                slot * 2 + CONSUMER,
                ROWS,
                BLOCK_DV,
            )
            meet()
            arrivals = arrivals_ptr + tile * 2 + CONSUMER
            arrived = gl.atomic_add(arrivals, 1, sem="acq_rel")
            others = (last_program - first_program) // lanes
            merges = arrived == others
            if waits != 0:
                merges = ends != 0
                if merges:
                    while arrived < others:
                        arrived = gl.atomic_add(arrivals, 0, sem="acquire") - 1
            if merges:
                merge_parts(
                    partial_ptr,
                    first_program,
                    last_program,
                    lanes,
                    first_slot,
                    member,
                    members,
                    off_z,
                    off_h,
                    start_m,
                    out_ptr,
                    stride_oz,
                    stride_oh,
                    stride_om,
                    SEQLEN_Q,
                    CONSUMER,
                    ROWS,
                    HEAD_DIM_V,
                    BLOCK_DV,
                )
                # The last to leave sets the counter back for the next launch.
                left = others + members
                if waits != 0:
                    left = gl.atomic_add(arrivals, 1, sem="relaxed")
                if left == others + members:
                    gl.store(arrivals, 0)
        turn += 1
        wait(tile_full.index(turn & 1), turn // 2 & 1)
        numbers = get_numbers(tile_smem.index(turn & 1))
        arrive(tile_empty.index(turn & 1))
        more = number_of(numbers, 0) != 0
        off_z = number_of(numbers, 1)
        off_h = number_of(numbers, 2)
        start_m = number_of(numbers, 3)
        SEQLEN_K = number_of(numbers, 4)
        lo = number_of(numbers, 5)
        hi = number_of(numbers, 6)
        slot = number_of(numbers, 7)
        tile = number_of(numbers, 8)
        first_slot = number_of(numbers, 9)
        first_program = number_of(numbers, 10)
        last_program = number_of(numbers, 11)
        member = number_of(numbers, 12)
        members = number_of(numbers, 13)
        ends = number_of(numbers, 14)


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
def append_rows(
    k_ptr,
    v_ptr,
    k_new_ptr,
    v_new_ptr,
    cache_seqlens_ptr,
    lengths_ptr,
    batch,
    nheads_kv,
    seqlen_new,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_k_new_z,
    stride_k_new_h,
    stride_k_new_n,
    stride_v_new_z,
    stride_v_new_h,
    stride_v_new_n,
    page_table_ptr,
    step_pages,
    q_ptr,
    q_turned_ptr,
    stride_qz,
    stride_qh,
    stride_qm,
    nheads_q,
    SEQLEN_Q,
    rotary_cos_ptr,
    rotary_sin_ptr,
    step_rotary,
    rotary_dim,
    HEAD_DIM_QK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DQK_1: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Write what is new into the caches and say how long they are then; turn queries and new keys by their positions."""
    program = tl.program_id(0)
    if program < batch:
        used = tl.load(cache_seqlens_ptr + program)
        tl.store(lengths_ptr + program, used + seqlen_new)
    num_new = tl.cdiv(seqlen_new, BLOCK_NEW)
    if program < batch * nheads_kv * num_new:
        # Some new rows of a key/value head.
        first_new = program % num_new * BLOCK_NEW
        off_hkv = program // num_new % nheads_kv
        off_z = program // num_new // nheads_kv
        off_b = off_z.to(tl.int64)
        cached = tl.load(cache_seqlens_ptr + off_z)
        offs_new = first_new + tl.arange(0, BLOCK_NEW)
        is_new = offs_new < seqlen_new
        pages = page_table_ptr + off_b * step_pages
        k_head = k_ptr + off_hkv.to(tl.int64) * stride_kh
        v_head = v_ptr + off_hkv.to(tl.int64) * stride_vh
        k_new = k_new_ptr + off_hkv.to(tl.int64) * stride_k_new_h
        k_new += off_b * stride_k_new_z
        v_new = v_new_ptr + off_hkv.to(tl.int64) * stride_v_new_h
        v_new += off_b * stride_v_new_z
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
    else:
        # Some queries of a head.
        program -= batch * nheads_kv * num_new
        num_m = tl.cdiv(SEQLEN_Q, BLOCK_NEW)
        offs_m = program % num_m * BLOCK_NEW + tl.arange(0, BLOCK_NEW)
        off_h = program // num_m % nheads_q
        off_z = program // num_m // nheads_q
        is_row = offs_m < SEQLEN_Q
        cached = tl.load(cache_seqlens_ptr + off_z)
        q_rows = off_z.to(tl.int64) * stride_qz + off_h.to(tl.int64) * stride_qh
        q_rows += offs_m.to(tl.int64) * stride_qm
        turned_rows = (off_z * nheads_q + off_h).to(tl.int64) * SEQLEN_Q + offs_m
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
        store_rows(
            q_turned_ptr,
            turned_rows * HEAD_DIM_QK,
            is_row,
            q,
            HEAD_DIM_QK,
            BLOCK_DQK,
        )
        q = load_rotated(
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
        store_rows(
            q_turned_ptr + BLOCK_DQK,
            turned_rows * HEAD_DIM_QK,
            is_row,
            q,
            HEAD_DIM_QK - BLOCK_DQK,
            BLOCK_DQK_1,
        )


@gluon.jit
def attn_decode(
    q_desc,
    q_1_desc,
    k_desc,
    k_1_desc,
    v_desc,
    out_ptr,
    stride_oz,
    stride_oh,
    stride_om,
    qk_scale,
    batch,
    nheads_q,
    group,
    SEQLEN_Q,
    rows_k,
    rows_v,
    splits,
    lanes,
    waits,
    min_blocks,
    cache_seqlens_ptr,
    partial_ptr,
    arrivals_ptr,
    page_table_ptr,
    step_pages,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_DQK: gl.constexpr,
    BLOCK_DQK_1: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    # Prologue: shared memory, and barriers for each buffer: one says full, one empty.
    q_smem = gl.allocate_shared_memory(
        q_desc.dtype,
        [2, 1, 1, ROWS, BLOCK_DQK],
        q_desc.layout,
    )
    k_smem = gl.allocate_shared_memory(
        k_desc.dtype,
        [NUM_STAGES, 1, 1, 1, BLOCK_N, BLOCK_DQK],
        k_desc.layout,
    )
    q_1_smem = gl.allocate_shared_memory(
        q_desc.dtype,
        [2, 1, 1, ROWS, BLOCK_DQK_1],
        q_1_desc.layout,
    )
    k_1_smem = gl.allocate_shared_memory(
        k_desc.dtype,
        [NUM_STAGES, 1, 1, 1, BLOCK_N, BLOCK_DQK_1],
        k_1_desc.layout,
    )
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype,
        [NUM_STAGES, 1, 1, 1, BLOCK_N, BLOCK_DV],
        v_desc.layout,
    )
    q_full = barriers(2, 1)
    q_empty = barriers(2, 1)
    k_full = barriers(NUM_STAGES, 1)
    k_empty = barriers(NUM_STAGES, 2)
    v_full = barriers(NUM_STAGES, 1)
    v_empty = barriers(NUM_STAGES, 2)
    tile_smem = gl.allocate_shared_memory(
        gl.int32,
        [2, 16],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
    )
    tile_full = barriers(2, 1)
    tile_empty = barriers(2, 2)

    q_ring = (q_smem, q_1_smem, q_full, q_empty)
    k_ring = (k_smem, k_1_smem, k_full, k_empty)
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
                    out_ptr,
                    stride_oz,
                    stride_oh,
                    stride_om,
                    qk_scale,
                    nheads_q,
                    SEQLEN_Q,
                    lanes,
                    waits,
                    partial_ptr,
                    arrivals_ptr,
                    0,
                    HEAD_DIM_V,
                    BLOCK_DQK,
                    BLOCK_DQK_1,
                    BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    PAGE_SIZE,
                ),
            ),
            (
                consumer,
                (
                    q_ring,
                    k_ring,
                    v_ring,
                    tile_ring,
                    out_ptr,
                    stride_oz,
                    stride_oh,
                    stride_om,
                    qk_scale,
                    nheads_q,
                    SEQLEN_Q,
                    lanes,
                    waits,
                    partial_ptr,
                    arrivals_ptr,
                    1,
                    HEAD_DIM_V,
                    BLOCK_DQK,
                    BLOCK_DQK_1,
                    BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    PAGE_SIZE,
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
                    q_1_desc,
                    k_desc,
                    k_1_desc,
                    v_desc,
                    batch,
                    nheads_q,
                    group,
                    rows_k,
                    rows_v,
                    lanes,
                    waits,
                    SEQLEN_Q,
                    splits,
                    min_blocks,
                    cache_seqlens_ptr,
                    page_table_ptr,
                    step_pages,
                    HEAD_DIM_V,
                    BLOCK_DQK,
                    BLOCK_DQK_1,
                    BLOCK_DV,
                    ROWS,
                    BLOCK_N,
                    NUM_STAGES,
                    PAGE_SIZE,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
