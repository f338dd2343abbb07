"""What rendered Gluon kernels are written in, whatever Triton calls it; imported by those kernels alone."""
