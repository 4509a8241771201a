"""Every command's JSON has a schema, and what is printed is what it says."""

from __future__ import annotations

import dataclasses
import json

import engine_store
import engine_trees
import pytest
import schemas
import stores
from checkpoints import LLAMA, MODELOPT, llama, nvfp4, write
from jsonschema import Draft202012Validator

from commands import call
from fp4tune import cli
from fp4tune.cache import rows
from fp4tune.engines import here, interpreter

COMMANDS = __import__("typer.main").main.get_command(cli.app).commands


def names() -> set[str]:
    """Every command that takes --json, as its schema is called."""
    found = set()
    for name, command in COMMANDS.items():
        for sub, each in getattr(command, "commands", {"": command}).items():
            if any("--json" in parameter.opts for parameter in each.params):
                found.add(f"{name} {sub}".strip())
    return found


def test_every_command_that_prints_json_has_a_schema_and_no_other():
    definitions = schemas.definitions()
    Draft202012Validator.check_schema({"$defs": definitions})
    assert {name for name in definitions if name[0].islower()} == names()


@pytest.mark.parametrize(
    "row",
    [rows.Candidate, rows.Choice, rows.Finding, rows.Timing, rows.Audit, rows.Environment,
     rows.Stamp, rows.Run, rows.BucketKey],
    ids=lambda row: row.__name__,
)  # fmt: skip
def test_rows_have_the_fields_they_are_stored_with(row):
    schema = schemas.definitions()[row.__name__]
    assert set(schema["properties"]) == {field.name for field in dataclasses.fields(row)}
    assert schema["additionalProperties"] is False


def test_a_document_that_is_not_what_is_said_is_found_out():
    for document in (
        {"generation": 1},
        [{"status": "fine", "what": "x", "found": "y", "do": None}],
        [{"status": "good", "what": "x", "found": "y"}],
    ):
        with pytest.raises(AssertionError):
            schemas.hold("doctor", document)


@pytest.fixture(scope="module")
def place(tmp_path_factory, brief_quick):
    """A small real probe on the CPU."""
    place = tmp_path_factory.mktemp("state")
    done = call(
        "probe", "--gpu", "none", "--shape", "64,128", "--max-m", 1, "--level", "quick",
        "--activation", "bf16", "--backend", "torch-dequant", "--backend", "marlin",
        "--state", place, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return place


@pytest.mark.parametrize(
    "words",
    [
        ("show",),
        ("choose", 1, 64, 128, "--layer"),
        ("choose", 1, 64, 256),
        ("explain", 1, 64, 128),
        ("facts",),
        ("doctor",),
        ("quarantine", "list"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_is_read_of_a_probe(words, place):
    assert json.loads(call(*words, "--state", place, "--json").stdout)


def test_facts_of_nothing_and_of_what_is_damaged(tmp_path):
    call("facts", "--state", tmp_path, "--json")
    stores.put(tmp_path)
    call("facts", "--state", tmp_path, "--json")
    path = tmp_path / "choices.db"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:5000])
    call("facts", "--state", tmp_path, "--json")


def test_quarantines_and_the_page(tmp_path):
    stores.put(tmp_path)
    added = json.loads(call("quarantine", "add", "marlin", "--state", tmp_path, "--json").stdout)
    call("quarantine", "list", "--state", tmp_path, "--json")
    call("quarantine", "lift", added["id"], "--state", tmp_path, "--json")
    done = call("report", "--html", tmp_path / "p.html", "--state", tmp_path, "--json")
    assert done.exit_code == 0


def test_what_there_is_here(tmp_path):
    assert call("backends", "--gpu", "none", "--backend", "torch-dequant", "--json").stdout
    checkpoint = write(tmp_path / "c", llama(), {**LLAMA, "quantization_config": MODELOPT})
    assert call("layers", checkpoint, "--json").stdout
    tensors = nvfp4("model.layers.0.mlp.down_proj", 64, 128, static=False)
    whole = write(tmp_path / "w", tensors, {**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    assert call("check-weights", whole, "--state", tmp_path / "s", "--json").stdout


def test_emissions(tmp_path, monkeypatch):
    engine_trees.both(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(here, "gpus", lambda: [])
    interpreter.of.cache_clear()
    engine_store.fill(tmp_path / "s", "sm90")
    try:
        for words in (("sglang",), ("vllm",), ("json",), ("json", "--explain")):
            done = call("emit", *words, "--state", tmp_path / "s", "--json")
            assert done.exit_code == 0 and done.stdout, done.output
        done = call("show", "--engine", "sglang", "--state", tmp_path / "s", "--json")
        assert json.loads(done.stdout)["engine"]["engine"] == "sglang"
    finally:
        interpreter.of.cache_clear()
