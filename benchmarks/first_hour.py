"""The first hour as a new user has it: a fresh clone, the README's command, the tutorial's.

Every command is run as it stands, on whatever this machine has, and its whole output and its
seconds are kept: as a transcript to read, and as JSON.

    python benchmarks/first_hour.py --out DIR [--tests] [--level LEVEL]
    python benchmarks/first_hour.py --out DIR --checkpoint PATH --tp 4 --python ENGINE_PYTHON

1. A clone of this checkout, its set-up by itself, then ``make probe``; with --tests ``make test``.
2. The tutorial, with the layers of --checkpoint, else those of a preset: probe, emit, show and
   facts for SGLang and for vLLM, the same probe once more, and the page. --python is the
   interpreter that has the engines.
3. What fp4tune's plugin says in each engine's log, asked of the plugin: no engine is started.

The transcript is written after each command, so that what was run is kept however this ends. On a
GPU it takes a quarter of an hour without --tests, most of it in three probes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import machine

ROOT = Path(__file__).resolve().parents[1]
PRESET = "llama-3.1-8b"
SMALL = "--gpu none --shape 256,256 --max-m 4 --level quick"
"""What a CPU probes."""
PLUGIN = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
from fp4tune.engines import plugin
found = plugin.advice(sys.argv[1])
print(plugin.describe(found, "runs") if found else "nothing to apply")
"""


class Transcript:
    """Commands with their output, seconds and exit codes, kept in `out` as they come."""

    def __init__(self, cwd: Path, env: dict[str, str], out: Path) -> None:
        self.steps: list[dict[str, Any]] = []
        self._cwd = cwd
        self._env = env
        self._out = out
        self.about = machine()

    def run(self, command: str, shown: str = "", **env: str) -> None:
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command], cwd=self._cwd, env={**self._env, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seconds = round(time.monotonic() - began, 1)
        step = {"command": shown or command, "seconds": seconds, "exit_code": done.returncode}
        self.steps.append({**step, "output": done.stdout})
        print(f"{seconds:8.1f} s  exit {done.returncode}  {shown or command}", flush=True)
        (self._out / "transcript.txt").write_text(self.text(), encoding="utf-8")
        result = json.dumps({"about": self.about, "steps": self.steps}, indent=1)
        (self._out / "first-hour.json").write_text(result, encoding="utf-8")

    def text(self) -> str:
        return "\n".join(
            f"$ {step['command']}\n{step['output']}[{step['seconds']} s, exit code "
            f"{step['exit_code']}]\n"
            for step in self.steps
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--python", default="")
    parser.add_argument("--level", default="standard")
    parser.add_argument("--tests", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "fp4tune"
        state = Path(folder) / "state"
        hidden = ("FP4TUNE_", "XDG_STATE_HOME")
        env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"COLUMNS": "80"}
        if (ROOT / ".git").exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        else:
            left = shutil.ignore_patterns(".venv", ".state", ".types", "__pycache__")
            shutil.copytree(ROOT, clone, ignore=left)
        shell = Transcript(clone, env, asked.out)
        shell.run("make .venv/.probe")
        shell.run("make probe")
        if asked.tests:
            shell.run("make test")
        fp4tune = ".venv/bin/fp4tune"
        shell.run(f"{fp4tune} --help")
        shell.run(f"{fp4tune} show --state benchmarks/results/probe-h200-standard | head -20")
        layers = f"--preset {PRESET} --tp {asked.tp}"
        if asked.checkpoint:
            layers = f"--checkpoint {shlex.quote(asked.checkpoint)} --tp {asked.tp}"
        layers += "" if asked.level == "standard" else f" --level {asked.level}"
        if isinstance(shell.about["gpus"], str):  # why there are none
            layers = SMALL  # a model's layers would take a CPU hours
        beside = f" --python {shlex.quote(asked.python)}" if asked.python else ""
        there = {"FP4TUNE_STATE": str(state)}
        shell.run(f"{fp4tune} doctor", **there)
        for engine in ("sglang", "vllm"):
            shell.run(f"{fp4tune} probe --profile {engine} {layers}{beside}", **there)
            shell.run(f"{fp4tune} emit {engine}{beside}", **there)
            shell.run(f"{fp4tune} show --engine {engine}{beside} | tail -1", **there)
            shell.run(f"{fp4tune} facts --check --profile {engine}", **there)
            python = asked.python or ".venv/bin/python"
            shell.run(
                f"PYTHONPATH={shlex.quote(folder)} {python} -c {shlex.quote(PLUGIN)} {engine}",
                f"what the plugin says in {engine}'s log",
                FP4TUNE_LEVEL="process", **there,
            )  # fmt: skip
        shell.run(f"{fp4tune} probe --profile vllm {layers}{beside}", **there)  # what is known
        shell.run(f"{fp4tune} report --html fp4tune.html", **there)
        if (clone / "fp4tune.html").is_file():
            shutil.copy(clone / "fp4tune.html", asked.out / "fp4tune.html")
    # Without a GPU or an engine some end with 2; the set-up and both first calls never may.
    sys.exit(any(step["exit_code"] for step in shell.steps[:2]))


if __name__ == "__main__":
    main()
