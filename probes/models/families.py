"""The linear modules that a model's config.json implies, by the modelling code of its family.

For checkpoints whose weights are not here, and for presets. Names are those of the published
weights. A family that is not known gets none: its modules are in its files.
"""

from __future__ import annotations

from .builder import ModuleBuilder
from .config import ModelConfig
from .dialects import known_family
from .hybrids import HYBRIDS
from .modules import LinearModule, Unread


def expected_modules(config: ModelConfig) -> tuple[list[LinearModule], list[Unread]]:
    """All linear modules that the configuration implies, and what of it could not be read.

    Raises ValueError, one sentence, where nothing follows from it.
    """
    if not known_family(config):
        return [], [Unread("*", f"the family {config.family[:40]!r} is not known here")]
    missing = [k for k in ("hidden_size", "num_attention_heads") if k not in config.values]
    if "hidden_size" in missing:
        raise ValueError(
            f"{config.source} is not a model's config.json: it lacks {', '.join(missing)}"
        )
    builder = ModuleBuilder(config)
    own = HYBRIDS.get(config.family)
    if own is not None:
        own(builder)
    else:
        for i in range(builder.layers):
            builder.layer(i)
        builder.drafts()
    builder.head()
    builder.towers()
    return builder.modules, builder.unread
