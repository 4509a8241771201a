"""The layers of routed experts, told by their files, else by their configuration."""

from __future__ import annotations

from checkpoints import HIDDEN, LLAMA, MOE, bf16, llama, moe, of, rows, run, write

from fp4tune.probes.grouped.shapes import grouped_layers
from fp4tune.probes.models.layers import read_layers


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


def test_an_expert_that_is_not_there_is_said(tmp_path):
    tensors = llama() | moe()
    found = read_layers(write(tmp_path / "all", tensors, MOE))
    assert not any("experts" in said for said in found.remarks)
    lacking = {name: t for name, t in tensors.items() if ".experts.3." not in name}
    found = read_layers(write(tmp_path / "some", lacking, MOE))
    assert any("experts, the files hold" in said for said in found.remarks)
