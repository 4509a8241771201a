"""What the installed vLLM computes routed experts with, from its own source.

The function that selects a backend of its fused experts is evaluated (`evaluate`), for one rank
without expert parallelism. What was looked at: 0.24 to 0.33. Standard library only.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .asked import Configured, LayerKind, NotTaken, Unclear
from .evaluate import Evaluator
from .names import GROUPED_SUFFIX, INSTALLED_SUFFIX
from .source import SourceTree
from .values import CannotTell, ClassOf, EngineRefuses, External, Given, Member

OPTION, FIELD = "--moe-backend", "moe_backend"
GEMM_TYPE = "VLLM_HUMMING_MOE_GEMM_TYPE"
HUMMING_SUFFIXES = {"indexed": "", "grouped_contiguous": GROUPED_SUFFIX}
AUTO = "auto"

_FUSED = "vllm.model_executor.layers.fused_moe"
_QUANT_KEYS = "vllm.model_executor.layers.quantization.utils.quant_utils"
_ARGS, _CONFIG = "vllm.engine.arg_utils", "vllm.config.kernel"
_ENVS = "vllm.envs"
_MAPS = {"nvfp4": "map_nvfp4_backend", "mxfp4": "map_mxfp4_backend"}
_ACTIVATIONS = {
    "swiglu": ("SILU", None),
    "swiglu-oai": ("SWIGLUOAI", None),
    "swiglu-oai-unbiased": ("SWIGLUOAI_UNINTERLEAVE", 7.0),
    "swiglu-10": ("SILU", 10.0),
    "relu2": ("RELU2_NO_MUL", None),
}
"""By gate: vLLM's activation, and the limit that gate and up are clamped to."""
_ALONE = {"ep_size": 1, "tp_size": 1, "dp_size": 1, "enable_eplb": False}
_HUMMING_TYPES = {
    name.upper(): Given(name, {"value": name})
    for name in ("indexed", "grouped_contiguous", "grouped_masked")
}


class VllmExperts:
    """What a vLLM says of its routed experts. `says` is its name and version."""

    def __init__(
        self,
        tree: SourceTree,
        evaluator: Callable[[LayerKind, Configured], Evaluator],
        says: str,
    ) -> None:
        self._tree = tree
        self._evaluator = evaluator
        self._says = says

    @property
    def words(self) -> frozenset[str] | None:
        """The values of ``--moe-backend``; empty without the option, None if unreadable."""
        if f'"{OPTION}"' not in self._tree.text(_ARGS):
            return frozenset()
        place = self._tree.module(_CONFIG)
        for node in place.binding("MoEBackend") if place else []:
            value = getattr(node, "value", None)
            parts = getattr(value, "slice", None)
            if isinstance(parts, ast.Tuple):
                found = [each.value for each in parts.elts if isinstance(each, ast.Constant)]
                return frozenset(map(str, found)) if len(found) == len(parts.elts) else None
        return None

    overrides: tuple[str, ...] = ()

    def setting(self, word: str, kind: LayerKind) -> Configured:
        """What makes it run `word`. Raises NotTaken, Unclear."""
        option, _, more = word.partition(":")
        env = {GEMM_TYPE: more or "indexed"} if option == "humming" and self._has_type else {}
        made = Configured((OPTION, option), env)
        runs = self.runs(kind, made, option)
        if runs != word:
            raise NotTaken(f"{self._says} would run {runs} where {word} is asked for")
        return made

    @property
    def _has_type(self) -> bool:
        """Whether a variable tells humming's types of GEMM apart."""
        place = self._tree.module(_ENVS)
        return place is not None and place.entry("environment_variables", GEMM_TYPE) is not None

    def runs(self, kind: LayerKind, configured: Configured, asked: str = AUTO) -> str:
        """The word for what it runs, where it was `asked` for a word or left at auto. Raises
        Unclear, and NotTaken where it does not start so."""
        words = self.words
        if words is None:
            raise Unclear(f"the words that {OPTION} of {self._says} takes cannot be read")
        if not words:
            raise Unclear(f"{self._says} has no {OPTION}")
        if asked not in words:
            raise NotTaken(f"{OPTION} of {self._says} does not know {asked}")
        try:
            return self._selected(kind, configured, asked)
        except EngineRefuses as error:
            raise NotTaken(f"{self._says} does not start so: {error}") from None
        except CannotTell as error:
            what = f"what {self._says} runs routed experts with"
            raise Unclear(f"{what} cannot be told from its source: {error}") from None

    def _selected(self, kind: LayerKind, configured: Configured, asked: str) -> str:
        evaluator = self._evaluator(kind, configured)
        evaluator.facts |= {
            "scalar_types": Given("the scalar types", {}),
            "GemmType": Given("humming's types of GEMM", _HUMMING_TYPES),
        }
        config = self._moe_config(evaluator, kind, asked)
        module = f"{_FUSED}.oracle.{kind.format}"
        if kind.format == "nvfp4":
            weight = evaluator.known(_QUANT_KEYS, "kNvfp4Static")
            # A checkpoint that is W4A16 says no activation; before SM100 nothing has FP4 ones.
            activation = None if kind.weight_only else evaluator.known(_QUANT_KEYS, "kNvfp4Dynamic")
            found = evaluator.call(module, "select_nvfp4_moe_backend", config, weight, activation)
        elif kind.gate == "swiglu-10":
            found = evaluator.call(module, "select_deepseek_v4_mxfp4_moe_backend", config)
        else:
            found = evaluator.call(module, "select_mxfp4_moe_backend", config)
        backend = found[0] if isinstance(found, list | tuple) and found else None
        if not isinstance(backend, Member):
            raise CannotTell("it selects no backend that is known here")
        word = self._word(evaluator, kind, backend)
        if word == "humming":
            return word + self._humming_type(evaluator, found[1])
        installed = word.startswith("triton") and self._tree.python.has_module("triton_kernels")
        return word + INSTALLED_SUFFIX if installed else word

    def _humming_type(self, evaluator: Evaluator, experts: Any) -> str:
        """What stands behind humming's word: nothing where its GEMMs are indexed."""
        if not isinstance(experts, ClassOf):
            raise CannotTell("the class of humming's experts is not known")
        found = evaluator.ask(experts.module.name, experts.name, "humming_gemm_type")
        if not isinstance(found, Given):
            raise CannotTell("the type of humming's GEMMs is not known")
        return HUMMING_SUFFIXES.get(found.name, f":{found.name}")

    def _word(self, evaluator: Evaluator, kind: LayerKind, backend: Member) -> str:
        """The option's word for a member of its enumeration of backends."""
        module = f"{_FUSED}.oracle.{kind.format}"
        for word in sorted(self.words or ()):
            try:
                meant = evaluator.call(module, _MAPS[kind.format], word)
            except EngineRefuses:
                continue
            if backend is meant or (isinstance(meant, list) and any(backend is m for m in meant)):
                return word
        return str(backend.value).lower()

    def _moe_config(self, evaluator: Evaluator, kind: LayerKind, asked: str) -> Given:
        name, limit = _ACTIVATIONS[kind.gate or "swiglu"]
        activations = evaluator.known(f"{_FUSED}.activation", "MoEActivation")
        routing = evaluator.known(f"{_FUSED}.config", "RoutingMethodType")
        return Given(
            "the experts' configuration",
            {
                FIELD: asked,
                "swiglu_limit": limit,
                "moe_parallel_config": _OneRank(
                    "one rank", {"ep_size": 1, "tp_size": 1, "dp_size": 1, "enable_eplb": False}
                ),
                "is_act_and_mul": kind.gate != "relu2",
                "activation": evaluator.attribute(activations, name),
                "has_hash_routing": False,
                "require_decomposed_backend": False,
                "is_lora_enabled": False,
                "router_logits_dtype": External("torch.bfloat16"),
                "routing_method": evaluator.attribute(routing, "Renormalize"),
            },
        )


class _OneRank(Given):
    """The parallel configuration of one rank: it uses no kernels of an all-to-all."""

    def attribute(self, name: str) -> Any:
        return False if name.startswith("use_") else super().attribute(name)
