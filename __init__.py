"""fp4tune: finds, proves and remembers the fastest safe FP4 GEMM backend of this GPU."""

__version__ = "0.1.0"
