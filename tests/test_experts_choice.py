"""Routed experts: the choice of each bucket, one backend for a model, and what engines are told."""

from __future__ import annotations

import json
import os

import engine_trees
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import request as planning
from fp4tune.autotune.choice.single import experts_layer, experts_layers
from fp4tune.autotune.choice.traffic import Traffic
from fp4tune.autotune.publication import publish as publishing
from fp4tune.autotune.publication import published
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import reader
from fp4tune.cache.errors import Missing
from fp4tune.cache.experts import (
    META,
    ExpertsLayer,
    layer_words,
    of_json,
    of_meta,
    option_text,
    single_backends,
)
from fp4tune.cache.measured import NOISE
from fp4tune.cache.rows import BucketKey, Candidate, Environment, Timing
from fp4tune.engines import (
    applied,
    emit,
    here,
    installed,
    interpreter,
    names,
    plugin,
    select,
    serving,
    sglang,
    vllm,
)
from fp4tune.engines.asked import Configured, LayerKind
from fp4tune.errors import Refused
from fp4tune.probes import registry
from fp4tune.probes.models import experts, shapes
from fp4tune.report.wording import law_times
from fp4tune.words import ExpertsKey, experts_key

TRAFFIC = Traffic("t", ((1, 0.5), (2, 0.5)))
GPU = "NVIDIA H200"
PROFILE = "strict"
ENVIRONMENT = Environment("e" * 64, "any", "sm90", {})
RANGES = ((0, 0), (1, 1), (2, 2))


def candidate(backend, m, us, verdict="safe", groups=8, gate="swiglu", fmt="nvfp4", **other):
    lo, hi = m if isinstance(m, tuple) else (m, m)
    activation = str(ExpertsKey(2, gate)) if groups > 1 else "bf16"
    bucket = BucketKey(fmt, activation, "bf16", groups, lo, hi, 64, 128)
    other = {"tactic": "default", "spread": 0.0, "rank": 0, "profile": PROFILE, **other}
    spread = other.pop("spread")
    tactic, rank, profile = other.pop("tactic"), other.pop("rank"), other.pop("profile")
    return Candidate(
        "sm90", GPU, profile, bucket, backend, tactic, "x", verdict, rank, us,
        None if us is None else us - spread, None if us is None else us + spread,
        launches=30, problems=12, fingerprint=ENVIRONMENT.fingerprint, **other,
    )  # fmt: skip


# -- one backend for all


def singles(rows, traffic=TRAFFIC, default=None):
    layers = experts_layers(rows, {PROFILE: traffic})
    return single_backends(layers, default)


def test_one_backend_for_all_loses_what_others_win():
    rows = [candidate("a", 1, 10.0), candidate("a", 2, 40.0)]
    rows += [candidate("b", 1, 20.0), candidate("b", 2, 20.0)]
    rows += [candidate("c", 1, 1.0, "unsafe"), candidate("c", 2, 1.0)]
    rows += [candidate("d", 1, 0.1, groups=1)]
    # The oracle: a at 1, c at 2.
    found = singles(rows)
    assert [(s.backend, round(s.loss_percent)) for s in found] == [("b", 264), ("a", 355)]
    assert singles(rows[:2])[0].loss_percent == 0
    assert singles([candidate("a", 1, 1.0, "unsafe")]) == []
    assert singles([candidate("a", 1, 1.0, groups=1)]) == []


def test_what_an_engine_cannot_name_is_neither_the_single_one_nor_the_oracle():
    rows = [candidate("a", m, 10.0) for m in (1, 2)]
    rows += [candidate("b", m, 1.0, rank=None) for m in (1, 2)]
    (found,) = singles(rows)
    assert (found.backend, found.loss_percent) == ("a", 0.0)


def test_of_those_not_told_apart_the_default_is_taken_and_then_the_first_name():
    rows = [candidate(name, m, us, spread=2.0) for name, us in (("a", 10.0), ("b", 9.0))
            for m in (1, 2)]  # fmt: skip
    assert singles(rows)[0].backend == "a"
    assert singles(rows, default="b")[0].backend == "b"


times = st.one_of(st.none(), st.floats(0.5, 500, allow_nan=False))
fields = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.tuples(*(st.tuples(times, st.sampled_from(["safe", "safe", "unsafe", "inconclusive"]))
                for _ in range(4))),
    min_size=1,
)  # fmt: skip


@settings(deadline=None)
@given(fields, st.sampled_from([None, "a", "b"]), st.floats(0.1, 0.9), st.floats(0, 3))
def test_the_single_one_is_never_better_than_the_oracle_and_never_condemned(
    field, default, share, spread
):
    traffic = Traffic("t", ((1, share), (2, 1 - share)))
    rows = [
        candidate(name, at % 2 + 1, us, verdict, gate=("swiglu", "relu2")[at // 2], spread=spread)
        for name, cells in field.items()
        for at, (us, verdict) in enumerate(cells)
    ]
    layers = experts_layers(rows, {PROFILE: traffic})
    found = single_backends(layers, default)
    able = {name for name, cells in field.items() if all(v == "safe" and us for us, v in cells)}
    assert {each.backend for each in found} == (able if found else set())
    if not found:
        assert not able or any(each.oracle_us is None for each in layers)
        return
    oracle = sum(each.oracle_us for each in layers)
    fastest = min(each.expected_us for each in found)
    for each in found:
        assert each.expected_us >= oracle * (1 - 1e-9) and each.loss_percent >= 0
        assert each.expected_us == pytest.approx(oracle * (1 + each.loss_percent / 100))
    # The first is level with the fastest: within the noise, or not told apart.
    assert found[0].expected_us <= fastest * (1 + NOISE) + 2 * spread * len(layers) * 2
    usual = next((each.expected_us for each in found if each.backend == default), None)
    if usual is not None:
        assert found[0].expected_us <= usual * (1 + NOISE) * (1 + 1e-9)


def test_what_is_published_of_a_layer_is_read_back_and_what_is_not_understood_is_left_out():
    layer = experts_layer([candidate("a", 1, 10.0), candidate("b", 1, 9.0)], TRAFFIC)
    assert isinstance(layer, ExpertsLayer) and layer.covered == 0.5
    again = of_json(json.loads(json.dumps(layer.json())))
    assert again == layer
    broken = {**layer.json(), "backends": {"a": "fast"}}
    assert of_meta({META: [layer.json(), broken, 3, None]}) == [layer]
    assert of_meta({META: 5}) == of_meta({}) == []


@settings(deadline=None)
@given(st.integers(1, 64), st.sampled_from(["swiglu", "swiglu-oai"]), st.floats(0.1, 1000))
def test_a_layer_in_an_option_is_the_layer(top_k, gate, scaling):
    from fp4tune.probes.grouped.problem import ExpertsProblem, of_fields, parse_experts

    key = ExpertsKey(top_k, gate, scaling)
    assert experts_key(str(key)) == key
    row = {"activation": str(key), "groups": 64, "n": 64, "k": 128, "format": "mxfp4", "m": 1}
    groups, top, n, k, word, scaled = parse_experts(option_text(row))
    made = ExpertsProblem("mxfp4", 1, n, k, groups=groups, top_k=top, gate=word, scaling=scaled)
    assert made == of_fields(row) and made.activation == str(key)
    assert option_text({**row, "activation": "bf16"}) is None
    assert layer_words({**row, "activation": "bf16"}) == "n=64 k=128"


# -- the choice of each bucket, as published


ROWS = {"humming-indexed": "rows-8"}
FIELD = {"marlin-experts": 10.0, "humming-indexed": 12.0, "torch-experts": 90.0}


def fill(place, field=FIELD, gate="swiglu", fmt="nvfp4", profile="sglang", tactics=None, bad=()):
    """Publish candidates of one layer as a probe would; `bad` are unsafe at one token."""
    rows = [
        candidate(
            name, ends, us + ends[1] if ends[1] else None,
            "unsafe" if (name, ends[0]) in {(b, 1) for b in bad} else "safe",
            gate=gate, fmt=fmt, profile=profile, rank=None,
            tactic=(tactics or {}).get(name, "default"),
        )
        for name, us in field.items()
        for ends in RANGES
    ]  # fmt: skip
    stands = published.usable(place)
    every = [*stands.candidates, *rows]
    return publishing.republish(place, stands, every, [ENVIRONMENT])


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(here, "gpus", lambda: [])
    monkeypatch.setattr(reader, "_readers", [])
    interpreter.of.cache_clear()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Both engines with routed experts, in a folder."""
    root = tmp_path_factory.mktemp("engines")
    engine_trees.sglang(root, experts=True)
    engine_trees.vllm(root, experts=True)
    return root


def home(engine, *folders):
    versions = {"sglang": "0.5.23", "vllm": "0.33.0"}
    python = interpreter.Interpreter("python", [str(f) for f in folders], versions=versions)
    made = installed.SGLangSource if engine == "sglang" else installed.VllmSource
    return installed.EngineHome(python, made(python), installed.FlashInferSource(python))


def selected(place, engine, folder, **other):
    found = select.open_for(engine, place, profile="sglang")
    return select.select_experts(found, engine, home=home(engine, folder), **other)


def test_the_choice_of_a_bucket_follows_the_engines_default_for_experts(tmp_path):
    fill(tmp_path)
    stands = published.load(tmp_path)
    assert {c.default_backend for c in stands.choices} == {"marlin-experts"}
    assert {c.backend for c in stands.choices} == {"marlin-experts"}
    (layer,) = of_meta(stands.meta)
    assert set(layer.times) == {"marlin-experts", "torch-experts"}  # no name for NVFP4 by humming


def test_every_name_of_experts_is_a_word_of_an_engine():
    assert set(names.EXPERTS) <= set(registry.experts_names())
    for name, entry in names.EXPERTS.items():
        assert entry.sglang or entry.vllm, name
        assert set(entry.sglang) | set(entry.vllm) <= {"nvfp4", "mxfp4"}
        assert name not in names.NAMES
    assert names.backend_of("sglang", "marlin") == "marlin"
    assert names.backend_of("sglang", "marlin", experts=True) == "marlin-experts"


# -- engines, by their own source


def test_experts_have_an_option_of_their_own(tmp_path, engines):
    fill(tmp_path)
    found = selected(tmp_path, "sglang", engines)
    assert (found.backend, found.word) == ("marlin-experts", "marlin")
    made = emit.emission(None, found)
    assert made.args == ["--moe-runner-backend", "marlin"] and made.proven
    assert found.default == "marlin-experts"
    assert "torch-experts" in found.rejected
    assert applied.assess(found, made.args, made.env)["safe"]
    document = made.json()
    assert document["backend"] is None and document["experts"]["layers"] == ["8,2,64,128"]
    assert document["experts"]["single"][0]["loss_percent"] == 0
    assert "by its own source it runs marlin so" in made.shell()


def test_vllm_is_told_by_its_own_option_and_a_note_says_whose_build(tmp_path, engines):
    fill(tmp_path, profile="vllm")
    opened = select.open_for("vllm", tmp_path, profile="vllm")
    found = select.select_experts(opened, "vllm", home=home("vllm", engines))
    assert found.setting.args == ("--moe-backend", "marlin")
    assert found.default == "humming-indexed"
    # vLLM's own build of Marlin was not what was proven.
    assert any("its own build" in note for note in found.notes)
    text = emit.emission(None, found).shell()
    assert "by itself vllm would run humming-indexed: " in text


def test_what_a_variable_tells_apart_is_told(tmp_path, engines):
    fill(tmp_path, {"humming-grouped": 5.0}, "swiglu-oai", "mxfp4", "vllm",
         {"humming-grouped": "rows-64"})  # fmt: skip
    for engine, variable, option in (
        ("vllm", "VLLM_HUMMING_MOE_GEMM_TYPE", "--moe-backend"),
        ("sglang", "SGLANG_HUMMING_MOE_GEMM_TYPE", "--moe-runner-backend"),
    ):
        opened = select.open_for(engine, tmp_path, profile="vllm")
        found = select.select_experts(opened, engine, home=home(engine, engines))
        made = emit.emission(None, found)
        assert made.args == [option, "humming"] and made.env == {variable: "grouped"}
        assert applied.assess(found, made.args, made.env)["safe"]
        without = applied.assess(found, made.args, {})
        assert without["safe"] is False and without["runs"] == "humming-indexed"


def test_a_tactic_that_no_engine_comes_to_run_is_not_emitted(tmp_path, engines):
    fill(tmp_path, {"marlin-experts": 5.0}, tactics={"marlin-experts": "block=64"})
    found = selected(tmp_path, "sglang", engines)
    assert found.backend is None
    assert "block=64 was proven" in found.rejected["marlin-experts"]


def test_what_vllm_finds_beside_itself_is_not_what_it_brings(tmp_path, engines):
    fill(tmp_path, {"vllm-ogs": 5.0}, "swiglu-oai", "mxfp4", "vllm")
    opened = select.open_for("vllm", tmp_path, profile="vllm")
    found = select.select_experts(opened, "vllm", home=home("vllm", engines))
    assert (found.word, found.default) == ("triton", "vllm-ogs")
    beside = tmp_path / "beside"
    engine_trees.write(beside, {"triton_kernels/matmul.py": ""})
    found = select.select_experts(opened, "vllm", home=home("vllm", engines, beside))
    assert found.backend is None and "triton:installed" in found.rejected["vllm-ogs"]


FOLDERS = os.environ.get("FP4TUNE_ENGINES", "")
"""Where wheels of engines are unpacked, each in a folder ``NAME-VERSION``, with what they find
beside them in ``beside``, and a triton_kernels for SGLang in ``triton``."""


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="FP4TUNE_ENGINES names no folder of unpacked engines")
@pytest.mark.parametrize("release", ["sglang-0.5.23", "vllm-0.33.0"])
def test_the_defaults_of_profiles_are_those_of_the_real_engines(release):
    engine = release.partition("-")[0]
    beside = [] if engine == "vllm" else [f"{FOLDERS}/triton"]
    source = home(engine, f"{FOLDERS}/{release}", f"{FOLDERS}/beside", *beside).source
    for each in PROFILES[engine].experts:
        for sm in each.sms:
            for gate in [each.gate] if each.gate else ["swiglu", "relu2"]:
                activation = "fp4" if sm >= 100 else "bf16"
                kind = LayerKind(sm, each.format, activation, gate)
                word = source.runs(kind, Configured())
                named = names.backend_of(engine, word, each.format, sm, experts=True)
                # Two builds of one source may share a word: the engine's own comes first.
                assert named in (each.backend, f"vllm-{each.backend}"), (sm, each)


def test_an_engine_without_the_option_is_unknown_and_never_safe(tmp_path, tmp_path_factory):
    fill(tmp_path / "s")
    old = tmp_path_factory.mktemp("old")
    engine_trees.both(old)
    for engine in names.ENGINES:
        found = selected(tmp_path / "s", engine, old)
        made = emit.emission(None, found)
        assert found.backend is None and made.unclear and not made.args
        option = {"sglang": "--moe-runner-backend", "vllm": "--moe-backend"}[engine]
        assert f"has no {option}" in found.rejected["marlin-experts"]
        assert applied.assess(found, (), {})["safe"] is None


def test_a_word_that_the_installed_engine_does_not_take_is_not_emitted(tmp_path, engines):
    fill(tmp_path, {"humming-indexed": 1.0, "torch-experts": 9.0}, "swiglu-oai", "mxfp4",
         tactics=ROWS)  # fmt: skip
    root = tmp_path / "engine"
    engine_trees.sglang(root, experts=True)
    choices = root / "sglang/srt/arg_groups/choices.py"
    choices.write_text(choices.read_text().replace("'humming', ", ""))
    found = selected(tmp_path, "sglang", root)
    assert found.backend is None
    assert "does not know humming" in found.rejected["humming-indexed"]
    assert selected(tmp_path, "sglang", engines).word == "humming"


def test_what_an_engine_would_run_by_itself_has_its_own_verdict(tmp_path, engines):
    fill(tmp_path, bad=("marlin-experts",))
    found = selected(tmp_path, "sglang", engines)
    assert found.backend is None and found.default == "marlin-experts"
    would = applied.assess(found, (), {})
    assert would["runs"] == "marlin-experts" and would["safe"] is False
    assert "not proven in 1 of 3 buckets" in would["why"]


def test_what_the_user_says_is_what_is_judged(tmp_path, engines):
    fill(tmp_path)
    found = selected(tmp_path, "sglang", engines)
    said = applied.assess(found, ("--moe-runner-backend", "triton_kernel"), {})
    assert said["safe"] is False and "does not start so" in said["why"]
    said = applied.assess(found, ("--moe-runner-backend=marlin",), {})
    assert said["safe"] and said["source"] == "argument marlin"


def test_experts_of_several_models_are_told_apart(tmp_path, engines):
    fill(tmp_path)
    fill(tmp_path, {"humming-indexed": 3.0}, "swiglu-oai", "mxfp4", tactics=ROWS)
    with pytest.raises(Refused, match="several kinds"):
        selected(tmp_path, "sglang", engines)
    assert selected(tmp_path, "sglang", engines, format="mxfp4").word == "humming"
    one = selected(tmp_path, "sglang", engines, layers=["8,2,64,128"])
    assert one.word == "marlin"
    with pytest.raises(Missing, match="4,2,64,128"):
        selected(tmp_path, "sglang", engines, layers=["4,2,64,128"])


def test_a_store_that_says_nothing_of_models_is_read(tmp_path, engines):
    fill(tmp_path)
    stands = published.usable(tmp_path)
    kept = {k: v for k, v in stands.meta.items() if k not in ("experts",)}
    from fp4tune.cache import publish as cache_publish

    kept = {k: v for k, v in kept.items() if k not in cache_publish.RESERVED}
    cache_publish.publish(
        tmp_path, stands.choices, stands.candidates, stands.environments, kept, stands.layers
    )
    found = selected(tmp_path, "sglang", engines)
    assert found.backend == "marlin-experts" and found.experts.singles == ()


# -- commands


def fp4tune(*args, code=0):
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_commands_tell_of_experts_by_their_sizes(tmp_path):
    fill(tmp_path, profile="strict")
    asked = (2, "--experts", "8,2,64,128", "--state", tmp_path)
    assert "8 experts, 2 a token, 64x128" in fp4tune("choose", *asked).output
    assert "8 experts, 2 a token, 64x128" in fp4tune("explain", *asked).output
    shown = fp4tune("show", "--state", tmp_path).output
    assert "One backend for all nvfp4 experts" in shown and "tokens" in shown
    document = json.loads(fp4tune("show", "--state", tmp_path, "--json").stdout)
    assert document["experts"][0]["single"][0]["backend"] == "marlin-experts"


def test_what_is_asked_twice_or_for_linear_layers_alone_is_refused(tmp_path):
    fill(tmp_path, profile="strict")
    for command in ("choose", "explain"):
        base = (command, 2, "--experts", "8,2,64,128", "--state", tmp_path)
        assert "linear layers" in fp4tune(*base, "--activation", "fp4", code=2).output
        assert "already" in fp4tune(
            command, 2, 64, 128, "--experts", "8,2,64,128", "--state", tmp_path, code=2
        ).output  # fmt: skip
        assert "takes M, N and K" in fp4tune(command, 2, "--state", tmp_path, code=2).output


def test_what_mends_a_layer_of_experts_is_a_command_that_names_it(tmp_path):
    fill(tmp_path, {"marlin-experts": 1.0}, profile="strict", bad=("marlin-experts",))
    text = fp4tune("facts", "--state", tmp_path).output
    assert "fp4tune explain 1 --experts 8,2,64,128" in text


# -- plugins: an option for all experts is filled in for those that were probed alone

MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
    "hidden_act": "silu",
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head", "*.mlp.gate", "*self_attn*"],
    },
}


@pytest.fixture
def served(tmp_path, monkeypatch, engines):
    """(a model's folder, what was said) in a process of an engine, with a store that has its
    experts."""
    fill(tmp_path / "state", profile="sglang")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MOE))
    said: list[str] = []
    monkeypatch.setenv("FP4TUNE_STATE", str(tmp_path / "state"))
    for name in (plugin.APPLIED_EXPERTS, "FP4TUNE_GENERATION", "SGLANG_HUMMING_MOE_GEMM_TYPE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(plugin, "say_once", lambda text, *more: said.append(text))
    monkeypatch.setattr(installed, "home", lambda engine, *a, **k: home(engine, engines))
    monkeypatch.setattr(serving.select, "open_for", lambda engine, **k: reader.open(
        tmp_path / "state", arch="sm90", gpu=GPU, profile="sglang"))  # fmt: skip
    serving.experts_selection.cache_clear()
    yield folder, said
    serving.experts_selection.cache_clear()


class Arguments:
    """What an engine was asked for."""

    def __init__(self, **given):
        self.__dict__.update(given)


def test_sglang_is_given_the_backend_of_its_models_experts(served):
    folder, said = served
    args = Arguments(moe_runner_backend="auto", model_path=str(folder), tp_size=1)
    sglang._fill_in_sglang_experts(args)
    assert args.moe_runner_backend == "marlin"
    assert "SGLang runs --moe-runner-backend marlin (marlin-experts: safe in 3" in said[-1]
    assert "% slower than the fastest of each bucket" in said[-1]


def test_vllm_is_given_it_in_its_kernel_configuration(served):
    folder, said = served
    shared = Arguments(moe_backend="auto")
    args = Arguments(
        moe_backend="auto", kernel_config=shared, model=str(folder), tensor_parallel_size=1
    )
    vllm._fill_in_vllm_experts(args)
    assert (args.kernel_config.moe_backend, shared.moe_backend) == ("marlin", "auto")
    assert "vLLM runs routed experts with marlin" in said[-1]


@pytest.mark.parametrize(
    "more, why",
    [
        ({"tp_size": 2}, "no routed experts 8,2,32,128 were probed here"),
        ({"ep_size": 8}, "experts spread over ranks are not looked up"),
        ({"model_path": "/there/is/none"}, "/there/is/none"),
    ],
)
def test_experts_that_were_not_probed_are_left_to_the_engine(served, more, why):
    folder, said = served
    args = Arguments(**{"moe_runner_backend": "auto", "model_path": str(folder), **more})
    sglang._fill_in_sglang_experts(args)
    assert args.moe_runner_backend == "auto" and why in said[-1]


def test_a_model_without_fp4_experts_is_none_of_ours(served):
    folder, said = served
    (folder / "config.json").write_text(json.dumps({**MOE, "quantization_config": {}}))
    args = Arguments(moe_runner_backend="auto", model_path=str(folder))
    sglang._fill_in_sglang_experts(args)
    assert args.moe_runner_backend == "auto" and not said


def test_what_the_user_asks_for_stands_and_is_judged(served):
    folder, said = served
    args = Arguments(moe_runner_backend="triton", model_path=str(folder))
    sglang._fill_in_sglang_experts(args)
    assert args.moe_runner_backend == "triton"
    assert "keeps --moe-runner-backend=triton, which was asked for" in said[-1]
    bare = Arguments(model_path=str(folder))
    sglang._fill_in_sglang_experts(bare)
    assert len(said) == 1  # this SGLang has no such option


# -- models


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "preset, sizes",
    [
        ("gpt-oss-20b", (32, 4, "swiglu-oai", "mxfp4")),
        ("gpt-oss-120b", (128, 4, "swiglu-oai", "mxfp4")),
        ("deepseek-v3", (256, 8, "swiglu", "nvfp4")),
        ("deepseek-v4-flash", (256, 6, "swiglu-10", "nvfp4")),
        ("deepseek-v4-pro", (384, 6, "swiglu-10", "nvfp4")),
        ("qwen3-235b-a22b", (128, 8, "swiglu", "nvfp4")),
        ("glm-5", (256, 8, "swiglu", "nvfp4")),
        ("kimi-k2.5", (384, 8, "swiglu", "nvfp4")),
        ("minimax-m2.5", (256, 8, "swiglu", "nvfp4")),
        ("minimax-m3", (128, 4, "swiglu-oai-unbiased", "nvfp4")),
        ("nemotron-3-nano-30b-a3b", (128, 6, "relu2", "nvfp4")),
    ],
)
def test_presets_have_their_experts_at_every_split(preset, sizes, tp):
    model = shapes.preset_layers(preset, tp)
    found = experts.main_experts(model)
    if preset.startswith("nemotron") and tp == 8:
        # 1856 / 8 is no multiple of a block: that is said.
        assert found == () and "232" in experts.left_out(model)[0]
        return
    (layer,) = found
    assert (layer.groups, layer.top_k, layer.gate, layer.format) == sizes


def test_experts_that_are_spread_over_ranks_are_fewer_and_whole():
    whole = experts.split_of_experts(8, 8)
    model = shapes.preset_layers("deepseek-v3", whole)
    (layer,) = planning.experts((), (), [model], 1, 8)
    assert (layer.groups, layer.top_k, layer.n) == (32, 8, 2048)
    (few,) = planning.experts((), (), [model], 1, 64)
    assert (few.groups, few.top_k) == (4, 4)
    assert experts.split_of_experts(8, 2) == 4
    for tp, ep in ((8, 3), (1, 0)):
        with pytest.raises(ValueError, match=f"--ep {ep}"):
            experts.split_of_experts(tp, ep)


def test_an_activation_that_is_not_known_gives_no_layer_and_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MOE, "hidden_act": "gelu_pytorch_tanh"}))
    document = json.loads(fp4tune("layers", tmp_path, "--json").stdout)
    assert document["experts"] == [] and "gelu_pytorch_tanh" in document["left_out"][0]
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    document = json.loads(fp4tune("layers", tmp_path, "--json").stdout)
    assert document["experts"] == [{"format": "nvfp4", "layer": "8,2,64,128"}]


def test_times_by_law_of_the_first_probes_of_experts_are_read():
    def timing(laws):
        bucket = candidate("a", 1, 1.0).bucket
        return Timing(
            "run", "f" * 64, "a", "default", bucket, 1.0, 1.0, 1.0, 6, None, {"laws": laws}
        )

    spread = {"median_us": 4.0, "lo_us": 3.0, "hi_us": 5.0}
    found = law_times(timing({"balanced": 3.5, "zipf": spread, "odd": "fast", "none": {}}))
    assert {law: (t.lo, t.us, t.hi) for law, t in found.items()} == {
        "balanced": (3.5, 3.5, 3.5), "zipf": (3.0, 4.0, 5.0)
    }  # fmt: skip
    assert law_times(timing(None)) == {}
