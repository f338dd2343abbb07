"""Hopper's hardware as rendered Gluon kernels name it: one place for the names that differ between Triton versions.

Copies are bulk copies (TMA) that signal an mbarrier; products are those of a warpgroup (wgmma) and asynchronous.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Later versions of Triton have the first of each pair of names, 3.6 the second.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait
wait = mbarrier.wait
expect = mbarrier.expect
mma_wait = warpgroup_mma_wait

_WARPGROUP = gl.constexpr(128)
_WARP = gl.constexpr(32)

# Named barriers, of which a program has 16; Triton takes 0 to 4 for up to three consumers and a producer.
K_BUFFERS = gl.constexpr(5)
V_BUFFERS = gl.constexpr(9)
_TURNS = gl.constexpr(13)

RAGGED = gl.constexpr(2**30)
"""Where packed sequences end in their descriptors, see `flashgen.launch.ragged`."""


@gluon.constexpr_function
def product_layout(columns):
    """Return the layout of a warpgroup's product of 16-bit operands."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Return `count` mbarriers, each of which `arrivals` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def arrive(bar, pred=True):
    """Arrive at a barrier once."""
    mbarrier.arrive(bar, count=1, pred=pred)


@gluon.jit
def mma(a, b, acc):
    """Start acc += a b; the result may be used after `mma_wait` alone."""
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def mma_first(a, b, acc):
    """Start a b; what `acc` holds does not matter."""
    return warpgroup_mma(a, b, acc, use_acc=False, is_async=True)


@gluon.jit
def write_tile(desc, coordinates, buffer, value):
    """Start writing a tile from registers through a shared buffer, once the buffer's last tile has left."""
    store_wait(0)
    buffer.reshape(value.shape).store(value)
    fence_async_shared()
    store_tile(desc, coordinates, buffer)


@gluon.jit
def put_numbers(buffer, numbers, COUNT: gl.constexpr):
    """Write a tuple of COUNT numbers into a shared buffer of int32, by one warp; the rest of it is 0."""
    layout: gl.constexpr = gl.BlockedLayout([buffer.shape[0]], [32], [1], [0])
    place = gl.arange(0, buffer.shape[0], layout)
    values = gl.zeros_like(place)
    for i in gl.static_range(COUNT):
        values = gl.where(place == i, numbers[i], values)
    buffer.store(values)


@gluon.jit
def get_numbers(buffer):
    """Return what a shared buffer of int32 holds, to every thread of a warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([buffer.shape[0]], [32], [4], [0])
    return buffer.load(layout)


@gluon.jit
def number_of(numbers, i: gl.constexpr):
    """Return one of the numbers of `get_numbers`."""
    place = gl.arange(0, numbers.shape[0], numbers.type.layout)
    return gl.sum(gl.where(place == i, numbers, 0), 0)


@gluon.jit
def hold(sums):
    """Let nothing that comes later, and waits, start before these sums of positive numbers are known.

    The assembler would move the wait for a product up to where its result could be used, before what was to be computed
    beside it. It keeps barriers in order, so here is one that waits for the sums and is never executed.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .f32 x; min.f32 x, $2, $3; setp.lt.f32 p, x, 0f00000000; @p bar.arrive 15, 128; "
        "mov.b32 $0, 0; mov.b32 $1, 0; }",
        "=r,=r,f,f",
        [sums],
        gl.int32,
        False,
        2,
    )


@gluon.jit
def row_of(x, tile):
    """Return a value of each row as a column that broadcasts over a tile."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout)), 1)


@gluon.jit
def opaque(number):
    """Return an int32 of which the compiler knows nothing: what follows from it is computed here, not earlier."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def own_sums(p, COLUMNS: gl.constexpr):
    """Return the row sums of each thread's own columns of a product's result: four a row, added up once at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def widen(p, layout: gl.constexpr):
    """Return a tile with as many columns of zeros to its right."""
    both = gl.permute(gl.join(p, gl.zeros_like(p)), (0, 2, 1))
    return gl.convert_layout(gl.reshape(both, [p.shape[0], 2 * p.shape[1]]), layout)


@gluon.constexpr_function
def _named(instruction, threads):
    return f"{instruction} $1, {threads}; mov.b32 $0, 0;"


@gluon.jit
def release(place, FIRST: gl.constexpr, THREADS: gl.constexpr, pred=True):
    """Arrive at named barrier FIRST + place, each warp of a warpgroup when it comes by; none waits."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if pred:
        number = gl.full([_WARPGROUP], FIRST, gl.int32, layout) + place
        gl.inline_asm_elementwise(_named("bar.arrive", THREADS), "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def claim(place, FIRST: gl.constexpr, THREADS: gl.constexpr):
    """Wait, as one warp, until all others have arrived at named barrier FIRST + place."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    number = gl.full([_WARP], FIRST, gl.int32, layout) + place
    gl.inline_asm_elementwise(_named("bar.sync", THREADS), "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def turn_wait(index):
    """Wait for this warpgroup's turn, on a named barrier of two warpgroups: one waits, the other one ends its own."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    number = gl.full([_WARPGROUP], _TURNS, gl.int32, layout) + index
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.b32 $0, 0;", "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def turn_end(index):
    """Give the turn to warpgroup `index`, without waiting for it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    number = gl.full([_WARPGROUP], _TURNS, gl.int32, layout) + index
    gl.inline_asm_elementwise("bar.arrive $1, 256; mov.b32 $0, 0;", "=r,r", [number], gl.int32, False, 1)


def _jumping_rescale(count: int) -> tuple[str, str]:
    """Return PTX that multiplies `count` registers unless all factors of the warp are 1, and its constraints.

    A row's factor stands in every register of the row; a thread holds two rows, in registers 0 and 1, and 2 and 3.
    """
    first, second = f"${2 * count}", f"${2 * count + 2}"
    one = "0f3F800000"
    lines = [
        "{ .reg .pred p, q, r;",
        f"setp.neu.f32 p, {first}, {one};",
        f"setp.neu.f32 q, {second}, {one};",
        "or.pred p, p, q;",
        "vote.sync.any.pred r, p, -1;",
        "@!r bra KEPT;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "KEPT: }",
    ]
    return " ".join(lines), ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_RESCALE, _RESCALE_CONSTRAINTS = (gl.constexpr(text) for text in _jumping_rescale(32))


@gluon.jit
def rescale_rarely(acc, alpha):
    """Return acc times a factor for each row; a warp jumps over it where all of its factors are 1."""
    factors = row_of(alpha, acc) + gl.zeros_like(acc)
    return gl.inline_asm_elementwise(_RESCALE, _RESCALE_CONSTRAINTS, [acc, factors], gl.float32, False, 32)
