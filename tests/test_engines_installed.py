"""The engine that is installed says what it runs; what it does not say is unknown, never safe."""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import os
import sys
import types

import engine_trees
import pytest
from engine_store import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engines import run

from fp4tune.cache.rows import Environment
from fp4tune.commands import _engine
from fp4tune.engines import (
    applied,
    emit,
    here,
    installed,
    interpreter,
    notice,
    pinning,
    plugin,
    select,
    stack,
)
from fp4tune.engines.asked import Configured, LayerKind, NotTaken, Unclear
from fp4tune.engines.evaluate import Evaluator
from fp4tune.engines.interpreter import Interpreter
from fp4tune.engines.read_flashinfer import FlashInferSource
from fp4tune.engines.read_sglang import SGLangSource
from fp4tune.engines.read_vllm import VllmSource
from fp4tune.engines.source import SourceModule, SourceTree
from fp4tune.engines.values import CannotTell
from fp4tune.errors import Refused

FP4 = LayerKind(120)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No GPU, no engine, and nothing of an earlier test's."""
    for name in ("FP4TUNE_LEVEL", "FP4TUNE_GENERATION", "FP4TUNE_APPLIED", "VLLM_DISABLED_KERNELS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(here, "gpus", lambda: [])
    plugin.selection.cache_clear()
    notice.say_once.cache_clear()
    interpreter.of.cache_clear()


def sglang(root, files: dict[str, str] | None = None, **other) -> SGLangSource:
    """An SGLang in `root`, with some of its modules replaced."""
    engine_trees.sglang(root, **other)
    engine_trees.write(root, {f"sglang/srt/{name}": text for name, text in (files or {}).items()})
    return SGLangSource(Interpreter("python", [str(root)], versions={"sglang": "0.9"}))


CHOICE = "layers/quantization/fp4_utils.py"


# -- SGLang


@pytest.mark.parametrize(
    "sm, word", [(80, "marlin"), (90, "marlin"), (100, "flashinfer_cutedsl"),
                 (103, "flashinfer_cutedsl"), (120, "flashinfer_cutlass")],
)  # fmt: skip
def test_what_sglang_takes_by_itself_is_read_from_its_own_code(tmp_path, sm, word):
    assert sglang(tmp_path).runs(LayerKind(sm, activation="fp4"), Configured()) == word


def test_a_release_with_other_defaults_is_believed(tmp_path):
    changed = engine_trees.SGLANG_CHOICE.replace('word = "flashinfer_cutlass"', 'word = "marlin"')
    assert sglang(tmp_path, {CHOICE: changed}).runs(FP4, Configured()) == "marlin"


@pytest.mark.parametrize(
    "instead",
    [
        "if some_new_library.likes(word):",
        "if measured_at_start() > 3:",
        "while word:",
        "if get_platform().is_something_new:",
    ],
)
def test_what_a_release_decides_by_something_else_is_unknown(tmp_path, instead):
    changed = engine_trees.SGLANG_CHOICE.replace("if get_platform().is_sm100:", instead, 1)
    changed = changed.replace("elif is_cuda()", "if is_cuda()") if "while" in instead else changed
    source = sglang(tmp_path, {CHOICE: changed})
    with pytest.raises(Unclear, match="cannot be told"):
        source.runs(FP4, Configured())
    # An option is no part of that decision.
    assert source.setting("marlin", FP4).args == ("--fp4-gemm-backend", "marlin")


def test_a_word_that_is_no_choice_there_is_not_emitted(tmp_path):
    source = sglang(
        tmp_path,
        {"arg_groups/choices.py": 'FP4_GEMM_RUNNER_BACKEND_CHOICES = ["auto", "flashinfer_cudnn"]'},
    )
    assert source.setting("flashinfer_cudnn", FP4).args[-1] == "flashinfer_cudnn"
    with pytest.raises(NotTaken, match="does not know marlin"):
        source.setting("marlin", FP4)


def test_a_release_before_the_option_is_asked_through_its_environment(tmp_path):
    layers = """
from sglang.srt.environ import envs
try:
    from flashinfer import mm_fp4 as fp4_gemm
    enable_flashinfer_fp4_gemm = True
except ImportError:
    fp4_gemm = None
    enable_flashinfer_fp4_gemm = False
WORD = envs.SGLANG_FLASHINFER_FP4_GEMM_BACKEND.get()

class ModelOptFp4Config:
    @classmethod
    def get_min_capability(cls):
        return 100

class ModelOptFp4LinearMethod:
    def __init__(self, config):
        self.config = config
    def apply(self, layer, x, bias=None):
        m, _ = x.shape
        assert layer.alpha.dtype == 3
        return fp4_gemm(x, layer.weight, backend=WORD if WORD else "cutlass")
"""
    source = sglang(
        tmp_path,
        {
            "layers/quantization/modelopt_quant.py": layers,
            CHOICE: "",
            "server_args.py": "",
            "arg_groups/choices.py": "",
            "environ.py": 'class Envs:\n    SGLANG_FLASHINFER_FP4_GEMM_BACKEND = EnvStr("")\n',
        },
        plugins=False,
    )
    assert not source.has_plugins and not source.has_option
    # Without FlashInfer it is sgl-kernel's own GEMM.
    assert source.runs(FP4, Configured()) == "cutlass"
    engine_trees.write(tmp_path, {"flashinfer/__init__.py": "def mm_fp4(a): ...\n"})
    source = SGLangSource(Interpreter("python", [str(tmp_path)]))
    assert source.runs(FP4, Configured()) == "flashinfer_cutlass"
    made = source.setting("flashinfer_cudnn", FP4)
    assert made == Configured((), {"SGLANG_FLASHINFER_FP4_GEMM_BACKEND": "cudnn"})
    assert source.runs(FP4, made) == "flashinfer_cudnn"
    with pytest.raises(NotTaken, match="from SM100 on"):
        source.runs(LayerKind(90, activation="bf16"), Configured())
    with pytest.raises(NotTaken, match="W4A16"):
        source.runs(LayerKind(120, activation="bf16"), Configured())


def test_sglang_runs_w4a16_checkpoints_with_marlin_whatever_it_is_told(tmp_path):
    source = sglang(tmp_path)
    weight_only = LayerKind(120, activation="bf16")
    assert source.runs(weight_only, Configured(("--fp4-gemm-backend", "flashinfer_cudnn"))) == (
        "marlin"
    )
    assert source.setting("marlin", weight_only) == Configured()
    with pytest.raises(NotTaken, match="whatever it is told"):
        source.setting("flashinfer_cutedsl", weight_only)


# -- vLLM


def vllm(root, **other) -> VllmSource:
    engine_trees.vllm(root, **other)
    return VllmSource(Interpreter("python", [str(root)], versions={"vllm": "0.33"}))


def test_every_emission_for_vllm_ends_at_its_kernel_by_vllms_own_code(tmp_path):
    source = vllm(tmp_path)
    for sm in (90, 100, 120):
        for activation in ("fp4", "bf16"):
            kind = LayerKind(sm, activation=activation)
            for name in engine_trees.KERNELS:
                try:
                    made = source.setting(name, kind)
                except NotTaken:
                    continue
                assert source.runs(kind, made) == name


def test_what_vllm_runs_of_mxfp4_depends_on_what_the_layer_says_of_activations(tmp_path):
    engine_trees.vllm(tmp_path)
    source = VllmSource(Interpreter("python", [str(tmp_path)], versions={"vllm": "0.33.0"}))

    def runs(sm: int, activation: str, *args: str) -> str:
        return source.runs(LayerKind(sm, "mxfp4", activation), Configured(args))

    for activation in ("bf16", "fp4"):
        assert runs(90, activation) == "MarlinMxFp4LinearKernel"
    assert runs(100, "fp4") == "FlashInferMxFp4LinearKernel"
    with pytest.raises(Unclear, match="depends on the checkpoint's method"):
        runs(100, "bf16")
    for option in ("--quantization-config", "--quantization-config.linear.activation"):
        with pytest.raises(Unclear):  # what a user may say of activations is not followed
            runs(90, "fp4", option, "int8")
    humming = source.setting("HummingMxFp4LinearKernel", LayerKind(90, "mxfp4", "bf16"))
    assert json.loads(humming.args[1]) == {"linear_backend_per_quant": {"mxfp4": "humming"}}


def test_one_that_has_no_per_quant_option_gets_the_variable(tmp_path):
    source = vllm(tmp_path)
    path = tmp_path / "vllm/config/kernel.py"
    path.write_text("class KernelConfig:\n    linear_backend = 'auto'\n")
    source = VllmSource(Interpreter("python", [str(tmp_path)]))
    made = source.setting("FlashInferCudnnNvFp4LinearKernel", FP4)
    assert not made.args and "FlashInferCutlass" in made.env["VLLM_DISABLED_KERNELS"]
    with pytest.raises(NotTaken, match="no linear_backend_per_quant"):
        asked = json.dumps({"linear_backend_per_quant": {"nvfp4_w4a4": "marlin"}})
        source.runs(FP4, Configured(("--kernel-config", asked)))


def test_one_whose_backend_is_a_word_gets_that(tmp_path):
    engine_trees.write(
        tmp_path,
        {
            "vllm/envs.py": """import os

def env_with_choices(name, default, choices):
    def found():
        value = os.getenv(name)
        if value is not None and value not in choices:
            raise ValueError(f"Invalid value {value} for {name}")
        return default if value is None else value
    return found

environment_variables = {
    "VLLM_NVFP4_GEMM_BACKEND": env_with_choices(
        "VLLM_NVFP4_GEMM_BACKEND", None, ["flashinfer-cudnn", "flashinfer-cutlass", "marlin"]
    ),
}
""",
            "vllm/platforms/interface.py": "",
            "vllm/model_executor/layers/quantization/utils/nvfp4_utils.py": """
from enum import Enum
import vllm.envs as envs
from vllm.platforms import current_platform
class Backend(Enum):
    A = "flashinfer-cudnn"
    B = "flashinfer-cutlass"
    C = "marlin"
def select_nvfp4_linear_backend():
    backend = None
    if envs.VLLM_NVFP4_GEMM_BACKEND is None:
        backend = Backend.B if current_platform.has_device_capability(100) else Backend.C
    else:
        backend = Backend(envs.VLLM_NVFP4_GEMM_BACKEND)
    assert backend is not None, "no backend"
    return backend
""",
        },
    )
    source = VllmSource(Interpreter("python", [str(tmp_path)]))
    assert source.runs(FP4, Configured()) == "FlashInferCutlassNvFp4LinearKernel"
    made = source.setting("FlashInferCudnnNvFp4LinearKernel", FP4)
    assert made.env == {"VLLM_NVFP4_GEMM_BACKEND": "flashinfer-cudnn"}
    with pytest.raises(NotTaken, match="Invalid value cutlass"):
        source.setting("CutlassNvFp4LinearKernel", FP4)
    with pytest.raises(NotTaken):
        source.setting("FlashInferB12xNvFp4LinearKernel", FP4)


# -- nothing of it is ever a false safe


def test_an_engine_that_is_not_installed_is_unknown(tmp_path):
    fill(tmp_path, "sm120")
    for call in (
        ("emit", "sglang"),
        ("emit", "vllm", "--json"),
        ("emit", "env"),
        ("show", "--engine", "sglang"),
        ("choose", "3", "4096", "2048", "--activation", "fp4", "--engine", "vllm"),
    ):
        done = run(*call, "--state", tmp_path, code=2)
        assert "is not installed" in done.stderr and not done.stdout
    document = json.loads(run("emit", "json", "--state", tmp_path, code=2).stdout)
    assert all("is not installed" in d["unknown"] and d["args"] == [] for d in document.values())


def test_an_unclear_default_is_exit_2_and_not_safe(tmp_path, monkeypatch):
    site = tmp_path / "site"
    changed = engine_trees.SGLANG_CHOICE.replace("get_platform().is_sm100", "news()", 1)
    sglang(site, {CHOICE: changed})
    monkeypatch.syspath_prepend(site)
    fill(tmp_path / "s", "sm120")
    call = ("show", "--state", tmp_path / "s", "--engine", "sglang", "--json")
    document = json.loads(run(*call, code=2).stdout)["engine"]
    assert document["safe"] is None and document["runs"] is None
    named = ("--engine-args", "--fp4-gemm-backend flashinfer_cudnn")
    assert json.loads(run(*call, *named).stdout)["engine"]["safe"] is True
    named = ("--engine-args", "--fp4-gemm-backend flashinfer_new")
    document = json.loads(run(*call, *named, code=1).stdout)["engine"]
    assert document["safe"] is False and "does not know flashinfer_new" in document["why"]


def test_an_interpreter_of_another_place_is_asked_for_its_engine(tmp_path):
    engine_trees.both(tmp_path / "site")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec python3 "$@"\n')
    python.chmod(0o755)
    fill(tmp_path / "s", "sm120")
    call = ("emit", "sglang", "--state", tmp_path / "s", "--json")
    document = json.loads(run(*call, "--python", python).stdout)
    assert (document["version"], document["python"]) == ("0.5.23", str(python))
    assert document["args"] == ["--fp4-gemm-backend", "flashinfer_cudnn"]
    assert "could not be asked" in run(*call, "--python", tmp_path / "none", code=2).stderr


# -- the tactic that is proven is the one that runs

AUTOTUNER = "class AutoTuner:\n    def choose_one(self, custom_op): ...\n"
GEMM = '    tuner.choose_one(\n        "fp4_gemm",\n'


def home(root, *, tuner=True, plugin_there=True, flashinfer=True) -> installed.EngineHome:
    engine_trees.sglang(root, tuner=tuner)
    if flashinfer:
        engine_trees.write(
            root, {"flashinfer/autotuner.py": AUTOTUNER, "flashinfer/gemm/gemm_base.py": GEMM}
        )
    there = {"sglang.srt.plugins": ["fp4tune"]} if plugin_there else {}
    python = Interpreter("python", [str(root)], versions={}, plugins=there)
    return installed.EngineHome(python, SGLangSource(python), FlashInferSource(python))


FIELD = {"flashinfer-cudnn": 9.0, "torch-dequant-w4a4": 90.0}


def chosen(state, where):
    return select.select(select.open_for("sglang", state), "sglang", home=where)


def test_a_tactic_is_never_called_safe_by_the_backends_name_alone(tmp_path):
    fill(tmp_path / "s", "sm120", FIELD, tactic="[3,[[1,2]]]")
    found = chosen(tmp_path / "s", home(tmp_path / "a"))
    made = emit.emission(found)
    assert made.env["FP4TUNE_LEVEL"] == "process" and made.env["FP4TUNE_GENERATION"] == "1"
    assert not any("flashinfer-cudnn: safe in all" in line for line in made.comments)
    assert any("[3,[[1,2]]]" in line and "pins them" in line for line in made.comments)
    assert made.json()["tactics"] == {"held_by": "plugin", "proven": ["[3,[[1,2]]]"]}
    # The name alone, without the plugin acting, is not safe; with it, it is.
    args = ["--fp4-gemm-backend", "flashinfer_cudnn"]
    document = applied.assess(found, args, {})
    assert document["safe"] is False and "tuner may pick others" in document["why"]
    assert applied.assess(found, args, {"FP4TUNE_LEVEL": "process"})["safe"]
    for other in (
        home(tmp_path / "b", plugin_there=False),
        home(tmp_path / "c", flashinfer=False),
        home(tmp_path / "d", tuner=False, plugin_there=False),
    ):
        found = chosen(tmp_path / "s", other)
        assert found.backend is None
        assert "cannot be pinned" in found.rejected["flashinfer-cudnn"]


def test_the_librarys_default_is_held_by_keeping_the_tuner_off(tmp_path):
    fill(tmp_path / "s", "sm120", FIELD)
    found = chosen(tmp_path / "s", home(tmp_path / "a", plugin_there=False))
    made = emit.emission(found)
    assert made.args[-1] == "--disable-flashinfer-autotune" and not made.env
    assert applied.assess(found, made.args, {})["safe"]
    assert applied.assess(found, made.args[:-1], {})["safe"] is False


# -- the stack that is proven is the one that is served


def test_a_choice_made_on_other_versions_is_refused(tmp_path, monkeypatch):
    site = tmp_path / "site"
    engine_trees.both(site)
    engine_trees.distribution(site, "measured-lib", "2.0")
    monkeypatch.syspath_prepend(site)
    for name, version, code in (("a", "1.0", 2), ("b", "2.0", 0)):
        fill(tmp_path / name, "sm120", FIELD, versions={"measured-lib": version, "python": "3.0"})
        done = run("emit", "sglang", "--state", tmp_path / name, code=code)
        assert ("measured-lib 1.0, and 2.0 is there" in done.stdout) == bool(code)
    fill(tmp_path / "c", "sm120", FIELD, versions={"another-lib": "1"})
    assert "which is not there" in run("emit", "vllm", "--state", tmp_path / "c", code=2).stdout
    call = ("show", "--state", tmp_path / "a", "--engine", "sglang", "--json")
    named = ("--engine-args", "--fp4-gemm-backend flashinfer_cudnn")
    assert json.loads(run(*call, *named, code=2).stdout)["engine"]["safe"] is None


def test_what_an_engine_asks_for_itself_is_compared_with_what_was_measured(tmp_path):
    engine_trees.sglang(tmp_path)
    pins = ("flashinfer_python[cu13]==0.7.2", "torch==2.14.1", "numpy==1", "torch==1; extra == 'x'")
    engine_trees.distribution(tmp_path, "sglang", "0.5.23", pins)
    python = Interpreter("python", [str(tmp_path)], versions={"torch": "2.13.0"})
    where = installed.EngineHome(python, SGLangSource(python), FlashInferSource(python))
    assert stack.pins(where) == {"flashinfer-python": "0.7.2", "torch": "2.14.1"}
    said = stack.warnings(where, {"torch": "2.14.1+cu130"})
    assert len(said) == 1 and "torch 2.14.1+cu130, and 2.13.0 is there" in said[0]
    said = stack.warnings(where, {"torch": "2.13.0"})
    assert said == ["sglang asks for torch 2.14.1, and 2.13.0 was measured"]


# -- every engine's names


def test_explained_has_every_engine_with_its_own_names(tmp_path, beside, monkeypatch):
    monkeypatch.syspath_prepend(beside)
    fill(tmp_path, "sm120")
    document = json.loads(run("emit", "json", "--explain", "--state", tmp_path).stdout)
    assert document["sglang"]["backend"] == "flashinfer-cudnn"
    explained = document["explained"]
    assert set(explained["engines"]) == {
        "sglang", "vllm", "tensorrt-llm", "lmdeploy", "tokenspeed",
    }  # fmt: skip
    assert len(explained["choices"]) == 8 and explained["scope"]["arch"] == "sm120"
    names = explained["engines"]["tensorrt-llm"]["backends"]
    assert names["flashinfer-cutlass"] == {"name": "cutlass", "same_code": False}
    assert "--explain is for" in run("emit", "vllm", "--explain", code=2).stderr


# -- how source is evaluated

_VALUES = st.sampled_from(["1", "2", "'a'", "None", "[1, 2]", "(1, 'a')", "True", "{'k': 1}"])


def _expressions(depth: int = 3):
    if not depth:
        return _VALUES
    inner = _expressions(depth - 1)
    return st.one_of(
        _VALUES,
        st.builds("({} or {})".format, inner, inner),
        st.builds("({} and {})".format, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} == {})".format, inner, inner),
        st.builds("({} in [1, 'a', None])".format, inner),
        st.builds("[x for x in [1, 2, 3] if x != {}]".format, inner),
    )


def evaluate(text: str):
    tree = SourceTree(Interpreter("python", []))
    tree._modules["m"] = SourceModule("m", "", False)
    return Evaluator(tree, {}, {}).expression("m", ast.parse(text, mode="eval").body)


@settings(max_examples=200, deadline=None)
@given(_expressions())
def test_known_expressions_mean_what_python_means(text):
    assert evaluate(text) == eval(text)


@settings(max_examples=100, deadline=None)
@given(_expressions(2), _expressions(2))
def test_a_decision_on_something_unknown_is_never_made(one, other):
    if eval(one) == eval(other):
        return
    with pytest.raises(CannotTell):
        evaluate(f"({one} if nobody_knows() else {other})")
    assert evaluate(f"(True or nobody_knows({one}))") is True
    assert evaluate(f"(nobody_knows({one}) and False)") is False


_PIECES = (
    "def f():\n    return 1\n",
    "X = 2\n",
    "@deco\n@more(1)\ndef g(a):\n    '''Text.'''\n    return a\n",
    "try:\n    from a import h\nexcept ImportError:\n    h = None\n",
    "class C:\n    '''\nX = 3\n'''\n    y = 1\n",
    "Z = [\n    1,\n]\n",
    "if True:\n    k = 1\nelse:\n    k = 2\n",
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=8))
def test_a_module_cut_into_statements_binds_what_it_does_in_whole(pieces):
    text = "".join(pieces)
    whole = ast.parse(text)
    module = SourceModule("m", text, False)
    for name in ("f", "X", "g", "h", "C", "Z", "k", "absent"):
        mine = [ast.dump(each) for each in module.binding(name)]
        from fp4tune.engines.source import bound_by

        assert mine == [ast.dump(each) for each in whole.body if name in bound_by(each)]


def test_a_source_that_cannot_be_read_is_unclear(tmp_path):
    source = sglang(tmp_path, {CHOICE: "def initialize_fp4_gemm_config(:\n  broken"})
    with pytest.raises(Unclear):
        source.runs(FP4, Configured())
    (tmp_path / "sglang/srt" / CHOICE).write_bytes(b"\xff\xfe" + os.urandom(64))
    with pytest.raises((Unclear, NotTaken)):
        sglang_again = SGLangSource(Interpreter("python", [str(tmp_path)]))
        sglang_again.runs(FP4, Configured())
    with pytest.raises(Refused, match="there is no engine"):
        installed.home("trtllm")


def test_a_probe_warns_where_what_it_measured_is_not_what_is_served(tmp_path, monkeypatch, capsys):
    made = [Environment("0" * 64, "marlin", "sm90", {"distributions": {"torch": "1.0"}})]
    _engine.warn_of_other_versions("strict", None, made)
    assert not capsys.readouterr().err
    _engine.warn_of_other_versions("sglang", None, made)
    assert "sglang is not installed in this Python" in capsys.readouterr().err
    engine_trees.both(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _engine.warn_of_other_versions("sglang", None, made)
    assert "measured with torch 1.0, and" in capsys.readouterr().err


def test_a_plugin_leaves_an_engine_alone_whose_versions_are_others(
    own_state, beside, monkeypatch, caplog
):
    monkeypatch.syspath_prepend(beside)
    monkeypatch.setenv("FP4TUNE_LEVEL", "process")
    fill(own_state, "sm120", FIELD, versions={"torch": "1.0"})
    assert plugin.advice("sglang") is None
    assert "measured with torch 1.0" in caplog.text or not caplog.text
    assert plugin.selection("sglang").backend is None


def test_what_is_said_before_the_engine_has_a_log_goes_to_stderr(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(notice.log, "handlers", [])
    notice.say_once("fp4tune: said early")
    assert capsys.readouterr().err == "INFO fp4tune: said early\n"
    engine = logging.getLogger("vllm")
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record.getMessage())

    monkeypatch.setattr(engine, "handlers", [Keep()])
    monkeypatch.setattr(notice.log, "propagate", True)
    level = notice.log.level
    try:
        notice.say_once("fp4tune: said later")
    finally:
        notice.log.setLevel(level)
    assert kept == ["fp4tune: said later"] and not capsys.readouterr().err


@pytest.mark.parametrize(("level", "said"), [(30, True), (20, True), (40, False)])
def test_what_is_said_is_not_lost_to_a_root_that_nobody_configured(monkeypatch, level, said):
    # SGLang's imports call basicConfig without a level, before it has configured its log.
    written = io.StringIO()
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(written)])
    monkeypatch.setattr(root, "level", level)
    monkeypatch.setattr(notice.log, "handlers", [])
    monkeypatch.setattr(notice.log, "propagate", True)
    notice.log.setLevel(logging.NOTSET)
    try:
        notice.say_once("fp4tune: said before the log is there")
    finally:
        notice.log.setLevel(logging.NOTSET)
    assert (written.getvalue() == "fp4tune: said before the log is there\n") == said


def test_the_tuner_is_held_where_it_is_asked(monkeypatch):
    pins = pinning.PinnedTactics()

    def decision(tactic):
        return types.SimpleNamespace(tactic=tactic)

    buckets = [(64, 128, 1, 16, decision("7")), (64, 128, 17, 40, decision("[3,[[1,2]]]"))]
    pins.add("flashinfer-cudnn", buckets)
    pins.add("marlin", buckets)  # FlashInfer keeps no tactics of it
    assert pins.backends == ["flashinfer-cudnn"]
    config = object()
    gemm = types.SimpleNamespace(_MM_FP4_TUNING_CONFIG_128x4=config)
    monkeypatch.setitem(sys.modules, "flashinfer.gemm.gemm_base", gemm)
    runner = type("CudnnFp4GemmRunner", (), {})()
    other = type("CutlassFp4GemmRunner", (), {})()
    asked = pinning.wrap(lambda *a, **k: ("tuned", -1), pins, "nvfp4", "bf16")

    def ask(m, n=64, k=128, runners=(runner,), op="fp4_gemm", config=config, block=16, out="bf16"):
        shapes = [types.SimpleNamespace(shape=s) for s in ((m, k // 2), (k // 2, n))]
        return asked(None, op, runners, config, [*shapes, 0, 0, 0, out, 0, block, True, 0])

    assert [ask(m)[1] for m in (1, 16, 17, 40, 41)] == [7, 7, (3, ((1, 2),)), (3, ((1, 2),)), -1]
    assert ask(3, runners=(other, runner)) == (runner, 7)
    for left in (
        {"n": 65}, {"k": 256}, {"op": "fp8_gemm"}, {"config": object()}, {"block": 32},
        {"out": "fp16"}, {"runners": (other,)},
    ):  # fmt: skip
        assert ask(3, **left) == ("tuned", -1)
    assert asked(None, "fp4_gemm", [runner], config, []) == ("tuned", -1)


def test_flashinfer_is_held_as_soon_as_it_is_imported(tmp_path, monkeypatch):
    engine_trees.write(tmp_path, {"a_tuner_of_ours.py": "class AutoTuner:\n    x = 1\n"})
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    finder = pinning._AfterImport("a_tuner_of_ours", seen.append)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    module = importlib.import_module("a_tuner_of_ours")
    assert seen == [module] and finder not in sys.meta_path
    del sys.modules["a_tuner_of_ours"]
