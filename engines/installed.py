"""The engine that is installed: where, which version, and what its own source says it runs.

Standard library only; nothing of the engine is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Refused
from . import interpreter
from .interpreter import Interpreter
from .names import ENGINES
from .read_flashinfer import FlashInferSource
from .read_sglang import GROUP as SGLANG_GROUP
from .read_sglang import SGLangSource
from .read_vllm import GROUP as VLLM_GROUP
from .read_vllm import VllmSource

GROUPS = {"sglang": SGLANG_GROUP, "vllm": VLLM_GROUP}
"""The entry points that each engine loads plugins from."""


@dataclass(frozen=True, slots=True)
class EngineHome:
    """An engine as it is installed for one Python.

    source      what its own source says of it
    flashinfer  the FlashInfer beside it, likewise
    acts        whether this is a process of that engine, in which fp4tune's plugin may act
    """

    python: Interpreter
    source: SGLangSource | VllmSource
    flashinfer: FlashInferSource
    acts: bool = False

    @property
    def engine(self) -> str:
        return self.source.name

    @property
    def version(self) -> str | None:
        return self.source.version

    @property
    def plugin(self) -> bool:
        """Whether the engine loads fp4tune's plugin: it has plugins, and ours is beside it."""
        if not self.source.has_plugins:
            return False
        return self.acts or "fp4tune" in self.python.plugins(GROUPS[self.engine])

    @property
    def no_plugin(self) -> str:
        """Why it does not load fp4tune's plugin, in words."""
        if not self.source.has_plugins:
            return f"{self.source} loads no plugins"
        return f"fp4tune is not installed beside {self.source}, in {self.python}"

    def required(self) -> EngineHome:
        """Itself. Raises Refused where the engine is not installed: what it runs is unknown."""
        if not self.source.there:
            raise Refused(
                f"{self.engine} is not installed in {self.python}, so what it runs is unknown; "
                "name its interpreter with --python"
            )
        return self


def home(engine: str, program: str | None = None, acts: bool = False) -> EngineHome:
    """The engine of that name for the Python `program`, by default the one that runs this.

    Raises Refused for an engine that has no emission, and for a program that is no Python.
    """
    if engine not in ENGINES:
        raise Refused(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    python = interpreter.of(program)
    source = SGLangSource(python) if engine == "sglang" else VllmSource(python)
    return EngineHome(python, source, FlashInferSource(python), acts)
