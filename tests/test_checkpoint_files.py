"""Where a checkpoint is found, and what is said of one that is not whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import FOUR, LLAMA, MODELOPT, llama, rows, run, write, write_file

from fp4tune.probes.models import layers
from fp4tune.probes.models.layers import read_layers


def test_a_name_is_looked_up_in_the_local_cache_alone(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    place = hub / "models--some--model"
    write(place / "snapshots" / "abc", llama(), {**LLAMA, "quantization_config": MODELOPT})
    write(place / "snapshots" / "old", None, LLAMA)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert rows(read_layers("some/model"), "FP4 dense") == FOUR
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert rows(read_layers("some/model"), "FP4 dense") == FOUR
    for name in ("some/other", "../hub", "a/b/c", ""):
        with pytest.raises(ValueError, match=r"there is no checkpoint|holds no|is empty"):
            read_layers(name)
    assert "nothing is downloaded" in run("layers", "some/other").output
    (place / "refs" / "main").write_text("gone")
    with pytest.raises(ValueError, match="no whole snapshot"):
        read_layers("some/model")


def damaged(place: Path, raw: bytes) -> Path:
    place.mkdir(exist_ok=True)
    (place / "model.safetensors").write_bytes(raw)
    return place


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.mkdir(), "holds no safetensors file and no config.json"),
        (lambda p: damaged(p, b""), "no whole safetensors"),
        (lambda p: damaged(p, b"\xff" * 64), "no whole safetensors"),
        (lambda p: damaged(p, b"\x10\0\0\0\0\0\0\0{}"), "no whole safetensors"),
        (lambda p: damaged(p, b"\x02\0\0\0\0\0\0\0[]"), "no safetensors header"),
        (lambda p: damaged(p, b"\x09\0\0\0\0\0\0\0" + b'{"a": 12}'), "no safetensors header"),
        (lambda p: damaged(p, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda p: [p.mkdir(), (p / "a.gguf").write_bytes(b"")], "GGUF"),
        (lambda p: [p.mkdir(), (p / "pytorch_model.bin").write_bytes(b"")], "pickle"),
        (lambda p: [p.mkdir(), (p / "config.json").write_text("{")], "not JSON"),
        (lambda p: [p.mkdir(), (p / "config.json").write_text("[" * 9999)], "not JSON"),
        (lambda p: [p.mkdir(), (p / "config.json").write_text("[]")], "no object"),
        (lambda p: [p.mkdir(), (p / "config.json").write_text("{}")], "lacks hidden_size"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence_and_2(tmp_path, make, says):
    make(tmp_path / "x")
    done = run("layers", tmp_path / "x")
    assert done.exit_code == 2 and says in done.output and done.output.count("\n") == 1


def test_single_files_and_other_kinds(tmp_path):
    file = write_file(tmp_path / "one.safetensors", llama())
    assert rows(read_layers(file), "FP4 dense") == FOUR
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.txt").write_text("")
    assert "is a GGUF file" in run("layers", tmp_path / "a.gguf").output
    assert "is no checkpoint" in run("layers", tmp_path / "b.txt").output
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**LLAMA, "quantization_config": MODELOPT}))
    assert read_layers(other).source == "configuration"


def test_headers_alone_are_enough_and_missing_files_are_said(tmp_path):
    place = write(tmp_path, llama(), {**LLAMA, "quantization_config": MODELOPT}, shards=4)
    files = sorted(place.glob("*.safetensors"))
    for file in files:
        length = int.from_bytes(file.read_bytes()[:8], "little")
        os.truncate(file, 8 + length)
    found = read_layers(place)
    assert rows(found, "FP4 dense") == FOUR
    assert "shorter than its header says" in found.remarks[0]
    files[-1].unlink()
    found = read_layers(place)
    assert rows(found, "FP4 dense") == FOUR and found.source == "files and configuration"
    assert any("is missing" in said for said in found.remarks)


@pytest.mark.parametrize("many", [0, 10**6])
def test_an_index_that_names_what_is_not_there_is_said(tmp_path, monkeypatch, many):
    monkeypatch.setattr(layers, "_MANY", many)
    place = write(tmp_path, llama(), {**LLAMA, "quantization_config": MODELOPT}, shards=2)
    index = place / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    where = document["weight_map"]
    first, *_, last = where
    assert read_layers(place).remarks == ()
    where["model.layers.9.ghost.weight"] = where[first]
    index.write_text(json.dumps(document))
    assert read_layers(place).remarks == (
        f"model.layers.9.ghost.weight is not in {where[first]}, where the index has it",
    )
    where[first] = where[last]
    for name in list(where)[1:3]:
        del where[name]
    index.write_text(json.dumps(document))
    wrong, unnamed = read_layers(place).remarks
    assert wrong.startswith(f"{first} is not in {where[last]}") and "nor 1 more" in wrong
    assert unnamed.startswith("the index does not name") and unnamed.endswith("nor 1 more")


def test_a_header_that_lies_is_not_believed(tmp_path):
    tensors = llama()
    place = write(tmp_path, tensors, LLAMA)
    raw = (place / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.layers.0.mlp.down_proj.weight"]["shape"] = [2**40, 2**40]
    text = json.dumps(header).encode()
    (place / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    found = read_layers(place)
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert odd.name == "down" and odd.count == 1 and "do not agree" in odd.reason
    assert rows(found, "FP4 dense")["gate_up"] == FOUR["gate_up"]
