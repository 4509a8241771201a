"""What a checkpoint's layers become: problems of a probe, and what is emitted for an engine."""

from __future__ import annotations

import json
import struct

import engine_store
import pytest
from checkpoints import LLAMA, MODELOPT, llama, nvfp4, write
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import request
from fp4tune.cache.errors import Missing
from fp4tune.commands import emit
from fp4tune.engines import interpreter, select
from fp4tune.errors import Refused
from fp4tune.probes.models.shapes import checkpoint_layers

W4A16 = {**MODELOPT, "quant_algo": "W4A16_NVFP4"}


def run(*args):
    done = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert "Traceback" not in done.output
    return done


def problems(place, formats=(), activations=(), tp=1):
    asked = request.layers((), None, (), tp, "cuda", checkpoint_layers(place, tp))
    made = request.problems(asked, formats, activations, "bf16", 16)
    return {(p.format, p.activation, p.n, p.k) for p in made}


SHAPES = {(768, 512), (512, 512), (3072, 512), (512, 1536)}


def test_a_w4a16_checkpoint_is_probed_as_w4a16_alone(tmp_path):
    write(tmp_path, llama(), {**LLAMA, "quantization_config": W4A16})
    assert problems(tmp_path) == {("nvfp4", "bf16", n, k) for n, k in SHAPES}
    with pytest.raises(ValueError, match="nothing is left of the checkpoint's layers"):
        problems(tmp_path, activations=["fp4"])


def test_a_w4a4_checkpoint_is_probed_both_ways_as_engines_serve_it(tmp_path):
    write(tmp_path, llama(), {**LLAMA, "quantization_config": MODELOPT})
    both = {("nvfp4", a, n, k) for n, k in SHAPES for a in ("bf16", "fp4")}
    assert problems(tmp_path) == both
    assert problems(tmp_path, activations=["fp4"]) == {p for p in both if p[1] == "fp4"}
    assert problems(tmp_path, formats=["nvfp4", "mxfp4"]) == both
    with pytest.raises(ValueError, match="nothing is left"):
        problems(tmp_path, formats=["mxfp4"])


def test_layers_keep_their_own_format_beside_others(tmp_path):
    write(tmp_path, llama(), {**LLAMA, "quantization_config": W4A16})
    held = checkpoint_layers(tmp_path)
    asked = request.layers((), None, ["128,256"], 1, "cuda", held)
    made = {(p.n, p.k, p.activation) for p in request.problems(asked, (), (), "bf16", 16)}
    assert {(128, 256, "bf16"), (128, 256, "fp4")} <= made
    assert not any(activation == "fp4" for n, _, activation in made if n != 128)


def test_a_checkpoint_is_probed_on_a_cpu(tmp_path, brief_quick):
    tensors = nvfp4("model.layers.0.mlp.down_proj", 64, 128, static=False)
    tensors |= nvfp4("model.layers.0.mlp.mystery", 64, 128)
    place = write(tmp_path / "c", tensors, {**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    done = run(
        "probe", "--checkpoint", place, "--gpu", "none", "--max-m", 1, "--level", "quick",
        "--backend", "torch-dequant", "--state", tmp_path / "s", "--json",
    )  # fmt: skip
    (report,) = json.loads(done.stdout)
    kinds = {(c["bucket"]["n"], c["bucket"]["k"], c["bucket"]["activation"])
             for c in report["choices"]}  # fmt: skip
    assert kinds == {(64, 128, "bf16")}


@pytest.mark.parametrize("option", ["--checkpoint", "--model-config"])
def test_nothing_fp4_is_one_sentence_and_2(tmp_path, option):
    fp8 = {**MODELOPT, "quant_algo": "FP8"}
    write(tmp_path, None, {**LLAMA, "quantization_config": fp8})
    done = run("probe", option, tmp_path, "--gpu", "none", "--state", tmp_path / "s")
    assert done.exit_code == 2 and "has no FP4 layer: its layers are bf16, fp8" in done.output
    assert not (tmp_path / "s").exists()


def test_a_configuration_without_quantisation_is_taken_as_asked(tmp_path):
    write(tmp_path, None, LLAMA)
    asked = request.layers((), tmp_path, (), 1, "cuda")
    made = {(p.format, p.n, p.k) for p in request.problems(asked, ["mxfp4"], (), "bf16", 16)}
    assert made == {("mxfp4", n, k) for n, k in SHAPES}
    done = run("probe", "--checkpoint", tmp_path, "--gpu", "none", "--state", tmp_path / "s")
    assert done.exit_code == 2 and "has no FP4 layer" in done.output


def test_w4a16_is_emitted_on_a_gpu_that_could_do_more(tmp_path, monkeypatch):
    asked = []

    def chosen(engine, wanted):
        asked.append((wanted.format, wanted.activation))
        raise Refused("no engine is asked here")

    monkeypatch.setattr(emit, "_reader_and_parts", chosen)
    for name, config in (("a", W4A16), ("b", MODELOPT)):
        place = write(tmp_path / name, llama(), {**LLAMA, "quantization_config": config})
        run("emit", "sglang", "--checkpoint", place)
    assert asked == [("nvfp4", "bf16"), ("nvfp4", None)]
    assert run("emit", "sglang", "--checkpoint", tmp_path / "none").exit_code == 2


def test_where_w4a16_alone_was_probed_that_is_selected(tmp_path, monkeypatch, beside):
    monkeypatch.setitem(engine_store.SCOPES, "sm120", ("NVIDIA RTX PRO 6000", "bf16"))
    engine_store.fill(tmp_path, "sm120", {"torch-dequant": 100.0, "marlin": 9.0})
    reader = select.open_for("sglang", tmp_path, arch="sm120", gpu=None, profile=None)
    monkeypatch.syspath_prepend(beside)
    interpreter.of.cache_clear()
    found = select.select(reader, "sglang")
    assert (found.activation, found.backend) == ("bf16", "marlin")
    with pytest.raises(Missing, match="no nvfp4 problem with fp4 activations"):
        select.select(reader, "sglang", activation="fp4")


def test_the_header_of_a_made_up_file_is_what_the_format_asks(tmp_path):
    place = write(tmp_path, llama())
    raw = (place / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["model.layers.0.mlp.up_proj.weight"]["dtype"] == "U8"
