"""The engine's own GEMMs, checked while it serves.

`vectors`, `limits` and `rows` are the mathematics, `_kernels` and `launch` the same on a GPU.
"""
