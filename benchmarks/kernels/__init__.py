"""The kernels alone, on one large matrix."""
