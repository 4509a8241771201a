"""Every command of the tutorial, in its order, as far as a machine without a GPU goes.

The model is a small checkpoint; what a probe of an H200 leaves behind, and engines that are not
installed here, are stood in for by stores and by engines' source trees.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import engine_store
import engine_trees
import pytest
import typer.main
from checkpoints import LLAMA, MODELOPT, nvfp4, write

from commands import call
from fp4tune import cli
from fp4tune.engines import here, interpreter

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
MODEL = "/models/qwen3-32b-nvfp4"
CPU = (
    "--gpu", "none", "--max-m", "1", "--level", "quick", "--activation", "bf16",
    "--backend", "torch-dequant",
)  # fmt: skip


def fenced(language: str) -> list[str]:
    """The lines of all blocks in that language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = [line for line in fenced("console") if line.startswith("fp4tune ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, brief_quick):
    """A checkpoint, engines beside us, and stores as of an H200 by profile."""
    root = tmp_path_factory.mktemp("tutorial")
    tensors = nvfp4("model.layers.0.mlp.down_proj", 64, 512, static=False)
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 512, "quantization_config": MODELOPT}
    write(root / "model", tensors, config)
    engine_trees.both(root / "site")
    engine_store.fill(root / "strict", "sm90")
    engine_store.fill(root / "sglang", "sm90", profile="sglang")
    return root


@pytest.fixture
def engines(world, monkeypatch):
    monkeypatch.syspath_prepend(str(world / "site"))
    monkeypatch.setattr(here, "gpus", lambda: [])
    for name in ("FP4TUNE_LEVEL", "FP4TUNE_GENERATION", "VLLM_DISABLED_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    interpreter.of.cache_clear()
    yield
    interpreter.of.cache_clear()


def test_it_has_every_step():
    assert [line.split()[1] for line in COMMANDS] == [
        "doctor", "layers", "check-weights", "probe", "show", "explain", "report", "emit", "probe",
        "emit", "show", "show", "facts", "quarantine", "quarantine",
    ]  # fmt: skip
    others = {line.split()[0] for line in fenced("console")} - {"fp4tune"}
    assert others == {"pip"}


CODES = {
    "doctor": (0, 2),
    # Whether some random weights meet every condition is not the question here.
    "check-weights": (0, 1, 2),
    "--engine-args": (1,),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_does_what_is_said(line, world, engines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(world / "model") if w == MODEL else w for w in shlex.split(line)[1:]]
    command = words[0]
    if command == "probe":
        words = [*words, *CPU, "--state", str(tmp_path / "s")]
    elif command == "facts":
        words = [*words, "--state", str(world / "sglang")]
    elif command == "quarantine":
        words = [*words, "--state", str(tmp_path / "s")]
    elif command not in ("layers",):
        words = [*words, "--state", str(world / "strict")]
    if command == "explain":
        words[2:4] = ["4096", "2048"]
    done = call(*words)
    codes = next((code for name, code in CODES.items() if name in words), (0,))
    assert done.exit_code in codes and "Traceback" not in done.output, done.output
    assert done.stdout.strip()
    if command == "probe":
        lines = done.stdout.splitlines()
        assert lines[0].startswith("SAFE since ") and lines[-1].startswith("next: fp4tune emit ")
        assert "fp4tune: the kernel" not in done.output
    if command == "emit":
        assert re.search(r"^FP4TUNE_ARGS=\(", done.stdout, re.M)
        assert done.stdout.startswith("# SAFE since ")
    if command == "report":
        assert (tmp_path / "fp4tune.html").is_file()


def test_what_starts_the_engines_parses():
    lines = fenced("bash")
    emissions = [m[1] for line in lines if (m := re.match(r"source <\(fp4tune (.+)\)$", line))]
    assert len(emissions) == 2
    command = typer.main.get_command(cli.app).commands["emit"]
    for emission in emissions:
        command.make_context("emit", shlex.split(emission)[1:])
    assert all(
        "${FP4TUNE_ARGS[@]}" in line for line in lines if MODEL in line and "emit" not in line
    )
