"""Real configurations, where FP4TUNE_CORPUS names a folder of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fp4tune.probes.models.layers import read_layers

CORPUS = os.environ.get("FP4TUNE_CORPUS", "")
PLACES = sorted(p.parent for p in Path(CORPUS).rglob("config.json")) if CORPUS else []


@pytest.mark.skipif(not CORPUS, reason="FP4TUNE_CORPUS names no folder")
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.name)
def test_a_real_configuration_is_read(place, tp):
    found = read_layers(place, tp)
    assert found.rows
    for row in found.rows:
        assert row.probed == (row.reason is None)
        if row.probed:
            assert row.kind == "dense" and row.format in ("nvfp4", "mxfp4")
            assert row.n > 0 and row.k % (16 if row.format == "nvfp4" else 32) == 0
    assert all("None" not in remark for remark in found.remarks)


LISTED = Path(CORPUS) / "what_is_fp4.txt" if CORPUS else None


@pytest.mark.skipif(
    LISTED is None or not LISTED.is_file(), reason="no list of what is FP4 in FP4TUNE_CORPUS"
)
def test_what_is_fp4_in_real_checkpoints_is_what_is_listed():
    import re

    assert LISTED is not None
    for line in LISTED.read_text().splitlines():
        name, _, rest = line.partition(": ")
        if not (LISTED.parent / name).is_dir():
            continue
        found = read_layers(LISTED.parent / name)
        for layer, said in re.findall(r"(\w+):((?:NOT )?FP4(?:\(\w+\))?)", rest.split(" | ")[0]):
            mine = [r for r in found.rows if r.name in _spellings(layer)]
            fp4 = {r.part == "FP4 dense" for r in mine}
            assert mine and (True in fp4) != said.startswith("NOT"), (name, layer, said)
            if said == "FP4(W4A16_NVFP4)":
                assert {r.activation for r in mine if r.probed} == {"bf16"}


def _spellings(layer):
    """A layer's names: without a gate, and where latent attention has several."""
    others = {"qkv": ["qkv_a"], "o": ["o_a", "o_b"]}
    return [layer, layer.replace("gate_up", "up"), *others.get(layer, ())]
