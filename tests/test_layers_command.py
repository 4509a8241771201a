"""fp4tune layers: its document, what it imports, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import LLAMA, MOE, llama, moe, run, write

from fp4tune.probes.models.shapes import checkpoint_layers

SCHEMA = {
    "name", "modules", "count", "n", "k", "groups", "top_k", "format", "activation", "kind",
    "probed", "reason",
}  # fmt: skip


def test_rows_of_json_have_the_documented_keys(tmp_path):
    write(tmp_path, llama() | moe(), MOE)
    done = run("layers", tmp_path, "--json", "--tp", 2)
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["tp"] == 2
    assert all(set(row) == SCHEMA for row in document["layers"])
    assert {row["kind"] for row in document["layers"]} <= {"dense", "grouped", "other"}
    assert all(bool(row["reason"]) != row["probed"] for row in document["layers"])


def test_neither_torch_nor_an_engine_is_imported(tmp_path):
    write(tmp_path, llama(), LLAMA)
    code = (
        "import sys; from fp4tune.cli import main; sys.argv = ['fp4tune', 'layers', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'flashinfer', 'vllm', 'sglang', 'rich.table'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_cannot_be_served_is_refused_before_a_probe(tmp_path):
    write(tmp_path, llama(), LLAMA)
    assert checkpoint_layers(tmp_path, 2).probed
    with pytest.raises(ValueError, match="attention heads"):
        checkpoint_layers(tmp_path, 5)
