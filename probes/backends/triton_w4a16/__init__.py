"""This project's own FP4 GEMM with 16-bit activations, in Triton."""
