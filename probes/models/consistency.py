"""Whether the tensors of a checkpoint, its layers and its configuration fit together."""

from __future__ import annotations

from pathlib import Path

from .agreement import contradictions
from .checkpoint import Checkpoint
from .config import read_config
from .fusion import fuse
from .headers import TensorHeader
from .layers import fusion_facts
from .place import find_files
from .soundness import Surroundings
from .stored import stored_modules
from .weights import unpaired


def surroundings(path: Path, checkpoint: Checkpoint) -> Surroundings:
    """What is known of the checkpoint at `path` besides its FP4 weights.

    Raises ValueError, one sentence, for a configuration that cannot be read.
    """
    config = read_config(find_files(path))
    tensors = {
        entry.name: TensorHeader(entry.dtype, entry.shape, (0, entry.nbytes))
        for entry in checkpoint.entries.values()
    }
    modules = stored_modules([tensors], config.number("hidden_size") if config else None)
    mixed: dict[str, str] = {}
    fused = 0
    for layer, made_of in fuse(modules, fusion_facts(config)).layers.items():
        for members in made_of:
            fused += len(members) > 1
            name = f"{members[0].parent}.{{{','.join(m.leaf for m in members)}}}"
            if layer.format.format == "mixed":
                mixed[name] = layer.fault
            elif "the experts differ" in layer.fault:
                mixed[members[0].name] = layer.fault
    quantised = bool(config and config.quantisation)
    return Surroundings(
        unpaired(checkpoint),
        mixed,
        contradictions(modules, config),
        fused,
        len(modules) if quantised else 0,
    )
