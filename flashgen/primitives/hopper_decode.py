"""What decoding on Hopper needs beside `flashgen.primitives.hopper`, on whose text tuned forward kernels depend."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Later versions of Triton have the first name, 3.6 the second.
meet = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def row_layout(columns):
    """Return a layout of a warpgroup in which each row is in one warp."""
    return gl.BlockedLayout([1, max(1, columns // 32)], [1, 32], [4, 1], [1, 0])


@gluon.jit
def add(x, y):
    """Return a sum, for scans."""
    return x + y
