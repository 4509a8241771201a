"""Conditions on weights: held against real safetensors files, and never taken for another's."""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import checkpoint_check
from fp4tune.autotune.publication import publish, published
from fp4tune.cache.rows import BucketKey, Candidate, Environment
from fp4tune.probes.formats import decode_scale, quantise
from fp4tune.probes.models import checkpoint, consistency, soundness, weights
from fp4tune.probes.problem import FORMATS

N, K = 32, 128
SIZES = {"U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F32": 4, "BF16": 2}


def save(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """A safetensors file of (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def nvfp4(prefix="model.layers.0.mlp.down_proj", scale=0x38, names="modelopt", **changes):
    """A made NVFP4 weight; `changes` replace a tensor, None takes it away."""
    ours = names == "modelopt"
    found = {
        ".weight" if ours else ".weight_packed": ("U8", (N, K // 2), b"\x21" * (N * K // 2)),
        ".weight_scale": ("F8_E4M3", (N, K // 16), bytes([scale]) * (N * K // 16)),
        ".weight_scale_2" if ours else ".weight_global_scale": ("F32", (), struct.pack("<f", 0.5)),
        ".input_scale" if ours else ".input_global_scale": ("F32", (), struct.pack("<f", 2.0)),
    }
    found.update({f".{name}": value for name, value in changes.items()})
    return {prefix + name: value for name, value in found.items() if value is not None}


def scales(*first: int, dtype="F8_E4M3", block=16):
    count = N * K // block
    data = bytes(first) + bytes([0x38 if block == 16 else 127]) * (count - len(first))
    return (dtype, (N, K // block), data)


def mxfp4(prefix="model.layers.0.mlp", *first: int, codes=b"\x21", dtype="U8", naming="blocks"):
    one, two = ("_blocks", "_scales") if naming == "blocks" else (".weight_packed", ".weight_scale")
    shape = (N, K // 32, 16) if naming == "blocks" else (N, K // 2)
    return {
        prefix + one: ("U8", shape, (codes * (N * K // 2))[: N * K // 2]),
        prefix + two: scales(*first, dtype=dtype, block=32),
    }


def checked(path: Path) -> dict[tuple[str, str | None], soundness.ConditionResult]:
    opened = checkpoint.open_checkpoint(path)
    found, odd = weights.weights(opened)
    results = soundness.check(found, odd, consistency.surroundings(path, opened))
    return {(r.condition.id, r.out_dtype): r for r in results}


def statuses(path: Path) -> dict[str, str]:
    return {name: r.status for (name, dtype), r in checked(path).items() if dtype != "fp16"}


def run(*args: object):
    done = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert "Traceback" not in done.output
    return done


@pytest.mark.parametrize("names", ["modelopt", "compressed-tensors"])
def test_good_nvfp4_weights_hold(tmp_path, names):
    save(tmp_path / "model.safetensors", nvfp4(names=names))
    assert statuses(tmp_path) == {
        "block-scale-min": "holds",
        "block-scale-range": "not applicable",
        "scales-finite": "holds",
        "scales-positive": "holds",
        "global-scale": "holds",
        "input-scale": "holds",
        "partners": "holds",
        "dead-blocks": "holds",
        "plausible-weights": "holds",
        "plausible-inputs": "holds",
        "fused-scales": "not applicable",
        "fused-formats": "not applicable",
        "config-agrees": "not applicable",
    }
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 0, done.output
    assert "holds: smallest non-zero block scale >= 2^-6, in 1 tensors" in done.output


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"weight_scale": scales(0x07)}, "block-scale-min"),
        ({"weight_scale": scales(0x01)}, "block-scale-min"),
        ({"weight_scale": scales(0x7F)}, "scales-finite"),
        ({"weight_scale": scales(0xFF)}, "scales-finite"),
        ({"weight_scale": scales(0xB8)}, "scales-positive"),
        ({"weight_scale": scales(0x7F, dtype="U8")}, "scales-finite"),
        ({"weight_scale_2": None}, "global-scale"),
        ({"weight_scale_2": ("F32", (), struct.pack("<f", 0.0))}, "global-scale"),
        ({"weight_scale_2": ("F32", (), struct.pack("<f", float("nan")))}, "global-scale"),
        ({"weight_scale_2": ("BF16", (), b"\x80\x7f")}, "global-scale"),
        ({"weight_scale_2": ("U8", (), b"\x01")}, "global-scale"),
        ({"input_scale": ("F32", (), struct.pack("<f", float("inf")))}, "input-scale"),
    ],
)
def test_each_way_to_break_a_condition_is_found_and_named(tmp_path, change, broken):
    save(tmp_path / "model.safetensors", {**nvfp4("a"), **nvfp4("b", **change)})
    found = statuses(tmp_path)
    assert [name for name, status in found.items() if status == "broken"] == [broken]
    done = run("check-weights", tmp_path, "--state", tmp_path / "state", "--json")
    assert done.exit_code == 1
    (told,) = [c for c in json.loads(done.stdout)["conditions"] if c["status"] == "broken"]
    assert (told["id"], told["broken"]) == (broken, 1)
    assert told["first"][0]["tensor"].startswith("b.")


@pytest.mark.parametrize("scale", [0x00, 0x80, 0x08, 0x7E])
def test_the_edges_of_what_is_allowed_hold(tmp_path, scale):
    save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(scale)))
    assert "broken" not in statuses(tmp_path).values()


def test_no_activation_scale_at_all_is_a_weight_only_checkpoint(tmp_path):
    save(tmp_path / "model.safetensors", nvfp4(input_scale=None))
    assert statuses(tmp_path)["input-scale"] == "not applicable"
    save(tmp_path / "model.safetensors", {**nvfp4("a"), **nvfp4("b", input_scale=None)})
    assert statuses(tmp_path)["input-scale"] == "broken"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=N * K // 16))
def test_counts_are_those_of_the_decoded_scales(tmp_path_factory, raw):
    place = tmp_path_factory.mktemp("w")
    save(place / "model.safetensors", nvfp4(weight_scale=scales(*raw)))
    found = checked(place)
    values = decode_scale(torch.tensor(raw, dtype=torch.uint8), "e4m3")
    nan, size = values.isnan(), values.abs()
    expected = {
        "scales-finite": nan.any(),
        "block-scale-min": ((size > 0) & (size < 2.0**-6)).any(),
        "scales-positive": (values < 0).any(),
    }
    for name, broken in expected.items():
        assert found[name, None].status == ("broken" if broken else "holds"), name


@pytest.mark.parametrize("naming", ["blocks", "compressed"])
@pytest.mark.parametrize(
    ("scale", "bf16", "fp16"),
    [
        (127 - 24, "holds", "broken"),
        (127 - 25, "broken", "broken"),
        (127 + 8, "holds", "broken"),
        (127 + 9, "broken", "broken"),
        (127 + 4, "holds", "holds"),
        (127 - 10, "holds", "holds"),
    ],
)
def test_mxfp4_ranges_by_output_dtype(tmp_path, naming, scale, bf16, fp16):
    save(tmp_path / "model.safetensors", mxfp4("x", scale, naming=naming))
    found = checked(tmp_path)
    assert found["block-scale-range", "bf16"].status == bf16
    assert found["block-scale-range", "fp16"].status == fp16
    assert found["block-scale-min", None].status == "not applicable"
    assert found["global-scale", None].status == "not applicable"


def test_an_mxfp4_block_of_zeros_may_have_any_scale_but_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 24)  # pieces end inside blocks
    zero = bytes((0x00, 0x80, 0x08, 0x88)) * 4
    codes = zero + zero + b"\x00" * 15 + b"\x10" + b"\x21" * (N * K)
    save(tmp_path / "model.safetensors", mxfp4("x", 0, 0, 0, codes=codes))
    result = checked(tmp_path)["block-scale-range", "bf16"]
    assert result.first == [
        {"tensor": "x_scales", "found": f"1 of {N * K // 32} block scales out of range"}
    ]
    save(tmp_path / "model.safetensors", mxfp4("x", 255, codes=zero))
    assert statuses(tmp_path)["scales-finite"] == "broken"


def test_pieces_change_nothing(tmp_path, monkeypatch):
    save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(*[0x38] * 40, 0x03, 0x7F)))
    whole = {key: r.json() for key, r in checked(tmp_path).items()}
    monkeypatch.setattr(checkpoint, "PIECE", 7)
    assert {key: r.json() for key, r in checked(tmp_path).items()} == whole


def test_what_we_quantise_and_safetensors_writes_is_read(tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    made = quantise(torch.randn(64, 128), FORMATS["nvfp4"])
    torch_file.save_file(
        {
            "q.weight": made.codes,
            "q.weight_scale": made.scales.view(torch.float8_e4m3fn),
            "q.weight_scale_2": made.global_scale,
            "norm.weight": torch.ones(64, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )
    found = statuses(tmp_path)
    assert found["block-scale-min"] == found["global-scale"] == found["scales-finite"] == "holds"


def sharded(place: Path) -> Path:
    tensors = {**nvfp4("a"), **nvfp4("b", weight_scale=scales(0x05))}
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, value) in enumerate(tensors.items()):
        shards[f"model-{1 + number % 2}.safetensors"][name] = value
    for file, part in shards.items():
        save(place / file, part)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (place / checkpoint.INDEX).write_text(json.dumps(index))
    return place


def test_a_weight_may_be_spread_over_shards(tmp_path):
    found = checked(sharded(tmp_path))["block-scale-min", None]
    assert (found.checked, found.broken) == (2, 1)
    assert found.first[0]["tensor"] == "b.weight_scale"


def test_only_the_first_are_named_and_all_are_counted(tmp_path):
    bad = [nvfp4(f"layer{i}", weight_scale=scales(0x01)) for i in range(9)]
    save(tmp_path / "model.safetensors", {k: v for each in bad for k, v in each.items()})
    found = checked(tmp_path)["block-scale-min", None]
    assert (found.broken, len(found.first)) == (9, soundness.FIRST)
    words = run("check-weights", tmp_path, "--state", tmp_path / "s").output
    assert "in 9 of 9 tensors" in words and "and 4 more" in words


# -- what cannot be assessed


def index_of(place: Path, shard: str) -> None:
    (place / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))


def cut(place: Path) -> None:
    file = save(place / "model.safetensors", nvfp4())
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "holds no safetensors file"),
        (cut, "not where its header says"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64), "no whole safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x04"), "no whole safetensors"),
        (lambda p: index_of(p, "gone.safetensors"), "is missing"),
        (lambda p: index_of(p, "../model.safetensors"), "no file beside it"),
        (lambda p: (p / checkpoint.INDEX).write_text("[]"), "no index"),
        (
            lambda p: save(p / "model.safetensors", {"w": ("F32", (1,), b"\x00" * 4)}),
            "no FP4 weights",
        ),
        (
            lambda p: [save(p / f"{i}.safetensors", nvfp4(str(i))) for i in (1, 2)],
            "and no model.safetensors.index.json",
        ),
    ],
)
def test_what_is_no_whole_checkpoint_is_one_sentence_and_2(tmp_path, make, says):
    place = tmp_path / "checkpoint"
    place.mkdir()
    make(place)
    done = run("check-weights", place, "--state", tmp_path / "state")
    assert done.exit_code == 2
    assert says in done.output and done.output.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_an_index_that_names_the_wrong_shard_is_not_believed(tmp_path):
    sharded(tmp_path)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    index["weight_map"]["a.weight_scale_2"] = "model-2.safetensors"
    index["weight_map"]["missing"] = "model-1.safetensors"
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="where it is not"):
        checkpoint.open_checkpoint(tmp_path)


def test_scales_that_do_not_fit_are_not_assessed(tmp_path):
    odd = nvfp4("b", weight_scale=("F8_E4M3", (N, 5), b"\x38" * (5 * N)))
    save(tmp_path / "model.safetensors", {**nvfp4("a"), **odd})
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 2 and "do not fit" in done.output


def test_other_quantisations_are_not_taken_for_fp4(tmp_path):
    eight = {
        "a.weight": ("F8_E4M3", (4, 4), b"\x38" * 16),
        "a.weight_scale": ("F32", (), struct.pack("<f", 1)),
        "b.weight": ("U8", (4, 4), b"\x38" * 16),
        "b.weight_scale": ("F32", (4, 1), struct.pack("<4f", 1, 1, 1, 1)),
    }
    save(tmp_path / "model.safetensors", eight)
    assert weights.weights(checkpoint.open_checkpoint(tmp_path)) == ([], {})


# -- layers as an engine builds them


def f32(value):
    return ("F32", (), struct.pack("<f", value))


def only_broken(place, *names):
    found = statuses(place)
    assert {name for name, status in found.items() if status == "broken"} == set(names), found


@pytest.mark.parametrize(
    ("tensors", "lacks"),
    [
        ({**nvfp4("a"), **nvfp4("b", weight_scale=None)}, "b.weight"),
        ({**nvfp4("a"), **nvfp4("b", weight=None)}, "b.weight_scale"),
        (
            {**nvfp4("a", names="ct"), **nvfp4("b", names="ct", weight_scale=None)},
            "b.weight_packed",
        ),
        ({**nvfp4("a"), "x.experts.gate_up_blocks": ("U8", (N, 4, 16), b"\x21" * (64 * N))},
         "x.experts.gate_up_blocks"),
        ({**nvfp4("a"), "x.experts.down_proj": ("U8", (2, N, 16), b"\x21" * (32 * N))},
         "x.experts.down_proj"),
        ({**mxfp4("a"), **{n: t for n, t in mxfp4("b").items() if "scales" not in n}}, "b_blocks"),
    ],
)  # fmt: skip
def test_a_tensor_without_its_partner_is_an_error(tmp_path, tensors, lacks):
    save(tmp_path / "model.safetensors", tensors)
    assert statuses(tmp_path)["partners"] == "broken"
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 1 and lacks in done.output


def test_a_checkpoint_of_nothing_but_orphans_is_an_error_too(tmp_path):
    save(tmp_path / "model.safetensors", nvfp4("a", weight_scale=None))
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 1 and "codes without block scales" in done.output


def test_weights_lost_under_scales_of_zero_are_found(tmp_path):
    whole = N * K // 16
    save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(*[0] * whole)))
    only_broken(tmp_path, "dead-blocks")
    save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(*[0, 0x80] * (whole // 8))))
    only_broken(tmp_path, "dead-blocks")  # a quarter of it
    save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(*[0] * (whole // 16))))
    only_broken(tmp_path)  # a few blocks that were rounded to nothing
    zeros = ("U8", (N, K // 2), bytes((0x00, 0x08, 0x80, 0x88)) * (N * K // 8))
    save(tmp_path / "model.safetensors", nvfp4(weight=zeros, weight_scale=scales(*[0] * whole)))
    only_broken(tmp_path)  # nothing was there


def test_an_expert_lost_among_many_is_found(tmp_path):
    rows, k, experts = 64, 64, 32
    one = bytes([0x38]) * (rows * k // 16)
    data = one * 20 + bytes(len(one)) + one * (experts - 21)
    at = "model.layers.0.mlp.experts.down_proj"
    save(tmp_path / "model.safetensors", {
        at: ("U8", (experts, rows, k // 2), b"\x21" * (experts * rows * k // 2)),
        f"{at}_weight_scale": ("F8_E4M3", (experts, rows, k // 16), data),
        f"{at}_weight_scale_2": f32(0.5),
    })  # fmt: skip
    result = checked(tmp_path)["dead-blocks", None]
    assert "64 rows on end" in result.first[0]["found"]


@pytest.mark.parametrize("names", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(("amax", "right"), [(0.05, True), (3.0, True), (900.0, True)])
def test_a_global_scale_in_the_other_convention_is_told(tmp_path, names, amax, right):
    multiplier, divisor = amax / 2688, 2688 / amax
    key = "weight_scale_2" if names == "modelopt" else "weight_global_scale"
    mine, other = (multiplier, divisor) if names == "modelopt" else (divisor, multiplier)
    full = scales(*[0x7E] * 8)
    save(tmp_path / "model.safetensors", nvfp4(names=names, weight_scale=full, **{key: f32(mine)}))
    only_broken(tmp_path)
    save(tmp_path / "model.safetensors", nvfp4(names=names, weight_scale=full, **{key: f32(other)}))
    if amax < 800:  # near the turning point, sqrt(2688), both read alike
        only_broken(tmp_path, "plausible-weights")
        done = run("check-weights", tmp_path, "--state", tmp_path / "state")
        assert done.exit_code == 1 and "the other convention" in done.output


def test_weights_that_vanish_are_told(tmp_path):
    save(tmp_path / "model.safetensors", nvfp4(weight_scale_2=f32(1e-20)))
    only_broken(tmp_path, "plausible-weights")


@pytest.mark.parametrize("names", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(
    ("amax", "says"),
    [(1e30, "to 0"), (1e6, "to 0"), (1e5, None), (10.0, None), (0.01, None), (1e-5, "the maximum")],
)
def test_scales_for_activations_that_no_layer_has_are_told(tmp_path, names, amax, says):
    ours = names == "modelopt"
    key, value = ("input_scale", amax / 2688) if ours else ("input_global_scale", 2688 / amax)
    save(tmp_path / "model.safetensors", nvfp4(names=names, **{key: f32(value)}))
    result = checked(tmp_path)["plausible-inputs", None]
    assert result.status == ("holds" if says is None else "broken")
    assert says is None or says in result.first[0]["found"]


@pytest.mark.parametrize(
    ("leaves", "binades"),
    [(("q_proj", "k_proj", "v_proj"), 2.0), (("gate_proj", "up_proj"), 1.0), (("w1", "w3"), 3.0)],
)
def test_members_of_a_fused_layer_with_other_scales_lose_binades(tmp_path, leaves, binades):
    tensors = {}
    for leaf in leaves:
        value = 0.5 * 2**binades if leaf == leaves[0] else 0.5
        tensors |= nvfp4(f"model.layers.0.x.{leaf}", weight_scale_2=f32(value))
    save(tmp_path / "model.safetensors", tensors)
    result = checked(tmp_path)["fused-scales", None]
    assert result.status == "broken" and f"{binades:.2g} binades" in result.first[0]["found"]
    same = {}
    for leaf in leaves:
        same |= nvfp4(f"model.layers.0.x.{leaf}")
    save(tmp_path / "model.safetensors", {**same, **nvfp4("model.layers.0.x.down_proj",
                                                         weight_scale_2=f32(0.1))})  # fmt: skip
    assert statuses(tmp_path)["fused-scales"] == "holds"


@pytest.mark.parametrize(
    ("values", "shape", "status"),
    [((0.5, 0.5), (2,), "holds"), ((0.5, 2.0), (2,), "broken"), ((0.5,), (1,), "not applicable")],
)
def test_a_layer_that_is_stored_fused_has_one_global_scale_too(tmp_path, values, shape, status):
    own = ("F32", shape, struct.pack(f"<{len(values)}f", *values))
    tensors = nvfp4("model.layers.0.mlp.gate_up_proj", weight_scale_2=own)
    save(tmp_path / "model.safetensors", {**tensors, **nvfp4("model.layers.0.mlp.down_proj")})
    result = checked(tmp_path)["fused-scales", None]
    assert result.status == status
    if status == "broken":
        assert "2 binades" in result.first[0]["found"]


def test_members_of_a_fused_layer_in_two_formats_are_found(tmp_path):
    at = "model.layers.0.self_attn"
    tensors = {**nvfp4(f"{at}.q_proj"), **nvfp4(f"{at}.o_proj")}
    for leaf in ("k_proj", "v_proj"):
        tensors[f"{at}.{leaf}.weight"] = ("BF16", (N, K), b"\0" * (2 * N * K))
    save(tmp_path / "model.safetensors", tensors)
    only_broken(tmp_path, "fused-formats")
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 1 and f"{at}.{{q_proj,k_proj,v_proj}}" in done.output


def test_a_configuration_that_says_otherwise_is_found(tmp_path):
    at = "model.layers.0"
    save(tmp_path / "model.safetensors", {
        **nvfp4(f"{at}.mlp.down_proj"),
        f"{at}.self_attn.o_proj.weight": ("BF16", (N, K), b"\0" * (2 * N * K)),
    })  # fmt: skip
    right = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [f"{at}.self_attn*"]}
    for config, broken in (({**right}, False), ({**right, "ignore": []}, True)):
        values = {"quantization_config": config}
        (tmp_path / "config.json").write_text(json.dumps(values))
        result = checked(tmp_path)["config-agrees", None]
        assert result.status == ("broken" if broken else "holds")
    assert "says nvfp4, the files hold bf16" in result.first[0]["found"]


def test_a_configuration_without_quantisation_beside_fp4_files_is_found(tmp_path):
    save(tmp_path / "model.safetensors", nvfp4("model.layers.0.mlp.down_proj"))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": K}))
    only_broken(tmp_path, "config-agrees")
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 1
    assert "config.json says nothing of quantisation, the files hold nvfp4" in done.output
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}})
    )
    only_broken(tmp_path)


def test_codes_of_no_known_name_are_listed_and_never_clean(tmp_path):
    codes = ("U8", (N, K // 2), b"\x21" * (N * K // 2))
    odd = {"model.layers.1.mlp.down_proj.packed_fp4": codes,
           "model.layers.1.mlp.down_proj.block_scales": scales()}  # fmt: skip
    save(tmp_path / "model.safetensors", {**nvfp4("model.layers.0.mlp.down_proj"), **odd})
    done = run("check-weights", tmp_path, "--state", tmp_path / "state")
    assert done.exit_code == 2 and "packed_fp4: 4-bit codes" in done.output
    done = run("layers", tmp_path)
    assert done.exit_code == 0 and "under a name that is not known here" in done.output
    save(tmp_path / "model.safetensors", odd)
    for command in (("check-weights", "--state", tmp_path / "state"), ("layers",)):
        done = run(*command, tmp_path)
        assert done.exit_code == 2 and "under a name that is not known here" in done.output


def test_what_was_found_does_not_outlive_the_configuration(tmp_path):
    save(tmp_path / "model.safetensors", nvfp4())
    before = checkpoint.open_checkpoint(tmp_path).identity
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.open_checkpoint(tmp_path).identity != before


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 4))
def test_the_order_of_tensors_changes_nothing(tmp_path_factory, order, threads):
    place = tmp_path_factory.mktemp("w")
    made = [nvfp4(f"l{i}", weight_scale=scales(0x01 if i == 3 else 0x38)) for i in range(6)]
    save(place / "model.safetensors", {n: t for i in order for n, t in made[i].items()})
    result = checked(place)["block-scale-min", None]
    assert (result.checked, result.broken) == (6, 1)
    assert result.first[0]["tensor"] == "l3.weight_scale"


# -- applied to a choice

BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 1, 4096, 4096)
ENVIRONMENT = Environment("e" * 64, "any", "sm90", {"distributions": {}, "code": "ab"})
NEEDS = {"id": "block-scale-min", "text": "smallest non-zero block scale >= 2^-6"}
STREAM = {"id": "one-stream-per-layer", "text": "a layer's weight is never used on two streams"}


@pytest.fixture
def chosen(tmp_path):
    """A state in which the choice has a condition on weights, and the next has none."""
    place = tmp_path / "state"
    place.mkdir()
    marlin = Candidate(
        "sm90", "H200", "strict", BUCKET, "marlin", "default", "marlin", "safe", median_us=10.0,
        launches=9, problems=9, conditions=(NEEDS, STREAM), fingerprint=ENVIRONMENT.fingerprint,
    )  # fmt: skip
    other = replace(marlin, backend="triton-w4a16", layout="packed", median_us=20.0, conditions=())
    publish.republish(place, published.usable(place), [marlin, other], [ENVIRONMENT])
    return place


def answer(state: Path, path: Path, command="choose"):
    done = run(command, 1, 4096, 4096, "--checkpoint", path, "--state", state, "--json")
    return done, json.loads(done.stdout) if done.stdout.startswith("{") else None


def test_a_condition_is_discharged_for_the_checkpoint_that_was_checked_alone(tmp_path, chosen):
    good = tmp_path / "good"
    good.mkdir()
    save(good / "model.safetensors", nvfp4())
    done, _ = answer(chosen, good)
    assert done.exit_code == 2 and "was not checked" in done.output
    assert run("check-weights", good, "--state", chosen).exit_code == 0
    done, document = answer(chosen, good)
    assert done.exit_code == 0
    found = {c["id"]: c["status"] for c in document["checkpoint"]["conditions"]}
    assert found["block-scale-min"] == "holds"
    assert found["one-stream-per-layer"] == checkpoint_check.NOT_WEIGHTS
    assert document["checkpoint"]["status"] == "holds"
    plain = run("choose", 1, 4096, 4096, "--state", chosen)
    assert plain.exit_code == 0 and "holds in" not in plain.output

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    assert "was not checked" in answer(chosen, copy)[0].output


def test_a_checkpoint_that_changed_is_checked_anew(tmp_path, chosen):
    file = save(tmp_path / "model.safetensors", nvfp4())
    assert run("check-weights", file, "--state", chosen).exit_code == 0
    stamp = os.stat(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert "was not checked as it is now" in answer(chosen, file)[0].output


def test_weights_that_break_it_make_the_next_the_answer(tmp_path, chosen):
    bad = save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(0x01)))
    assert run("check-weights", bad, "--state", chosen).exit_code == 1
    done, document = answer(chosen, bad)
    assert done.exit_code == 1
    assert document["checkpoint"]["status"] == "broken"
    assert document["checkpoint"]["instead"]["backend"] == "triton-w4a16"
    words = run("choose", 1, 4096, 4096, "--checkpoint", bad, "--state", chosen).output
    assert "broken in" in words and "triton-w4a16 instead" in words
    done, document = answer(chosen, bad, "explain")
    assert done.exit_code == 1
    assert document["candidates"][0]["conditions"][0]["status"] == "broken"


def test_nothing_is_proven_of_weights_that_are_not_valid(tmp_path, chosen):
    bad = save(tmp_path / "model.safetensors", nvfp4(weight_scale=scales(0x7F)))
    run("check-weights", bad, "--state", chosen)
    _, document = answer(chosen, bad)
    assert document["checkpoint"]["status"] == "broken"
    assert document["checkpoint"]["instead"] is None


def test_weights_of_another_format_discharge_nothing(tmp_path, chosen):
    other = save(tmp_path / "model.safetensors", mxfp4("x"))
    assert run("check-weights", other, "--state", chosen).exit_code == 0
    _, document = answer(chosen, other)
    assert document["checkpoint"]["status"] == "open"
    assert document["checkpoint"]["conditions"][0]["status"] == "not assessed"


def test_show_tells_what_is_known_of_a_checkpoint(tmp_path, chosen):
    good = save(tmp_path / "model.safetensors", nvfp4())
    run("check-weights", good, "--state", chosen)
    done = run("show", "--checkpoint", good, "--state", chosen, "--json")
    assert json.loads(done.stdout)["checkpoint"]["formats"] == {"nvfp4": 1}
    assert (
        "holds: no block scale is NaN"
        in run("show", "--checkpoint", good, "--state", chosen).output
    )


def test_a_forged_record_is_as_good_as_none(tmp_path, chosen):
    good = save(tmp_path / "model.safetensors", nvfp4())
    run("check-weights", good, "--state", chosen)
    (record,) = (chosen / "weights").glob("*.json")
    for text in ("", "[]", "{}", record.read_text().replace('"identity": "', '"identity": "0')):
        record.write_text(text)
        assert "was not checked" in answer(chosen, good)[0].output


def test_the_page_has_every_condition_that_is_checked(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    save(tmp_path / "model.safetensors", nvfp4())
    said = re.findall(r"^\| `([\w-]+)` \| .+ \| (nvfp4|mxfp4|both) \|$", page, re.M)
    assert {name for name, _ in said} == {name for name, _ in checked(tmp_path)}
