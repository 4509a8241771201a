"""Backends on torch's own kernels: the floor, the compiled floor, cuBLASLt's scaled matmul."""
