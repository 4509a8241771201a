"""The libraries' documented contracts on a CPU: what each reads from the bytes it is given.

Blackwell's FP4 GEMMs cannot run here, but what they expect of their operands is documented. Each
module stands in for one library's entry point: it checks the arguments that the library checks,
reads every byte from where the documentation says it lies, and multiplies in float64. An adapter
that swizzles, shuffles, transposes, pads or scales wrongly then gives wrong numbers.

Nothing of fp4tune is imported: what it believes is what is tested.
"""
