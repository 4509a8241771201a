"""The installed SGLang, from its own source: option, words, what it runs, plugins, tuner.

Its selection code is evaluated (`evaluate`), so a release that nobody has looked at is understood
or said not to be. What was looked at: 0.5.3 to 0.5.23. Standard library only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from .asked import Configured, LayerKind, NotTaken, Unclear
from .builtin import Lifted
from .evaluate import Evaluator
from .interpreter import Interpreter
from .read_sglang_experts import SGLangExperts
from .source import SourceTree
from .values import CannotTell, EngineRefuses, Given, Made, Member

OPTION, FIELD = "--fp4-gemm-backend", "fp4_gemm_runner_backend"
GROUP = "sglang.srt.plugins"
W4A16_SUFFIX = ":w4a16"
"""After a word: SGLang runs that backend with 16-bit activations instead."""

_FP4 = "sglang.srt.layers.quantization.fp4_utils"
_MODELOPT = "sglang.srt.layers.quantization.modelopt_quant"
_ARGS = "sglang.srt.server_args"
_CHOICES = ("sglang.srt.arg_groups.choices", _ARGS)
_ENVIRON = "sglang.srt.environ"
_VARIABLE = "SGLANG_FLASHINFER_FP4_GEMM_BACKEND"
_CUTLASS_VARIABLE = "SGLANG_USE_CUTLASS_BACKEND_FOR_FP4_GEMM"
_W4A16_VARIABLE = "SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16"
_API = {"cute-dsl": "flashinfer_cutedsl"}
"""FlashInfer's words whose option is not ``flashinfer_`` and the word."""


class SGLangSource:
    """What the SGLang of an `Interpreter` says of itself."""

    name = "sglang"

    def __init__(self, python: Interpreter) -> None:
        self.python = python
        self.tree = SourceTree(python)
        self.version = python.version("sglang")

    @property
    def experts(self) -> SGLangExperts:
        """What it says of routed experts."""
        return SGLangExperts(self.tree, self._evaluator, str(self))

    @property
    def there(self) -> bool:
        return self.python.package("sglang") is not None

    @property
    def has_plugins(self) -> bool:
        """Whether it loads plugins of the group that ours is in."""
        return f'"{GROUP}"' in self.tree.text(GROUP)

    @property
    def words(self) -> frozenset[str] | None:
        """The values of ``--fp4-gemm-backend``; empty without the option, None if unreadable."""
        for module in _CHOICES:
            place = self.tree.module(module)
            if place is None or not place.binding("FP4_GEMM_RUNNER_BACKEND_CHOICES"):
                continue
            try:
                found = self._evaluator().value(module, "FP4_GEMM_RUNNER_BACKEND_CHOICES")
            except (CannotTell, EngineRefuses):
                return None
            return frozenset(found) if isinstance(found, list | tuple) else None
        return frozenset() if self.tree.module(_ARGS) is not None else None

    @property
    def has_option(self) -> bool:
        return OPTION in self.tree.text(_ARGS) or bool(self.words)

    def setting(self, word: str, kind: LayerKind) -> Configured:
        """What makes it run `word`, by its own selection code. Raises NotTaken, Unclear."""
        if kind.gate is not None:
            return self.experts.setting(word, kind)
        if kind.format != "nvfp4":
            raise NotTaken(f"{self} has no option for {kind.format}")
        if kind.weight_only:
            return self._as_it_is(word, kind)
        if self.has_option:
            words = self.words
            if words is None:
                raise Unclear(f"the words that {OPTION} of {self} takes cannot be read")
            if word not in words:
                raise NotTaken(f"{OPTION} of {self} does not know {word}")
            made = Configured((OPTION, word))
        else:
            made = self._by_environment(word)
        runs = self.runs(kind, made)
        if runs != word:
            raise NotTaken(f"{self} would run {runs} where {word} is asked for")
        return made

    def _as_it_is(self, word: str, kind: LayerKind) -> Configured:
        runs = self.runs(kind, Configured())
        if runs != word:
            raise NotTaken(f"{self} runs W4A16 layers with {runs} whatever it is told")
        return Configured()

    def _by_environment(self, word: str) -> Configured:
        """For the releases before the option."""
        text = self.tree.text(_MODELOPT)
        if _VARIABLE in text:
            api = next((a for a, w in _API.items() if w == word), word.removeprefix("flashinfer_"))
            if not word.startswith("flashinfer_"):
                raise NotTaken(f"{self} has no word for {word}")
            return Configured((), {_VARIABLE: api})
        if _CUTLASS_VARIABLE in text:
            if word == "flashinfer_cutlass":
                return Configured((), {_CUTLASS_VARIABLE: "1"})
            return Configured((), {_CUTLASS_VARIABLE: "0"})
        raise NotTaken(f"{self} has no option for its FP4 backend")

    def runs(self, kind: LayerKind, configured: Configured) -> str:
        """The word for what it runs. Raises Unclear, and NotTaken where it does not start so."""
        if not self.there:
            raise Unclear(f"sglang is not installed in {self.python}")
        if kind.gate is not None:
            return self.experts.runs(kind, configured)
        if kind.format != "nvfp4":
            raise Unclear(f"how {self} computes {kind.format} is not read here")
        try:
            least = self._least_sm(kind, configured)
            if least is not None and kind.sm < least:
                raise NotTaken(f"{self} serves NVFP4 from SM{least} on only")
            if kind.weight_only:
                return self._weight_only()
            if self.tree.text(_FP4).find("def initialize_fp4_gemm_config") < 0:
                return self._before_the_option(kind, configured)
            return self._by_option(kind, configured)
        except EngineRefuses as error:
            raise NotTaken(f"{self} does not start so: {error}") from None
        except CannotTell as error:
            raise Unclear(f"what {self} runs cannot be told from its source: {error}") from None

    def tuned(self, configured: Configured) -> bool:
        """Whether FlashInfer's tuner may pick tactics at its start."""
        text = self.tree.text(_ARGS) + self.tree.text("sglang.srt.arg_groups.field_order")
        given = configured.options()
        if "disable_flashinfer_autotune" in text:
            return "--disable-flashinfer-autotune" not in given
        if "enable_flashinfer_autotune" in text:
            return "--enable-flashinfer-autotune" in given
        return "flashinfer_autotune" in text

    @property
    def untuned(self) -> tuple[str, ...] | None:
        """Arguments that keep FlashInfer's tuner off; None where there are none."""
        text = self.tree.text(_ARGS) + self.tree.text("sglang.srt.arg_groups.field_order")
        if "disable_flashinfer_autotune" in text:
            return ("--disable-flashinfer-autotune",)
        return () if not self.tuned(Configured()) else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """Models for which it sets the option itself where that was left at auto."""
        text = self.tree.text("sglang.srt.arg_groups.overrides")
        found: list[str] = []
        for part in re.split(r"^@", text, flags=re.M)[1:]:
            if f'{{"{FIELD}":' in part:
                found += re.findall(r'"([A-Za-z0-9_]+For[A-Za-z]+)"', part.partition("def ")[0])
        return tuple(dict.fromkeys(found))

    def notes(self, kind: LayerKind) -> list[str]:
        """What a choice for it does not cover."""
        found = []
        if 120 <= kind.sm < 130 and "try_qwen3x_nvfp4_gemm" in self.tree.text(_MODELOPT):
            found.append(
                "SGLang tries a kernel of its own first on a few fixed shapes"
                " (try_qwen3x_nvfp4_gemm); it has no off switch and was not probed"
            )
        return found

    def __str__(self) -> str:
        return f"sglang {self.version}" if self.version else "sglang"

    # -- how its source is evaluated

    def _by_option(self, kind: LayerKind, configured: Configured) -> str:
        asked = configured.options().get(OPTION, "auto")
        words = self.words
        if words is not None and asked not in words:
            raise NotTaken(f"{OPTION} of {self} does not know {asked}")
        kernel = Given("the options", {FIELD: asked})
        ours = Given("the configuration", {"kernel": kernel, FIELD: asked})
        evaluator = self._evaluator(kind, configured, {"get_exec": Lifted(lambda ev: ours)})
        place = self.tree.module(_FP4)
        function = place.binding("initialize_fp4_gemm_config") if place else []
        node = function[0] if function else None
        args = [ours] if isinstance(node, ast.FunctionDef) and node.args.args else []
        evaluator.call(_FP4, "initialize_fp4_gemm_config", *args)
        found = evaluator.value(_FP4, "FP4_GEMM_RUNNER_BACKEND")
        if not isinstance(found, Member) or found.value == "auto":
            raise CannotTell("it leaves its backend open")
        word = str(found.value)
        if word == "flashinfer_cutedsl" and self._w4a16_asked(configured):
            return word + W4A16_SUFFIX
        return word

    def _w4a16_asked(self, configured: Configured) -> bool:
        if _W4A16_VARIABLE not in self.tree.text(_MODELOPT):
            return False
        return configured.env.get(_W4A16_VARIABLE, "").lower() in ("1", "true", "yes", "y", "t")

    def _before_the_option(self, kind: LayerKind, configured: Configured) -> str:
        """What `mm_fp4` is called with, by the method that calls it."""
        seen: list[Any] = []

        def record(evaluator: Any, *args: Any, **named: Any) -> Any:
            seen.append(named.get("backend"))
            return Given("the product", {})

        evaluator = self._evaluator(kind, configured, {"fp4_gemm": Lifted(record)})
        inner = "_sglang_fp4_gemm"  # an operator of its own around the call, in some
        evaluator.natives["torch.ops.sglang.fp4_gemm"] = Lifted(
            lambda ev, *args, **named: ev.call(_MODELOPT, inner, *args, **named)
        )
        if evaluator.value(_MODELOPT, "enable_flashinfer_fp4_gemm") is not True:
            return "cutlass"  # sgl-kernel's own
        method = evaluator.make(_MODELOPT, "ModelOptFp4LinearMethod", Given("its config", {}))
        assert isinstance(method, Made)
        evaluator.send(method, "apply", Given("the layer", {}), Given("the activation", {}))
        if len(seen) != 1:
            raise CannotTell("its call of mm_fp4 was not found")
        api = seen[0] if seen[0] is not None else self._flashinfer_default()
        if not isinstance(api, str) or api == "auto":
            raise CannotTell("it leaves the backend to FlashInfer")
        return _API.get(api, f"flashinfer_{api}")

    def _flashinfer_default(self) -> Any:
        """``backend`` of the installed `flashinfer.mm_fp4` where none is given."""
        for module in ("flashinfer.gemm.gemm_base", "flashinfer.gemm"):
            place = self.tree.module(module)
            for node in place.binding("mm_fp4") if place else []:
                if isinstance(node, ast.FunctionDef):
                    names = [each.arg for each in node.args.args]
                    pairs = zip(reversed(names), reversed(node.args.defaults), strict=False)
                    value = dict(pairs).get("backend")
                    return value.value if isinstance(value, ast.Constant) else None
        raise CannotTell("it leaves the backend to FlashInfer, which is not installed")

    def _least_sm(self, kind: LayerKind, configured: Configured) -> int | None:
        """The first SM that its NVFP4 checkpoints load on."""
        evaluator = self._evaluator(kind, configured)
        found = evaluator.ask(_MODELOPT, "ModelOptFp4Config", "get_min_capability")
        return found if isinstance(found, int) else None

    def _weight_only(self) -> str:
        """What computes W4A16 checkpoints: a method of their own, which takes no option."""
        place = self.tree.module(_MODELOPT)
        classes = place.binding("ModelOptNvFp4A16LinearMethod") if place else []
        if not classes:
            raise NotTaken(f"{self} does not serve W4A16 checkpoints")
        called = {
            str(getattr(node.func, "id", getattr(node.func, "attr", "")))
            for node in ast.walk(classes[0])
            if isinstance(node, ast.Call)
        }
        kernels = {name for name in called if re.search(r"linear|gemm|matmul|_mm", name)}
        if kernels and all("marlin" in name for name in kernels):
            return "marlin"
        raise CannotTell("the method of its W4A16 layers is not understood")

    def _evaluator(
        self,
        kind: LayerKind | None = None,
        configured: Configured | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Evaluator:
        environ = dict(configured.env) if configured else {}
        every: dict[str, Any] = {
            "envs": _EnvironVariables(self.tree.text(_ENVIRON), environ),
            "get_bool_env_var": Lifted(
                lambda ev, name, default="false": (
                    str(environ.get(name, default)).lower() in ("true", "1")
                )
            ),
        }
        natives: dict[str, Any] = {"torch.library.custom_op": Lifted(lambda ev, *a, **k: None)}
        if kind is not None:
            pair = divmod(kind.sm, 10)
            every |= {
                "is_cuda": Lifted(lambda ev: True),
                "is_hip": Lifted(lambda ev: False),
                "is_npu": Lifted(lambda ev: False),
                "get_device_capability": Lifted(lambda ev, *a, **k: pair),
                "get_device_sm": Lifted(lambda ev: kind.sm),
                "get_platform": Lifted(lambda ev: _Platform(ev)),
            }
            python = self.python
            natives |= {
                "importlib.util.find_spec": Lifted(
                    lambda ev, name: True if python.has_module(name) else None
                ),
                "torch.cuda.get_device_capability": Lifted(lambda ev, *a, **k: pair),
                # A torch that cannot use an SM from 100 on has an older CUDA: none runs it.
                "torch.version.cuda": "13.0" if kind.sm >= 100 else "12.8",
            }
        return Evaluator(self.tree, {**every, **(facts or {})}, natives)


class _EnvironVariables(Given):
    """SGLang's ``envs``: each has ``get`` and ``is_set``; its default stands in environ.py."""

    def __init__(self, declared: str, environ: Mapping[str, str]) -> None:
        super().__init__("envs", {})
        self._declared = declared
        self._environ = environ

    def attribute(self, name: str) -> Any:
        line = re.search(rf"^    {re.escape(name)} = Env(\w+)\((.*)\)$", self._declared, re.M)
        try:
            kind, value = (line[1], ast.literal_eval(line[2])) if line else ("Str", None)
        except (ValueError, SyntaxError):
            kind, value = "Str", None
        there = self._environ.get(name)
        if there is not None:
            value = there.lower() in ("1", "true", "yes", "y", "t") if kind == "Bool" else there

        def get(evaluator: Any, default: Any = None) -> Any:
            return value if there is not None or value is not None else default

        facts: dict[str, Callable[..., Any] | Lifted] = {
            "get": Lifted(get),
            "is_set": Lifted(lambda evaluator: there is not None),
        }
        return Given(f"envs.{name}", facts)


class _Platform(Given):
    """SGLang's ``get_platform()``: ``is_sm100`` is what its ``is_sm100_supported()`` says."""

    _COMMON = "sglang.srt.utils.common"

    def __init__(self, evaluator: Evaluator) -> None:
        others = ("is_hip", "is_xpu", "is_npu", "is_musa", "is_cpu", "has_amx")
        super().__init__("get_platform()", {"is_cuda": True, **dict.fromkeys(others, False)})
        self._evaluator = evaluator

    def attribute(self, name: str) -> Any:
        if re.fullmatch(r"is_(sm\d+(_or_sm\d+)?|blackwell)", name):
            return self._evaluator.call(self._COMMON, f"{name}_supported")
        return super().attribute(name)
