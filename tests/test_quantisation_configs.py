"""Each way in which a configuration says what is quantised, and how."""

from __future__ import annotations

import pytest
from checkpoints import FLOAT4, FLOAT8, FOUR, LLAMA, MODELOPT, compressed, of, rows, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.models.patterns import NamePatterns, cut_off
from fp4tune.probes.models.quant_readers import read_quantisation

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


@pytest.mark.parametrize("value", [[MODELOPT], "nvfp4", 4, True, {"quantization": "NVFP4"}])
def test_a_quantisation_config_that_is_no_table_is_not_16_bit(value):
    found = of({**LLAMA, "quantization_config": value})
    assert {row.part for row in found.rows} == {"not understood"} and not found.probed
    assert any("is no table" in said for said in found.remarks)


def test_a_method_s_name_stands_for_an_algorithm_that_is_not_said():
    found = of({**LLAMA, "quantization_config": {"quant_method": "modelopt_fp4", "ignore": []}})
    assert rows(found, "FP4 dense") == FOUR | {"lm_head": (1000, 512, "nvfp4", "fp4")}


def test_a_quantisation_config_of_nothing_says_nothing():
    assert read_quantisation("x", {}) is None
    assert read_quantisation("x", {"quantization": {"kv_cache_quant_algo": "FP8"}}) is None
