"""What the installed SGLang computes routed experts with, from its own source.

Its override for the model, and the method that makes the runner, are evaluated (`evaluate`). What
was looked at: 0.5.10 to 0.5.23. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .asked import Configured, LayerKind, NotTaken, Unclear
from .builtin import Lifted
from .evaluate import Evaluator
from .names import GROUPED_SUFFIX
from .source import SourceTree
from .values import CannotTell, EngineRefuses, Given, Made, Member

OPTION, FIELD = "--moe-runner-backend", "moe_runner_backend"
GEMM_TYPE = "SGLANG_HUMMING_MOE_GEMM_TYPE"
HUMMING_SUFFIXES = {"indexed": "", "grouped_contiguous": GROUPED_SUFFIX}
PRECISION = "--flashinfer-mxfp4-moe-precision"
AUTO = "auto"

_ARGS = "sglang.srt.server_args"
_CHOICES = ("sglang.srt.arg_groups.choices", _ARGS)
_OVERRIDES = "sglang.srt.arg_groups.overrides"
_ENVIRON = "sglang.srt.environ"
_HUMMING = "sglang.srt.layers.moe.moe_runner.humming"
_UTILS = "sglang.srt.layers.moe.utils"
_QUANTIZATION = "sglang.srt.layers.quantization"
_BY_QUANTIZATION = "_moe_runner_backend_quant_constraints"
_ARCHITECTURES = {
    ("mxfp4", "swiglu-oai"): ("GptOssForCausalLM", "gpt_oss"),
    ("mxfp4", "swiglu-10"): ("DeepseekV4ForCausalLM", "deepseek_v4"),
}
"""By format and gate: the model that has such experts, and the module of its overrides."""
_RUNNERS = {
    "Mxfp4MarlinMoEMethod": "marlin",
    "Mxfp4HummingMoEMethod": "humming",
    "Mxfp4FlashinferCutlassMoEMethod": "flashinfer_mxfp4",
    "Mxfp4FlashinferTrtllmMoEMethod": "flashinfer_mxfp4",
}
"""What DeepSeek V4's FP4 experts are computed by, by the method's class."""

MakesEvaluator = Callable[[LayerKind | None, Configured | None, Mapping[str, Any]], Evaluator]


class SGLangExperts:
    """What an SGLang says of its routed experts. `says` is its name and version."""

    def __init__(self, tree: SourceTree, evaluator: MakesEvaluator, says: str) -> None:
        self._tree = tree
        self._evaluator = evaluator
        self._says = says

    @property
    def words(self) -> frozenset[str] | None:
        """The values of ``--moe-runner-backend``; empty without the option, None if unreadable."""
        for module in _CHOICES:
            place = self._tree.module(module)
            if place is None or not place.binding("MOE_RUNNER_BACKEND_CHOICES"):
                continue
            try:
                found = self._evaluator(None, None, {}).value(module, "MOE_RUNNER_BACKEND_CHOICES")
            except (CannotTell, EngineRefuses):
                return None
            return frozenset(found) if isinstance(found, list | tuple) else None
        return frozenset() if self._tree.module(_ARGS) is not None else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """Models for which it sets the option itself where that was left at auto."""
        found: list[str] = []
        for module in self._tree.within(_OVERRIDES.rpartition(".")[0]):
            for part in re.split(r"^@", self._tree.text(module), flags=re.M)[1:]:
                if re.search(rf'"{FIELD}"(?:: |\] = )', part):
                    head = part.partition("def ")[0]
                    found += re.findall(r'"([A-Za-z0-9_]+For[A-Za-z]+)"', head)
        return tuple(dict.fromkeys(found))

    def setting(self, word: str, kind: LayerKind) -> Configured:
        """What makes it run `word`. Raises NotTaken, Unclear."""
        option, _, more = word.partition(":")
        env = {GEMM_TYPE: more or "indexed"} if option == "humming" and self._has_type else {}
        made = Configured((OPTION, option), env)
        runs = self.runs(kind, made)
        if runs != word:
            raise NotTaken(f"{self._says} would run {runs} where {word} is asked for")
        return made

    @property
    def _has_type(self) -> bool:
        """Whether a variable tells humming's types of GEMM apart."""
        return f"    {GEMM_TYPE} = Env" in self._tree.text(_ENVIRON)

    def runs(self, kind: LayerKind, configured: Configured) -> str:
        """The word for what it runs. Raises Unclear, and NotTaken where it does not start so."""
        words = self.words
        if words is None:
            raise Unclear(f"the words that {OPTION} of {self._says} takes cannot be read")
        if not words:
            raise Unclear(f"{self._says} has no {OPTION}")
        asked = configured.options().get(OPTION) or AUTO
        if asked not in words:
            raise NotTaken(f"{OPTION} of {self._says} does not know {asked}")
        try:
            word = self._resolved(kind, configured) if asked == AUTO else asked
            found = self._runner(kind, configured, word)
            return found + self._humming_type(kind, configured) if found == "humming" else found
        except EngineRefuses as error:
            raise NotTaken(f"{self._says} does not start so: {error}") from None
        except CannotTell as error:
            what = f"what {self._says} runs routed experts with"
            raise Unclear(f"{what} cannot be told from its source: {error}") from None

    def _humming_type(self, kind: LayerKind, configured: Configured) -> str:
        """What stands behind humming's word: nothing where its GEMMs are indexed."""
        types = {
            name.upper(): Given(name, {"value": name})
            for name in ("indexed", "grouped_contiguous", "grouped_masked")
        }
        facts = {"HummingGemmType": Given("humming's types of GEMM", types)}
        evaluator = self._evaluator(kind, configured, facts)
        found = evaluator.call(_HUMMING, "get_standard_humming_moe_gemm_type")
        if not isinstance(found, Given):
            raise CannotTell("the type of humming's GEMMs is not known")
        return HUMMING_SUFFIXES.get(found.name, f":{found.name}")

    def _resolved(self, kind: LayerKind, configured: Configured) -> str:
        """What auto becomes when arguments are looked at; auto where it stays so."""
        model = _ARCHITECTURES.get((kind.format, kind.gate or ""))
        if model is None and kind.format != "nvfp4":
            raise CannotTell("which of its models has such experts is not known")
        if model is None:
            return self._by_quantization(kind, configured)
        architecture, file = model
        for module in (f"sglang.srt.arg_groups.model_overrides.{file}", _OVERRIDES):
            function = _registered(self._tree.text(module), architecture)
            if function is None:
                continue
            evaluator = self._with_options(kind, configured)
            config = _model(architecture, kind.format)
            view = evaluator.facts["server_args"]
            found = evaluator.call(module, function, view, config)
            if not isinstance(found, dict):
                raise CannotTell(f"its override for {architecture} gives no table")
            return str(found.get(FIELD, AUTO))
        raise CannotTell(f"its override for {architecture} was not found")

    def _by_quantization(self, kind: LayerKind, configured: Configured) -> str:
        place = self._tree.module(_OVERRIDES)
        if place is None or not place.binding(_BY_QUANTIZATION):
            raise CannotTell("how it resolves auto was not found")
        evaluator = self._with_options(kind, configured)
        view = evaluator.facts["server_args"]
        found = evaluator.call(_OVERRIDES, _BY_QUANTIZATION, view)
        if not isinstance(found, dict):
            raise CannotTell("its rule for the quantization gives no table")
        return str(found.get(FIELD, AUTO))

    def _with_options(self, kind: LayerKind, configured: Configured) -> Evaluator:
        found = Given(
            "the model's configuration",
            {"nvfp4_moe_meta": None, "is_fp4_experts": kind.format == "mxfp4"},
        )
        view = _options(kind)
        view.facts |= {
            "get_model_config": Lifted(lambda ev: found),
            "is_attention_backend_not_set": Lifted(lambda ev: True),
        }
        facts = {
            "server_args": view,
            "resolving_view": Lifted(lambda ev, args: view),
            "resolved_view": Lifted(lambda ev, args: view),
            "model_config_of": Lifted(lambda ev, args: found),
            "is_cpu": Lifted(lambda ev: False),
            "is_xpu": Lifted(lambda ev: False),
            "is_mps": Lifted(lambda ev: False),
            "use_mlx": Lifted(lambda ev: False),
        }
        return self._evaluator(kind, configured, facts)

    def _runner(self, kind: LayerKind, configured: Configured, word: str) -> str:
        """The runner that the method of these experts makes."""
        made: list[Any] = []

        def record(evaluator: Any, backend: Any, *rest: Any, **named: Any) -> Any:
            made.append(backend)
            return Given("the runner", {})

        precision = configured.options().get(PRECISION, "default")
        moe = Given("the options of experts", {"flashinfer_mxfp4_moe_precision": precision})
        facts: dict[str, Any] = {
            "MoeRunner": Lifted(record),
            "get_exec": Lifted(lambda ev: Given("the options", {"moe": moe})),
            "get_global_server_args": Lifted(lambda ev: moe),
        }
        evaluator = self._evaluator(kind, configured, facts)
        backend = evaluator.call(_UTILS, "MoeRunnerBackend", word)
        nowhere = evaluator.call(_UTILS, "MoeA2ABackend", "none")
        evaluator.facts["get_moe_runner_backend"] = Lifted(lambda ev: backend)
        evaluator.facts["get_moe_a2a_backend"] = Lifted(lambda ev: nowhere)
        if kind.format == "mxfp4" and kind.gate != "swiglu-oai":
            return self._by_method(evaluator)
        name, owner, args = ("modelopt_quant", "ModelOptNvFp4FusedMoEMethod", "its config")
        if kind.format == "mxfp4":
            name, owner, args = ("mxfp4", "Mxfp4MoEMethod", "")
        first = Given(args, {}) if args else args
        method = evaluator.make(f"{_QUANTIZATION}.{name}", owner, first)
        gated = Given("its configuration", {"is_gated": kind.gate != "relu2"})
        evaluator.send(method, "create_moe_runner", Given("the layer", {}), gated)
        if len(made) != 1 or not isinstance(made[0], Member):
            raise CannotTell("the runner that it makes was not found")
        found = str(made[0].value)
        fp8 = found == "flashinfer_mxfp4" and precision == "fp8" and kind.sm == 90
        return f"{found}:fp8" if fp8 else found

    def _by_method(self, evaluator: Evaluator) -> str:
        """By the method that DeepSeek V4's configuration gives a layer of experts."""
        module = f"{_QUANTIZATION}.fp8"
        layer = evaluator.call("sglang.srt.layers.moe.fused_moe_triton.layer", "FusedMoE")
        config = evaluator.make(module, "Fp8Config")
        config.attributes |= {
            "is_fp4_experts": True,
            "is_dsv4_fp4_experts": True,
            "dequant_fp4_to_fp8": False,
            "ignored_layers": [],
            "packed_modules_mapping": {},
        }
        found = evaluator.send(config, "get_quant_method", layer, "model.layers.0.mlp.experts")
        word = _RUNNERS.get(found.owner.name) if isinstance(found, Made) else None
        if word is None:
            name = found.owner.name if isinstance(found, Made) else "none that is known"
            raise CannotTell(f"its method for them is {name}")
        return word


def _registered(text: str, architecture: str) -> str | None:
    """The function that a text registers as the override for an architecture."""
    for found in re.finditer(r"^@\w+\(([^@]*?)\)\ndef (\w+)\(", text, re.M):
        if f'"{architecture}"' in found[1]:
            return found[2]
    return None


def _options(kind: LayerKind) -> Given:
    """The options of a start on one rank that says nothing but the model."""
    return Given(
        "the options",
        {
            FIELD: AUTO,
            "quantization": "modelopt_fp4" if kind.format == "nvfp4" else None,
            "moe_a2a_backend": "none",
            "ep_size": 1,
            "device": "cuda",
            "dtype": "auto",
            "attention_backend": None,
            "prefill_attention_backend": None,
            "decode_attention_backend": None,
            "swa_full_tokens_ratio": None,
            "fp8_gemm_runner_backend": AUTO,
        },
    )


def _model(architecture: str, format_: str) -> Given:
    method = {"quant_method": "mxfp4" if architecture.startswith("GptOss") else "fp8"}
    return Given(
        "the model",
        {"architectures": [architecture], "quantization_config": method, "model_type": None},
    )
