"""Whether an output is right: reference, the fused check, tile maps, diagnosis."""
