"""vLLM's compiled FP4 kernels: CUTLASS (W4A4) and Marlin (W4A16)."""
