"""Pinned tactics come back through FlashInfer's own loader, for the shapes engines call with."""

from __future__ import annotations

import importlib
import json
import logging
import types

import pytest
import torch
from engine_store import LAYERS, fill
from test_engines import run

from fp4tune.engines import here, plugin, select, tactics
from fp4tune.engines.names import NAMES

autotuner = pytest.importorskip("flashinfer.autotuner")
base = importlib.import_module("flashinfer.gemm.gemm_base")
CONFIG = base._MM_FP4_TUNING_CONFIG_128x4
N, K = LAYERS[0]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, beside):
    monkeypatch.syspath_prepend(beside)
    monkeypatch.setattr(here, "gpus", lambda: [])
    plugin.say_once.cache_clear()


def cutlass_runner():
    """FlashInfer's own runner, around a module that compiles nothing."""
    module = types.SimpleNamespace(fp4_gemm=None, fp4_gemm_tactic_num=lambda: 20)
    made = base._create_cutlass_fp4_gemm_module(module, "op", "tuner")
    return made.cutlass_fp4_gemm_runner()


def inputs(m: int, alpha: torch.Tensor, n: int = N, k: int = K) -> list:
    """What `mm_fp4` gives the tuner, with scale factors as FlashInfer's quantiser shapes them."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.uint8)

    return [
        empty(m, k // 2), empty(n, k // 2).T, empty(-(-m // 128) * 128, k // 16),
        empty(-(-n // 128) * 128, k // 16).T, alpha, torch.bfloat16,
        torch.empty(m, n, dtype=torch.bfloat16), 16, True, empty(64),
    ]  # fmt: skip


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """A tuner of FlashInfer's that started with both files of a store, and the store."""
    fields = {"flashinfer-cutlass": 5.0, "torch-dequant-w4a4": 90.0}
    fill(tmp_path / "s", "sm120", fields, tactic="7")
    reply = json.loads(
        run(
            "emit", "flashinfer", "--state", tmp_path / "s", "--out", tmp_path / "f", "--json"
        ).stdout
    )
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == reply["files"]
    monkeypatch.setenv(tactics.VARIABLE, reply["env"][tactics.VARIABLE])
    made = autotuner.AutoTuner()
    assert made._blocklist.is_loaded
    assert made.load_configs(reply["env"][plugin.CACHE])
    return made


@pytest.mark.parametrize("alpha", [torch.ones(1), torch.ones(())], ids=["vector", "scalar"])
def test_the_proven_tactic_is_what_flashinfer_chooses(tuner, alpha):
    runner = cutlass_runner()
    for m in (1, 2, 3, 9, 16, 129, 256):
        chosen, tactic = tuner.choose_one("fp4_gemm", [runner], CONFIG, inputs(m, alpha))
        # Buckets of the store: 1, 2 to 16, 17 to 256; FlashInfer's end at powers of two.
        assert tactic == 7 and chosen is runner
    _, tactic = tuner.choose_one("fp4_gemm", [runner], CONFIG, inputs(16, alpha, n=64))
    assert tactic == -1


def test_the_tuner_may_try_nothing_else(tuner):
    runner = cutlass_runner()
    assert tuner._blocklist.filter("fp4_gemm", runner, list(range(20))) == [7]
    assert tuner._blocklist.filter("fp4_gemm", runner, [-1]) == [
        -1
    ]  # which is why there is a cache
    # The entries count as tuned by FlashInfer's own policy, so it does not tune them again.
    policies = {tuple(p) for p in tuner._file_config_policies.values()}
    assert policies == {autotuner.AutoTuner._profiling_policy(CONFIG)}


def test_a_probed_default_pins_flashinfers_fallback():
    made = tactics.files([tactics.Pin("flashinfer-cutlass", N, K, 16, "default")])
    entries = {k: v for k, v in made[tactics.CACHE].items() if not k.startswith("_")}
    assert len(entries) == 2
    assert {tuple(v[:2]) for v in entries.values()} == {("CutlassFp4GemmRunner", -1)}
    (blocked,) = made[tactics.BLOCKLIST]["invalid_tactics"].values()
    assert set(range(20)) <= set(blocked)


def test_tactics_that_are_tuples_come_back_as_they_were(tmp_path, monkeypatch):
    """As cuDNN's engine and knobs are."""
    kept, other = [3, [[1, 2], [5, 0]]], [4, [[1, 1]]]
    pin = tactics.Pin("flashinfer-cudnn", N, K, 16, json.dumps(kept))
    made = tactics.files([pin], {"flashinfer-cudnn": [json.dumps(other)]})
    for name, content in made.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setenv(tactics.VARIABLE, str(tmp_path / tactics.BLOCKLIST))
    tuner = autotuner.AutoTuner()
    assert tuner.load_configs(str(tmp_path / tactics.CACHE))
    if not base.CUDNN_AVAILABLE:
        pytest.skip("needs cuDNN")
    runner = base._cudnn_gemm_fp4_runner(CONFIG)
    _, tactic = tuner.choose_one("fp4_gemm", [runner], CONFIG, inputs(16, torch.ones(1)))
    assert tactic == (3, ((1, 2), (5, 0)))
    tried = tuner._blocklist.filter("fp4_gemm", runner, [tactic, (4, ((1, 1),))])
    assert tried == [tactic]


def test_runner_names_are_flashinfers():
    with open(base.__file__, encoding="utf-8") as file:
        source = file.read()
    for name in NAMES.values():
        assert name.runner is None or f"class {name.runner}(" in source, name.runner


def test_there_is_never_one_file_without_the_other(tmp_path, monkeypatch, caplog):
    with pytest.raises(ValueError, match="nothing to pin"):
        tactics.files([])
    fill(tmp_path / "s", "sm90")
    call = ("emit", "flashinfer", "--state", tmp_path / "s", "--out", tmp_path / "f")
    assert "FlashInfer keeps no tactics" in run(*call, code=2).stderr
    assert not (tmp_path / "f").exists()
    fill(tmp_path / "b", "sm120")
    assert "--out" in run("emit", "flashinfer", "--state", tmp_path / "b", code=2).stderr
    caplog.set_level(logging.INFO, "fp4tune")
    monkeypatch.setenv(plugin.CACHE, str(tmp_path / "cache.json"))
    monkeypatch.delenv(tactics.VARIABLE, raising=False)
    plugin.pinned_tactics()
    assert "both, or none" in caplog.text


def test_what_is_no_tactic_is_one_sentence():
    with pytest.raises(ValueError, match="is not a FlashInfer tactic"):
        tactics.value("tile64")
    with pytest.raises(ValueError, match="keeps no tactics of marlin"):
        tactics.keys(tactics.Pin("marlin", N, K, 16, "default"))


def test_the_selection_is_of_swizzled_flashinfer_backends_only(tmp_path):
    fill(tmp_path, "sm100", {"flashinfer-trtllm": 5.0, "flashinfer-cutlass": 9.0})
    chosen = select.select(select.open_for("sglang", tmp_path), "sglang")
    assert chosen.backend == "flashinfer-trtllm"
    keys = tactics.keys(tactics.Pin("flashinfer-trtllm", 128, 256, 1, "default"))
    assert all("TrtllmGemmRunner" in key for key in keys)
