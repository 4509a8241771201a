"""The layers of a checkpoint, told by its files, else by its configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from checkpoints import (
    HIDDEN,
    LLAMA,
    MODELOPT,
    bf16,
    fp8,
    llama,
    mxfp4,
    nvfp4,
    write,
    write_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.probes.grouped.shapes import grouped_layers
from fp4tune.probes.models import layers
from fp4tune.probes.models.config import made
from fp4tune.probes.models.layers import layers_of_config, read_layers
from fp4tune.probes.models.patterns import NamePatterns, cut_off
from fp4tune.probes.models.quant_readers import read_quantisation
from fp4tune.probes.models.shapes import checkpoint_layers

SCHEMA = {
    "name", "modules", "count", "n", "k", "groups", "top_k", "format", "activation", "kind",
    "probed", "reason",
}  # fmt: skip


def rows(found, part=None):
    """(n, k, format, activation) by name."""
    return {
        row.name: (row.n, row.k, row.format, row.activation)
        for row in found.rows
        if part is None or row.part == part
    }


def run(*args):
    done = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert "Traceback" not in done.output
    return done


def of(config, tp=1):
    return layers_of_config("made", made("config.json", config), tp)


# -- dense models


FOUR = {
    "qkv": (768, 512, "nvfp4", "fp4"),
    "o": (512, 512, "nvfp4", "fp4"),
    "gate_up": (3072, 512, "nvfp4", "fp4"),
    "down": (512, 1536, "nvfp4", "fp4"),
}


@pytest.mark.parametrize("shards", [1, 3])
def test_files_and_configuration_say_the_same(tmp_path, shards):
    config = {**LLAMA, "quantization_config": MODELOPT}
    files = read_layers(write(tmp_path / "a", llama(), config, shards=shards))
    alone = read_layers(write(tmp_path / "b", None, config))
    assert rows(files, "FP4 dense") == rows(alone, "FP4 dense") == FOUR
    assert rows(files) == rows(alone)
    assert (files.source, alone.source) == ("files", "configuration")
    assert not files.remarks and not alone.remarks
    assert files.rows == alone.rows


def test_a_rank_has_its_share_and_copies_of_key_value_heads(tmp_path):
    place = write(tmp_path, llama(), {**LLAMA, "quantization_config": MODELOPT})
    assert rows(read_layers(place, 2), "FP4 dense") == {
        "qkv": ((4 + 2) * 64, 512, "nvfp4", "fp4"),
        "o": (512, 256, "nvfp4", "fp4"),
        "gate_up": (1536, 512, "nvfp4", "fp4"),
        "down": (512, 768, "nvfp4", "fp4"),
    }
    assert rows(read_layers(place, 8))["qkv"][0] == (1 + 2) * 64  # 2 heads over 8 ranks
    assert rows(read_layers(place, 8))["lm_head"][0] == 1024 // 8  # padded to 64


@pytest.mark.parametrize(
    ("family", "joined"),
    [
        ("phi3", {"self_attn": ("qkv_proj", 768), "mlp": ("gate_up_proj", 3072)}),
        ("glm4", {"mlp": ("gate_up_proj", 3072)}),
        ("cohere2", {}),
    ],
)
def test_weights_that_are_stored_joined_are_the_same_layers(tmp_path, family, joined):
    config = {**LLAMA, "model_type": family, "quantization_config": MODELOPT}
    tensors = {}
    for name, tensor in llama().items():
        part = next((part for part in joined if f".{part}." in name), "")
        if not part or name.split(".")[4] in ("o_proj", "down_proj"):
            tensors[name] = tensor
            continue
        leaf, n = joined[part]
        tensors.update(nvfp4(name.split(f".{part}.")[0] + f".{part}.{leaf}", n, HIDDEN))
    for tp in (1, 2):
        files = read_layers(write(tmp_path / f"a{tp}", tensors, config), tp)
        alone = read_layers(write(tmp_path / f"b{tp}", None, config), tp)
        plain = of({**LLAMA, "quantization_config": MODELOPT}, tp)
        for found in (files, alone):
            assert rows(found, "FP4 dense") == rows(plain, "FP4 dense")


def test_ernies_experts_begin_and_end_at_layers_of_its_own_naming():
    config = {
        **LLAMA, "model_type": "ernie4_5_moe", "num_hidden_layers": 6, "moe_num_experts": 8,
        "moe_k": 3, "moe_intermediate_size": 256, "moe_layer_start_index": 1,
        "moe_layer_end_index": -1, "moe_layer_interval": 2, "moe_num_shared_experts": 2,
        "quantization_config": MODELOPT,
    }  # fmt: skip
    found = of(config)
    (w13,) = [row for row in found.rows if row.name == "experts_w13"]
    assert (w13.count, w13.groups, w13.top_k, w13.n, w13.k) == (3, 8, 3, 512, HIDDEN)
    counts = {row.name: row.count for row in found.rows}
    assert counts["gate_up"] == 3 and counts["shared_gate_up"] == 3 and "lm_head" not in counts
    assert not found.remarks
    ended = of({**config, "moe_layer_end_index": 2})
    assert {row.name: row.count for row in ended.rows}["experts_w13"] == 1


@pytest.mark.parametrize(("said", "there"), [(None, False), (False, True), (True, False)])
def test_an_output_layer_is_the_embedding_where_a_family_has_it_so(said, there):
    config = {**LLAMA, "model_type": "gemma3_text", "quantization_config": MODELOPT}
    config.pop("tie_word_embeddings", None)
    if said is not None:
        config["tie_word_embeddings"] = said
    assert ("lm_head" in rows(of(config))) is there


def test_without_a_configuration_files_say_what_they_can(tmp_path):
    place = write(tmp_path, llama())
    assert rows(read_layers(place), "FP4 dense") == FOUR
    split = read_layers(place, 2)
    (qkv,) = [row for row in split.rows if row.name == "qkv"]
    assert not qkv.probed and "number of heads is not known" in qkv.reason
    assert rows(split)["gate_up"] == (1536, 512, "nvfp4", "fp4")


def test_a_split_that_cuts_a_scale_group_names_layer_tp_and_what_fits(tmp_path):
    config = {**LLAMA, "intermediate_size": 1856, "num_attention_heads": 16, "head_dim": 32,
              "quantization_config": MODELOPT}  # fmt: skip
    found = read_layers(write(tmp_path, None, config), 8)
    (down,) = [row for row in found.rows if row.name == "down"]
    assert not down.probed
    assert "tensor parallelism of 8 leaves k = 232" in down.reason
    assert "of down; the next that fits is 4" in down.reason
    done = run("probe", "--checkpoint", tmp_path, "--tp", 8, "--gpu", "none")
    assert done.exit_code == 2 and "the next that fits is 4" in done.output


def test_a_tp_that_no_engine_starts_with_is_said(tmp_path):
    write(tmp_path, llama(), {**LLAMA, "quantization_config": MODELOPT})
    done = run("layers", tmp_path, "--tp", 3)
    assert done.exit_code == 2 and "does not divide the model's 8 attention heads" in done.output
    assert run("layers", tmp_path, "--tp", 0).exit_code == 2
    done = run("probe", "--checkpoint", tmp_path, "--tp", 3, "--gpu", "none")
    assert done.exit_code == 2 and "8 attention heads" in done.output


def test_members_of_one_layer_in_two_formats_are_not_understood(tmp_path):
    tensors = llama()
    for i in range(2):
        for name in [t for t in tensors if t.startswith(f"model.layers.{i}.self_attn.k_proj.")]:
            del tensors[name]
        tensors |= bf16(f"model.layers.{i}.self_attn.k_proj", 128, 512)
    found = read_layers(write(tmp_path, tensors, LLAMA))
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert odd.name == "qkv" and "k_proj is bf16" in odd.reason and not odd.probed


def test_the_files_win_and_the_difference_is_said(tmp_path):
    config = {**LLAMA, "quantization_config": {**MODELOPT, "ignore": ["lm_head", "*.mlp.*"]}}
    found = read_layers(write(tmp_path, llama(), config))
    assert rows(found, "FP4 dense") == FOUR
    (said,) = found.remarks
    assert "says bf16, the files hold nvfp4 (5 more modules likewise)" in said


def test_two_configurations_are_read_in_the_order_of_engines(tmp_path):
    config = {**LLAMA, "quantization_config": MODELOPT}
    found = read_layers(write(tmp_path, None, config, {**MODELOPT, "quant_algo": "FP8"}))
    assert rows(found, "FP4 dense") == FOUR
    assert any("hf_quant_config.json" in said for said in found.remarks)
    alone = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    only = read_layers(write(tmp_path / "b", None, LLAMA, alone))
    assert rows(only, "FP4 dense") == FOUR and not only.remarks


# -- quantisation configurations

FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(weights, inputs, targets=("Linear",), ignore=("lm_head",), **more):
    group = {"weights": weights, "input_activations": inputs, "targets": list(targets)}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        **more,
    }


QUARK = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
CASES = {
    "modelopt": (MODELOPT, "nvfp4", "fp4"),
    "modelopt in small letters": ({**MODELOPT, "quant_algo": "nvfp4"}, "nvfp4", "fp4"),
    "modelopt w4a16": ({**MODELOPT, "quant_algo": "W4A16_NVFP4"}, "nvfp4", "bf16"),
    "modelopt w4a8": ({**MODELOPT, "quant_algo": "W4A8_NVFP4_FP8"}, "nvfp4", "fp8"),
    "modelopt mxfp8": ({**MODELOPT, "quant_algo": "MXFP8"}, "mxfp8", "fp8"),
    "modelopt fp8": ({**MODELOPT, "quant_algo": "FP8"}, "fp8", "fp8"),
    "modelopt awq": ({**MODELOPT, "quant_algo": "W4A16_AWQ"}, "int4 (awq)", "bf16"),
    "modelopt other groups": (
        {**MODELOPT, "group_size": 32}, "unknown: nvfp4 in groups of 32", "fp4",
    ),
    "modelopt new": ({**MODELOPT, "quant_algo": "NVFP3"}, "unknown: NVFP3", "bf16"),
    "fp8 key/value cache only": (
        {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8", "quant_algo": None},
        "bf16", "bf16",
    ),
    "compressed-tensors": (compressed(FLOAT4, FLOAT4), "nvfp4", "fp4"),
    "compressed-tensors w4a16": (compressed(FLOAT4, None), "nvfp4", "bf16"),
    "compressed-tensors mxfp4": (
        compressed({**FLOAT4, "group_size": 32}, None, format="mxfp4-pack-quantized"),
        "mxfp4", "bf16",
    ),
    "compressed-tensors fp8": (compressed(FLOAT8, FLOAT8), "fp8", "fp8"),
    "compressed-tensors int4": (
        compressed({"num_bits": 4, "type": "int", "group_size": 128}, None), "int4", "bf16",
    ),
    "compressed-tensors by expression": (
        compressed(FLOAT4, FLOAT4, [r"re:.*self_attn\..*", r"re:.*mlp\..*"], ()), "nvfp4", "fp4",
    ),
    "compressed-tensors cache only": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FLOAT8},
        "bf16", "bf16",
    ),
    "quark": (
        {"quant_method": "quark", "exclude": ["lm_head"],
         "global_quant_config": {"weight": QUARK, "input_tensors": QUARK}},
        "mxfp4", "fp4",
    ),
    "quark weights only": (
        {"quant_method": "quark", "exclude": ["*lm_head"],
         "global_quant_config": {"weight": QUARK, "input_tensors": None}},
        "mxfp4", "bf16",
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {
            "_type": "NVFP4DynamicActivationNVFP4WeightConfig", "_data": {}}}},
        "nvfp4", "fp4",
    ),
    "torchao weights only": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "NVFP4WeightOnlyConfig"}}},
        "nvfp4", "bf16",
    ),
    "torchao by name": (
        {"quant_method": "torchao", "quant_type": {"default": {
            "_type": "ModuleFqnToConfig", "_data": {"module_fqn_to_config": {
                "_default": {"_type": "NVFP4InferenceConfig", "_data": {}}, "lm_head": None}}}}},
        "nvfp4", "fp4",
    ),
    "torchao int4": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "int4", "bf16"),
    "fp-quant": ({"quant_method": "fp_quant", "forward_dtype": "mxfp4"}, "mxfp4", "fp4"),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "data_type": "nv_fp",
         "act_bits": 4},
        "nvfp4", "fp4",
    ),
    "awq": ({"quant_method": "awq", "bits": 4}, "int4 (awq)", "bf16"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "int4 (gptq)", "bf16"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "bitsandbytes fp4", "bf16",
    ),
    "never heard of": ({"quant_method": "xyz9"}, "unknown: xyz9", "bf16"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_way_to_say_a_format_is_read(case):
    config, format_, activation = CASES[case]
    found = of({**LLAMA, "quantization_config": config})
    told = rows(found)
    assert {name: told[name][2:] for name in FOUR} == dict.fromkeys(FOUR, (format_, activation))
    assert told["lm_head"][2] == "bf16"
    known = format_ in ("nvfp4", "mxfp4") and activation != "fp8"
    assert {row.name for row in found.probed} == (set(FOUR) if known else set())
    assert all(row.reason for row in found.rows if not row.probed)
    parts = {row.part for row in found.rows if row.name == "down"}
    assert ("not understood" in parts) == format_.startswith("unknown")


@pytest.mark.parametrize(
    "config", [1, "x", [], {"quant_method": 3}, {"config_groups": 3}, {"config_groups": {"a": 1}},
               {"quant_method": "quark", "layer_quant_config": 4}, {"quantized_layers": {"a": 3}},
               {"quant_method": "compressed-tensors", "ignore": ["re:("], "config_groups": {}},
               {"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig"}}},
               {"quant_algo": ["NVFP4"]}, {"quant_algo": "NVFP4", "ignore": "lm_head"}],
)  # fmt: skip
def test_an_odd_quantisation_config_is_no_traceback(tmp_path, config):
    write(tmp_path, None, {**LLAMA, "quantization_config": config})
    assert run("layers", tmp_path, "--json").exit_code in (0, 2)


def test_groups_that_name_modules_go_before_those_of_a_class():
    named = {"weights": FLOAT8, "input_activations": FLOAT8, "targets": ["re:.*down_proj$"]}
    config = compressed(FLOAT4, FLOAT4, format="mixed-precision")
    config["config_groups"]["group_1"] = named
    found = rows(of({**LLAMA, "quantization_config": config}))
    assert found["down"][2:] == ("fp8", "fp8") and found["gate_up"][2:] == ("nvfp4", "fp4")


def test_a_table_by_layer_decides_layer_by_layer():
    table = {
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.1.mlp": {"quant_algo": "FP8"},
        "lm_head": {"quant_algo": "NVFP4", "group_size": 16},
    }
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": table,
    }
    found = of({**LLAMA, "quantization_config": config})
    told = sorted((r.name, r.format, r.activation, r.modules) for r in found.rows)
    assert ("down", "nvfp4", "bf16", "model.layers.{0}.mlp.down_proj") in told
    assert ("down", "fp8", "fp8", "model.layers.{1}.mlp.down_proj") in told
    assert ("lm_head", "nvfp4", "fp4", "lm_head") in told
    assert {row.name for row in found.probed} == {"down", "lm_head"}


@given(st.lists(st.text(max_size=12), max_size=8), st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_patterns_of_any_text_are_no_error(patterns, name):
    NamePatterns(patterns).match(name)


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("lm_head", "language_model.lm_head", True),
        ("model.layers.1*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1*", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("*.mlp.gate", "model.layers.3.mlp.gate", True),
        ("*.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.3.mlp.shared_expert*", "model.layers.3.mlp.shared_expert.up_proj", True),
        ("language_model.model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn", "model.language_model.layers.0.self_attn.q_proj", True),
        ("re:.*lm_head", "lm_head", True),
        ("self_attn", "model.layers.3.self_attn.q_proj", True),
        ("self", "model.layers.3.self_attn.q_proj", False),
    ],
)
def test_patterns_name_whole_modules_and_what_is_inside(pattern, name, hit):
    assert NamePatterns([pattern]).match(name) == hit


def test_a_list_that_was_cut_off_is_completed_and_said():
    kept = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1, 10, 11)]
    assert cut_off(kept, 61) == ["model.layers.*.self_attn.o_proj"]
    assert cut_off([f"model.layers.{i}.self_attn.o_proj" for i in range(4)], 61) == []
    assert cut_off([f"model.layers.{i}.self_attn.o_proj" for i in range(12)], 12) == []
    config = {**LLAMA, "num_hidden_layers": 61, "quantization_config": {**MODELOPT, "ignore": kept}}
    found = of(config)
    assert "o" not in rows(found, "FP4 dense") and "cut off" in found.remarks[0]


# -- experts


def moe(make=nvfp4, experts=4, **names):
    tensors = bf16("model.layers.0.mlp.gate", experts, HIDDEN)
    for e in range(experts):
        for leaf, n, k in (("gate_proj", 256, 512), ("up_proj", 256, 512), ("down_proj", 512, 256)):
            tensors |= make(f"model.layers.0.mlp.experts.{e}.{leaf}", n, k)
    return tensors


MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "quantization_config": MODELOPT,
}


def test_experts_are_grouped_and_said_with_their_share(tmp_path):
    found = read_layers(write(tmp_path, moe(), MOE), 2)
    grouped = {r.name: (r.n, r.k, r.groups, r.top_k) for r in found.rows if r.kind == "grouped"}
    assert grouped == {"experts_w13": (256, 512, 4, 2), "experts_w2": (512, 128, 4, 2)}
    assert not found.probed and found.dense == 0 and found.grouped == 4 * 3 * 256 * 512
    done = run("layers", tmp_path)
    assert done.exit_code == 0 and "100 % of the FP4 parameters" in done.output
    (layer,) = grouped_layers(found, 4)
    assert (layer.groups, layer.top_k, layer.n, layer.k, layer.m) == (4, 2, 128, 512, 4)


def test_experts_that_differ_or_lack_a_part_are_not_understood(tmp_path):
    tensors = moe()
    del tensors["model.layers.0.mlp.experts.1.down_proj.weight_scale"]
    for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"model.layers.0.mlp.experts.2.up_proj.{part}"]
    tensors |= bf16("model.layers.0.mlp.experts.2.up_proj", 256, 512)
    found = read_layers(write(tmp_path, tensors, MOE))
    told = {r.name: r.reason for r in found.rows if r.part == "not understood"}
    assert "4 experts have codes, 3 have block scales" in told["experts_w2"]
    assert "the experts differ" in told["experts_w13"]


def test_experts_in_one_tensor_are_read_either_way_round(tmp_path):
    at = "model.layers.0.mlp.experts"
    blocks = {
        f"{at}.gate_up_proj_blocks": ("U8", (4, 512, 16, 16)),
        f"{at}.gate_up_proj_scales": ("U8", (4, 512, 16)),
        f"{at}.gate_up_proj_bias": ("BF16", (4, 512)),
        f"{at}.down_proj_blocks": ("U8", (4, 512, 8, 16)),
        f"{at}.down_proj_scales": ("U8", (4, 512, 8)),
    }
    turned = {
        f"{at}.gate_up_proj": ("U8", (4, 256, 512)),
        f"{at}.gate_up_proj_weight_scale": ("F8_E4M3", (4, 32, 512)),
        f"{at}.gate_up_proj_weight_scale_2": ("F32", ()),
        f"{at}.down_proj": ("U8", (4, 128, 512)),
        f"{at}.down_proj_weight_scale": ("F8_E4M3", (4, 16, 512)),
        f"{at}.down_proj_weight_scale_2": ("F32", ()),
    }
    plain = {
        f"{at}.gate_up_proj": ("BF16", (4, 512, 514)),
        f"{at}.down_proj": ("BF16", (4, 257, 512)),
    }
    for place, tensors, name in (
        ("a", blocks, "mxfp4"), ("b", turned, "nvfp4"), ("c", plain, "bf16"),
    ):  # fmt: skip
        found = read_layers(write(tmp_path / place, tensors, {"hidden_size": HIDDEN}))
        told = {r.name: (r.n, r.k, r.groups, r.format) for r in found.rows}
        width = 514 if name == "bf16" else 512
        assert told["experts_w13"] == (width, 512, 4, name)
        assert told["experts_w2"] == (512, width // 2, 4, name)


def test_gpt_oss_ranks_take_whole_blocks():
    config = {
        **LLAMA, "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_local_experts": 32, "experts_per_token": 4,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
    }  # fmt: skip
    whole, split = of(config), of(config, 8)
    assert rows(whole, "FP4 grouped") == {
        "experts_w13": (5760, 2880, "mxfp4", "bf16"),
        "experts_w2": (2880, 2880, "mxfp4", "bf16"),
    }
    assert rows(whole)["qkv"][2] == rows(whole)["o"][2] == "bf16"
    assert rows(split)["experts_w2"][:2] == (2880, 384)  # 12 of 90 blocks
    assert rows(split)["experts_w13"][:2] == (768, 2880)
    assert not whole.probed and "mxfp4" in whole.nothing()


def test_deepseek_v4_has_fp4_experts_among_fp8():
    config = {
        "model_type": "deepseek_v4", "hidden_size": 512, "num_attention_heads": 8, "head_dim": 128,
        "q_lora_rank": 256, "o_lora_rank": 128, "o_groups": 2, "num_hidden_layers": 2,
        "moe_intermediate_size": 256, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "vocab_size": 1000, "expert_dtype": "fp4",
        "compress_ratios": [0, 4], "num_nextn_predict_layers": 0,
        "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
    }  # fmt: skip
    found = rows(of(config, 2))
    assert found["experts_w13"] == (256, 512, "mxfp4", "fp8")
    assert found["qkv_a"] == (256 + 128, 512, "fp8", "fp8")
    assert found["q_b"] == (512, 256, "fp8", "fp8")
    assert found["o_a"] == (128, 512, "fp8", "fp8")
    assert found["o_b"] == (512, 128, "fp8", "fp8")
    assert found["shared_gate_up"] == (256, 512, "fp8", "fp8")
    assert found["compressor_kv_gate"][:2] == (512, 512)
    assert found["lm_head"][2] == "bf16"


# -- hybrids and models of their own kind


def test_mamba_layers_are_split_by_heads_and_groups():
    config = {
        "model_type": "nemotron_h", "hidden_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "hybrid_override_pattern": "M*-E",
        "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 4, "ssm_state_size": 32,
        "intermediate_size": 768, "moe_intermediate_size": 256, "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 384, "n_shared_experts": 2, "moe_latent_size": 128,
        "mlp_hidden_act": "relu2", "vocab_size": 1000, "num_experts_per_tok": 2,
        "quantization_config": MODELOPT,
    }  # fmt: skip
    whole, half = rows(of(config)), rows(of(config, 2))
    inputs = 2 * 1024 + 2 * 4 * 32 + 16
    assert whole["in_proj"][:2] == (inputs, 512) and half["in_proj"][:2] == (inputs // 2, 512)
    assert whole["out_proj"][:2] == (512, 1024) and half["out_proj"][:2] == (512, 512)
    assert whole["up"][:2] == (768, 512) and whole["down"][:2] == (512, 768)  # no gate
    assert whole["shared_up"][:2] == (768, 512)
    assert whole["experts_w13"][:2] == (256, 128) and whole["experts_w2"][:2] == (128, 256)
    assert half["fc1_latent"][:2] == (128, 512) and half["fc2_latent"][:2] == (512, 128)
    refused = of(config, 8)
    assert "does not divide the model's 4 state groups" in refused.stops
    single = rows(of({**config, "n_groups": 1}, 4))
    assert single["in_proj"][0] == (2 * 1024 + 16) // 4 + 2 * 32


def test_linear_attention_and_gates():
    config = {
        **LLAMA, "model_type": "qwen3_5_text", "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "attn_output_gate": True,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "quantization_config": MODELOPT,
    }  # fmt: skip
    found = rows(of(config, 2))
    assert found["in_proj_qkvz"][:2] == ((2 * 128 + 2 * 256) // 2, 512)
    assert found["in_proj_ba"][:2] == (8, 512)
    assert found["out_proj"][:2] == (512, 128)
    assert found["qkv"][:2] == ((2 * 4 + 2) * 64, 512)
    assert "3 does not divide" in str(of(config, 3).stops)


def test_layers_of_several_kinds_are_rows_of_their_own():
    config = {
        **LLAMA, "model_type": "gemma4_text", "num_hidden_layers": 3, "global_head_dim": 128,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "quantization_config": MODELOPT, "tie_word_embeddings": True,
    }  # fmt: skip
    found = of(config)
    told = {(r.name, r.n, r.k, r.count) for r in found.rows}
    assert ("qkv", (8 + 4) * 64, 512, 2) in told and ("qkv", (8 + 2) * 128, 512, 1) in told
    assert ("o", 512, 512, 2) in told and ("o", 512, 1024, 1) in told
    assert not any(name == "lm_head" for name, *_ in told)
    assert {(r.n, r.count) for r in of(config, 2).rows if r.name == "qkv"} == {
        ((4 + 2) * 64, 2), ((4 + 2) * 128, 1),
    }  # fmt: skip


def test_blocks_that_differ_are_read_block_by_block():
    def block(mult, heads, **more):
        return {"attention": {"n_heads_in_group": heads, "no_op": heads is None, **more},
                "ffn": {"ffn_mult": mult, "no_op": mult is None}}  # fmt: skip

    config = {
        "model_type": "nemotron-nas", "hidden_size": 512, "num_attention_heads": 8,
        "block_configs": [block(3.0, 4), block(1.5, None), block(None, 2),
                          block(3.0, None, replace_with_linear=True, no_op=False)],
        "quantization_config": MODELOPT,
    }  # fmt: skip
    found = of(config)
    told = {(r.name, r.n, r.k, r.count) for r in found.rows if r.n}
    assert told == {
        ("qkv", (8 + 2 * 2) * 64, 512, 1), ("qkv", (8 + 2 * 4) * 64, 512, 1),
        ("o", 512, 512, 2), ("gate_up", 2048, 512, 2), ("down", 512, 1024, 2),
        ("gate_up", 1024, 512, 1), ("down", 512, 512, 1),
    }  # fmt: skip
    (odd,) = [r for r in found.rows if r.part == "not understood"]
    assert "linear layer" in odd.reason


def test_latent_attention_is_fused_and_absorbed(tmp_path):
    config = {
        **LLAMA, "model_type": "deepseek_v3", "q_lora_rank": 256, "kv_lora_rank": 128,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 48,
        "quantization_config": MODELOPT,
    }  # fmt: skip
    found = of(config, 2)
    told = rows(found)
    assert told["qkv_a"][:2] == (256 + 128 + 32, 512)  # whole on every rank
    assert told["q_b"][:2] == (4 * 96, 256) and told["kv_b"][:2] == (4 * 112, 128)
    assert told["o"][:2] == (512, 4 * 48)
    (absorbed,) = [r for r in found.rows if r.name == "kv_b"]
    assert not absorbed.probed and "absorbed" in absorbed.reason
    short = rows(of({**config, "q_lora_rank": None}))
    assert short["q"][:2] == (8 * 96, 512) and short["kv_a"][:2] == (160, 512)


def test_each_engine_has_rules_of_its_own(tmp_path):
    at = "model.layers.0.self_attn.indexer"
    tensors = bf16(f"{at}.wk", 128, 512) | bf16(f"{at}.weights_proj", 32, 512)
    write(tmp_path, tensors | llama(layers=1), LLAMA)
    assert rows(read_layers(tmp_path, engine="vllm"))["indexer_wk_weights"][:2] == (160, 512)
    assert rows(read_layers(tmp_path, engine="sglang"))["indexer_wk"][:2] == (128, 512)
    assert "there is no engine" in run("layers", tmp_path, "--engine", "x").output


def test_towers_drafts_and_unknown_leaves_are_told_apart(tmp_path):
    tensors = llama()
    tensors |= nvfp4("model.visual.blocks.0.attn.qkv", 768, 256)
    tensors |= nvfp4("model.visual.blocks.0.attn.proj", 256, 256)
    tensors |= bf16("model.visual.patch_embed.proj", 256, 3, 2, 16, 16)
    tensors |= nvfp4("mtp.layers.0.mlp.down_proj", 512, 1536)
    tensors |= nvfp4("model.layers.2.mlp.down_proj", 512, 1536)  # behind the last: it drafts
    tensors |= nvfp4("model.layers.0.mystery.foo_proj", 512, 512)
    tensors |= bf16("model.layers.0.mystery.bar_proj", 512, 512)
    found = read_layers(write(tmp_path, tensors, LLAMA))
    told = rows(found)
    assert told["vision_qkv"][:2] == (768, 256) and told["vision_o"][:2] == (256, 256)
    assert told["mtp_down"] == (512, 1536, "nvfp4", "fp4")
    assert {r.name: r.part for r in found.rows}["foo_proj"] == "not understood"
    assert {r.name: r.part for r in found.rows}["bar_proj"] == "not FP4"
    assert not {r.name for r in found.probed} & {"foo_proj", "bar_proj"}
    assert sum(r.count for r in found.rows if r.name == "down") == 2


def test_an_unknown_family_is_not_guessed_from_its_configuration(tmp_path):
    config = {**LLAMA, "model_type": "brand_new", "quantization_config": MODELOPT}
    alone = read_layers(write(tmp_path / "a", None, config))
    assert [r.part for r in alone.rows] == ["not understood"] and not alone.probed
    assert "brand_new" in alone.rows[0].reason
    files = read_layers(write(tmp_path / "b", llama(), config))
    assert rows(files, "FP4 dense") == FOUR


def test_mistrals_own_configuration_is_read(tmp_path):
    params = {
        "dim": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64,
        "hidden_dim": 1536, "vocab_size": 1000,
        "quantization": compressed(FLOAT4, FLOAT4, ignore=("output",)),
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    found = read_layers(tmp_path)
    assert rows(found, "FP4 dense") == FOUR and rows(found)["lm_head"][2] == "bf16"
    assert "layers.*.attention.{wq,wk,wv}" in {r.modules for r in found.rows}


# -- other quantisations in files


def int4(name, n, k):
    return {f"{name}.qweight": ("I32", (k, n // 8)), f"{name}.qzeros": ("I32", (k // 128, n // 8)),
            f"{name}.scales": ("F16", (k // 128, n))}  # fmt: skip


def gptq(name, n, k):
    return {f"{name}.qweight": ("I32", (k // 8, n)), f"{name}.scales": ("F16", (k // 128, n))}


def mxfp8(name, n, k):
    return {f"{name}.weight": ("F8_E4M3", (n, k)), f"{name}.weight_scale": ("U8", (n, k // 32))}


def int8(name, n, k):
    return {f"{name}.weight": ("I8", (n, k)), f"{name}.weight_scale": ("F32", (n, 1))}


def bits(name, n, k):
    return {f"{name}.weight": ("U8", (n * k // 2, 1)), f"{name}.weight.absmax": ("F32", (n,))}


def native(name, n, k):
    return {f"{name}.weight": ("I8", (n, k // 2)), f"{name}.scale": ("F8_E8M0", (n, k // 32))}


def torchao(name, n, k):
    return {f"{name}._weight_qdata": ("U8", (n, k // 2)),
            f"{name}._weight_scale": ("F8_E4M3", (n, k // 16))}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "format_"),
    [
        (nvfp4, "nvfp4"), (partial(nvfp4, naming="compressed"), "nvfp4"), (torchao, "nvfp4"),
        (mxfp4, "mxfp4"), (native, "mxfp4"), (fp8, "fp8"), (mxfp8, "mxfp8"), (int4, "int4 (awq)"),
        (gptq, "int4 (gptq)"), (int8, "int8"), (bf16, "bf16"), (bits, "bitsandbytes"),
    ],
)  # fmt: skip
def test_files_are_told_by_their_tensors(tmp_path, make, format_):
    found = read_layers(write(tmp_path, llama(make), LLAMA))
    told = rows(found)
    assert {told[name][2] for name in FOUR} == {format_}
    if format_ != "bitsandbytes":
        assert {name: told[name][:2] for name in FOUR} == {n: v[:2] for n, v in FOUR.items()}
    assert bool(found.probed) == (format_ in ("nvfp4", "mxfp4"))
    done = run("layers", tmp_path)
    assert done.exit_code == (0 if found.probed else 2)


def test_weights_without_scales_for_activations_are_served_as_w4a16(tmp_path):
    found = read_layers(write(tmp_path, llama(partial(nvfp4, static=False)), LLAMA))
    assert rows(found)["down"] == (512, 1536, "nvfp4", "bf16")


def test_codes_without_scales_are_not_understood(tmp_path):
    tensors = llama()
    for i in range(2):
        del tensors[f"model.layers.{i}.mlp.down_proj.weight_scale"]
    found = read_layers(write(tmp_path, tensors, LLAMA))
    (odd,) = [r for r in found.rows if r.part == "not understood"]
    assert odd.name == "down" and "codes without block scales" in odd.reason


# -- where a checkpoint is, and what is wrong with it


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


# -- the command


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


@given(st.dictionaries(st.sampled_from(sorted(LLAMA)), st.one_of(
    st.none(), st.integers(-2, 2**70), st.text(max_size=4), st.lists(st.integers(), max_size=2),
    st.floats(), st.booleans())))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_odd_fields_are_sentences(changes):
    try:
        found = of({**LLAMA, "num_hidden_layers": 2, **changes, "quantization_config": MODELOPT})
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert all(row.probed or row.reason for row in found.rows)


def test_a_model_that_names_no_heads_has_its_mlp(tmp_path):
    config = {k: v for k, v in LLAMA.items() if k != "num_attention_heads"}
    found = of({**config, "quantization_config": MODELOPT})
    assert set(rows(found, "FP4 dense")) == {"gate_up", "down"}
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert odd.name == "self_attn" and "num_attention_heads is None" in odd.reason
    # With its files its shapes are there, and how they are split is not.
    write(tmp_path, llama(), config)
    assert rows(read_layers(tmp_path), "FP4 dense") == FOUR
    (split,) = [row for row in read_layers(tmp_path, 2).rows if row.name == "qkv"]
    assert not split.probed and (split.reason or "").endswith("how tensor parallelism splits it")


@pytest.mark.parametrize("value", [[MODELOPT], "nvfp4", 4, True, {"quantization": "NVFP4"}])
def test_a_quantisation_config_that_is_no_table_is_not_16_bit(value):
    found = of({**LLAMA, "quantization_config": value})
    assert {row.part for row in found.rows} == {"not understood"} and not found.probed
    assert any("is no table" in said for said in found.remarks)


def test_a_low_rank_part_beside_codes_is_another_kernel_s(tmp_path):
    tensors = llama()
    for leaf, shape in (("svdquant_lora_a", (32, 1536)), ("svdquant_lora_b", (512, 32))):
        tensors[f"model.layers.1.mlp.down_proj.{leaf}"] = ("BF16", shape)
    config = {**LLAMA, "quantization_config": {**MODELOPT, "quant_algo": "NVFP4_SVDQUANT"}}
    found = read_layers(write(tmp_path, tensors, config))
    assert [row.count for row in found.probed if row.name == "down"] == [1]
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert odd.name == "down" and "low-rank" in odd.reason


def test_an_expert_that_is_not_there_is_said(tmp_path):
    tensors = llama() | moe()
    found = read_layers(write(tmp_path / "all", tensors, MOE))
    assert not any("experts" in said for said in found.remarks)
    lacking = {name: t for name, t in tensors.items() if ".experts.3." not in name}
    found = read_layers(write(tmp_path / "some", lacking, MOE))
    assert any("experts, the files hold" in said for said in found.remarks)


def test_a_method_s_name_stands_for_an_algorithm_that_is_not_said():
    found = of({**LLAMA, "quantization_config": {"quant_method": "modelopt_fp4", "ignore": []}})
    assert rows(found, "FP4 dense") == FOUR | {"lm_head": (1000, 512, "nvfp4", "fp4")}


def test_a_quantisation_config_of_nothing_says_nothing():
    assert read_quantisation("x", {}) is None
    assert read_quantisation("x", {"quantization": {"kv_cache_quant_algo": "FP8"}}) is None


# -- a folder of real configurations, where there is one

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
