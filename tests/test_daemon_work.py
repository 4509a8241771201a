"""What the daemon probes: layers that are named and not published, and what no longer holds."""

from __future__ import annotations

from dataclasses import replace

import checkpoints
import pytest
from daemons import asked, candidate, mistakes, routed_candidate

from fp4tune.daemon import config as configuring
from fp4tune.daemon import work
from fp4tune.daemon.config import ProbeOptions
from fp4tune.errors import Refused

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


def test_what_is_published_and_holds_needs_no_probe():
    assert work.units([asked(128)], ProbeOptions(), [candidate(128)]) == []
    assert work.units([], ProbeOptions(), [candidate(128)]) == []


def test_layers_that_are_missing_or_stale_are_probed_one_at_a_time():
    rows = [candidate(128), candidate(192, ("stale: torch",))]
    found = work.units([asked(128), asked(192), asked(64)], ProbeOptions(), rows)
    assert [unit.layer for unit in found] == [(192, 256), (64, 256)]


def test_without_layers_of_its_own_it_probes_as_was_probed():
    (unit,) = work.units(
        [], ProbeOptions(level="quick"), [candidate(192, ("stale: x",), "vllm", 64)]
    )
    words = unit.arguments(ProbeOptions(level="quick", backends=("fast",)))
    assert " ".join(words) == (
        "probe --level quick --out-dtype bf16 --shape 192,256 --profile vllm --max-m 64 "
        "--format nvfp4 --activation bf16 --backend fast"
    )
    (unit,) = work.units([], ProbeOptions(), [])
    assert unit.layer is None, "on a fresh node: the probe's own default"


def options(units) -> set[tuple[tuple[int, int] | None, tuple[str, ...], tuple[str, ...]]]:
    return {(unit.layer, unit.formats, unit.activations) for unit in units}


def test_a_layer_s_own_format_and_activation_are_what_is_probed_and_looked_for():
    published = [candidate(128), candidate(192)]  # nvfp4 with bf16 activations
    layers = [
        asked(128, "nvfp4", "bf16"),
        asked(128, "mxfp4", "bf16"),
        asked(192, "nvfp4", "fp4"),
        asked(64, "mxfp4", "fp4"),
    ]
    found = work.units(layers, ProbeOptions(), published)
    assert options(found) == {((128, 256), ("mxfp4",), ("bf16",)), ((64, 256), ("mxfp4",), ())}
    words = " ".join(found[0].arguments(ProbeOptions()))
    assert "--shape 128,256" in words and "--format mxfp4 --activation bf16" in words
    only = ProbeOptions(formats=("mxfp4",), activations=("fp4",))
    assert options(work.units(layers, only, [])) == {((64, 256), ("mxfp4",), ("fp4",))}


def test_what_was_published_in_two_formats_is_probed_again_in_each_alone():
    stale = candidate(192, ("stale: x",))
    other = replace(stale, bucket=replace(stale.bucket, format="mxfp4", activation="fp4"))
    assert options(work.units([], ProbeOptions(), [stale, other])) == {
        ((192, 256), ("nvfp4",), ("bf16",)),
        ((192, 256), ("mxfp4",), ("fp4",)),
    }


def test_routed_experts_that_do_not_hold_are_probed_again_as_experts():
    rows = [routed_candidate(reasons=("stale: torch",)), candidate(64)]
    (unit,) = work.units([], ProbeOptions(), rows)
    words = " ".join(unit.arguments(ProbeOptions()))
    assert words == (
        "probe --level standard --experts 8,2,64,128 --profile strict --max-m 4 --format nvfp4"
    )
    assert str(unit) == "nvfp4 experts 8,2,64,128"
    assert work.units([], ProbeOptions(), [routed_candidate()]) == []


def test_experts_that_the_file_names_are_probed_where_they_are_not_published(tmp_path):
    file = tmp_path / "daemon.toml"
    file.write_text('[probe]\nexperts = ["8,2,64,128", "4,1,64,128"]\n')
    found = configuring.load(file)
    rows = [routed_candidate(), candidate(4)]
    (unit,) = work.units(found.layers(), found.probe, rows, experts=found.experts())
    assert unit.experts == "4,1,64,128" and unit.formats == ("nvfp4",)
    file.write_text('[probe]\nexperts = "8,2,64"\n')
    with pytest.raises(Refused, match="'8,2,64' is no layer of routed experts"):
        configuring.load(file)


@pytest.mark.parametrize(("tp", "ep", "expected"), [(1, 1, "32,4,2880,2880"), (8, 8, "4,4,2880")])
def test_a_model_that_is_fp4_in_its_experts_alone_is_probed_in_these(tmp_path, tp, ep, expected):
    file = tmp_path / "daemon.toml"
    file.write_text(f'[probe]\npresets = "gpt-oss-20b"\ntp = {tp}\nep = {ep}\n')
    found = configuring.load(file)
    assert found.layers() == ()
    (unit,) = work.units(found.layers(), found.probe, [], experts=found.experts())
    assert unit.formats == ("mxfp4",) and unit.experts.startswith(expected)


def test_a_checkpoint_s_layers_are_read_once_until_the_configuration_is_read_again(tmp_path):
    w4a16 = {**checkpoints.MODELOPT, "quant_algo": "W4A16_NVFP4"}
    config = {**checkpoints.LLAMA, "quantization_config": w4a16}
    place = checkpoints.write(tmp_path / "c", checkpoints.llama(), config)
    file = tmp_path / "daemon.toml"
    file.write_text(f'[probe]\ncheckpoints = "{place}"\ntp = 2\n')
    found = configuring.load(file)
    layers = found.layers()
    assert {(one.name, one.n, one.k) for one in layers} == {
        ("qkv", 384, 512), ("o", 512, 256), ("gate_up", 1536, 512), ("down", 512, 768),
    }  # fmt: skip
    assert {(one.format, one.activation) for one in layers} == {("nvfp4", "bf16")}
    assert {a for *_, a in options(work.units(layers, found.probe, []))} == {("bf16",)}
    (place / "model.safetensors").unlink()
    (place / "config.json").write_text("{")
    assert found.layers() == layers
    with pytest.raises(Refused, match=r"probe: .*config\.json is not JSON"):
        configuring.load(file)


@pytest.mark.parametrize(
    ("quantisation", "more", "said"),
    [
        ({**checkpoints.MODELOPT, "quant_algo": "FP8"}, "", "has no FP4 layer"),
        (checkpoints.MODELOPT, "formats = 'mxfp4'", "nothing is left of its layers: qkv is nvfp4"),
        (checkpoints.MODELOPT, "tp = 3", "tensor parallelism of 3"),
    ],
)
def test_a_checkpoint_that_leaves_nothing_to_probe_is_a_mistake(tmp_path, quantisation, more, said):
    config = {**checkpoints.LLAMA, "quantization_config": quantisation}
    place = checkpoints.write(tmp_path / "c", None, config)
    (sentence,) = mistakes(tmp_path, f"[probe]\ncheckpoints = ['{place}']\n{more}\n")
    assert sentence.startswith("probe: ") and said in sentence


def test_a_larger_m_than_was_published_is_probed():
    assert work.units([asked(128)], ProbeOptions(max_m=64), [candidate(128)])
