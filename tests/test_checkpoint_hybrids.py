"""The layers of hybrids, and of models of their own kind."""

from __future__ import annotations

import json

from checkpoints import (
    FLOAT4,
    FOUR,
    LLAMA,
    MODELOPT,
    bf16,
    compressed,
    llama,
    nvfp4,
    of,
    rows,
    run,
    write,
)

from fp4tune.probes.models.layers import read_layers


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
