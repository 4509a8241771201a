"""What a checkpoint holds: its layers as an engine builds them, and whether its weights are sound.

Nothing here imports torch or an engine, apart from `soundness`, whose conditions are those of the
data that is probed.
"""
