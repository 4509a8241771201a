"""Layer shapes of presets and config.json files under tensor parallelism."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.autotune import request
from fp4tune.probes.models.shapes import PRESETS, config_layers, parse_shape, preset_layers


def shapes(found):
    """(n, k) by name, of everything that a model has, FP4 or not."""
    return {row.name: (row.n, row.k) for row in found.rows if row.n}


def dense(found):
    """(n, k) by name of what is probed."""
    return {row.name: (row.n, row.k) for row in found.probed}


def write(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_llama_8b_whole_and_split():
    assert dense(preset_layers("llama-3.1-8b")) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert dense(preset_layers("llama-3.1-8b", 4)) == {
        "qkv": (1536, 4096),
        "o": (4096, 1024),
        "gate_up": (7168, 4096),
        "down": (4096, 3584),
    }


def test_key_value_heads_are_copied_where_ranks_outnumber_them():
    # 64 query heads over 16 ranks: 4, and one of the 8 key/value heads each.
    assert shapes(preset_layers("llama-3.3-70b", 16))["qkv"] == ((4 + 2) * 128, 8192)


def test_deepseek_has_latent_attention_and_shared_experts():
    found = preset_layers("deepseek-v3", 8)
    named = {
        "qkv_a": (2112, 7168),
        "q_b": (3072, 1536),
        "kv_b": (4096, 512),
        "o": (7168, 2048),
        "gate_up": (4608, 7168),
        "down": (7168, 2304),
        "shared_gate_up": (512, 7168),
        "shared_down": (7168, 256),
    }
    assert named.items() <= shapes(found).items()
    # What comes before the queries and the keys is 16-bit in what is published.
    assert dense(found) == {k: v for k, v in named.items() if k not in ("qkv_a", "q_b", "kv_b")}


def test_models_with_experts_leave_them_out():
    assert preset_layers("qwen3-30b-a3b").grouped > 0
    assert dense(preset_layers("qwen3-30b-a3b")) == {"qkv": (5120, 2048), "o": (2048, 4096)}
    gated = dense(preset_layers("qwen3-next-80b-a3b"))
    assert gated["qkv"] == ((2 * 16 + 2 * 2) * 256, 2048)
    assert gated["shared_gate_up"] == (1024, 2048)
    assert gated["shared_down"] == (2048, 512)


WHOLE = ("qkv", "qkv_a", "in_proj", "kv_gate", "fc1_latent", "fc2_latent", "router", "eh_proj")
"""Layers of which ranks hold copies, in whole or in part."""


@given(name=st.sampled_from(sorted(PRESETS)), tp=st.sampled_from([1, 2, 4, 8, 16]))
def test_ranks_together_hold_the_model(name, tp):
    try:
        split = preset_layers(name, tp)
    except ValueError as error:
        assert str(tp) in str(error)
        return

    def weights(found):
        return {
            (row.name, row.modules): row.n * row.k
            for row in found.rows
            if row.n and row.format in ("nvfp4", "mxfp4") and not row.reason
        }

    whole, part = weights(preset_layers(name)), weights(split)
    assert whole.keys() == part.keys()
    for (layer, modules), size in whole.items():
        copied = layer.removeprefix("mtp_") in WHOLE
        assert part[layer, modules] * tp >= size
        assert copied or part[layer, modules] * tp == size


def test_equal_shapes_are_one_layer(tmp_path):
    path = write(
        tmp_path, hidden_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=128,
        intermediate_size=512,
    )  # fmt: skip
    assert dense(config_layers(path)) == {
        "qkv": (2048, 1024),
        "o": (1024, 1024),
        "gate_up": (1024, 1024),
        "down": (1024, 512),
    }
    asked = request.layers((), path, (), 1, "cpu")
    assert [(each.n, each.k) for each in asked] == [(2048, 1024), (1024, 1024), (1024, 512)]


def test_a_config_gives_what_the_preset_gives(tmp_path):
    path = write(tmp_path, **LLAMA)
    assert dense(config_layers(path, 2)) == dense(preset_layers("llama-3.1-8b", 2))
    assert config_layers(tmp_path, 2).rows == config_layers(path, 2).rows


def test_head_dim_is_read_and_text_config_is_entered(tmp_path):
    path = write(tmp_path, model_type="some_vl", text_config={**LLAMA, "head_dim": 256})
    assert shapes(config_layers(path))["qkv"] == ((32 + 16) * 256, 4096)


def test_key_value_heads_default_to_the_query_heads(tmp_path):
    values = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert shapes(config_layers(write(tmp_path, **values)))["qkv"] == (3 * 4096, 4096)


@pytest.mark.parametrize(
    ("more", "mlps"),
    [
        ({"num_experts": 128, "mlp_only_layers": [], "decoder_sparse_step": 1}, {}),
        ({"num_experts": 128, "mlp_only_layers": [0]}, {"": 14336}),
        ({"num_local_experts": 8}, {}),
        ({"num_experts": 64, "shared_expert_intermediate_size": 512}, {"shared_": 512}),
        (
            {
                "n_routed_experts": 256,
                "n_shared_experts": 2,
                "moe_intermediate_size": 1024,
                "first_k_dense_replace": 3,
            },
            {"": 14336, "shared_": 2048},
        ),
        ({"num_experts": 0}, {"": 14336}),
    ],
)
def test_experts_leave_dense_and_shared_parts(tmp_path, more, mlps):
    # Four layers: enough that first ones, last ones and every other one are there.
    found = config_layers(write(tmp_path, **LLAMA, num_hidden_layers=4, **more))
    down = {n.removesuffix("down"): k for n, (_, k) in dense(found).items() if n.endswith("down")}
    assert down == mlps
    assert bool(found.grouped) == any(
        more.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def test_deepseek_config_is_the_preset(tmp_path):
    path = write(
        tmp_path,
        model_type="deepseek_v3",
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        first_k_dense_replace=3,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_hidden_layers=61,
        vocab_size=129280,
    )
    found, preset = shapes(config_layers(path, 4)), shapes(preset_layers("deepseek-r1", 4))
    assert found == {k: v for k, v in preset.items() if not k.startswith("mtp_")}


def test_an_ungated_mlp_has_one_up_projection(tmp_path):
    found = shapes(config_layers(write(tmp_path, **LLAMA, hidden_act="relu2")))
    assert found["up"] == (14336, 4096) and "gate_up" not in found


def refused(path, tp=1):
    with pytest.raises(ValueError) as caught:
        config_layers(path, tp)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_say_what_is_wrong(tmp_path):
    assert "cannot be read" in refused(tmp_path / "absent.json")
    path = tmp_path / "config.json"
    path.write_text("{")
    assert "not JSON" in refused(path)
    path.write_text("[1]")
    assert "no object" in refused(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not JSON" in refused(path)
    missing = refused(write(tmp_path, vocab_size=10))
    assert "lacks hidden_size, num_attention_heads" in missing
    # One odd field does not refuse a model: what it is needed for is named, the rest is read.
    found = config_layers(write(tmp_path, hidden_size=64, num_attention_heads=4))
    assert dense(found) == {"qkv": (192, 64), "o": (64, 64)}
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert "intermediate_size is None" in odd.reason
    assert "hidden_size is '4096'" in refused(write(tmp_path, **{**LLAMA, "hidden_size": "4096"}))


def test_a_bad_split_says_what_it_does_not_divide(tmp_path):
    path = write(tmp_path, **LLAMA)
    assert "3 does not divide the model's 32 attention heads" in refused(path, 3)
    assert "at least 1" in refused(path, 0)
    odd = write(tmp_path, **{**LLAMA, "num_key_value_heads": 6})
    assert "4 does not divide the model's 6 key/value heads" in refused(odd, 4)
    assert "8 is not a multiple of the model's 6 key/value heads" in refused(odd, 8)
    narrow = write(tmp_path, **{**LLAMA, "intermediate_size": 14337})
    assert "does not divide its 14337 columns" in refused(narrow, 2)


def test_unknown_presets_list_the_known():
    with pytest.raises(ValueError, match=r"llama-3\.1-8b"):
        preset_layers("llama-9")


@given(
    n=st.integers(1, 10**6), k=st.integers(1, 10**6), separator=st.sampled_from([",", "x", ", "])
)
def test_shapes_parse(n, k, separator):
    assert parse_shape(f"{n}{separator}{k}") == (n, k)


@pytest.mark.parametrize("text", ["", "4096", "1,2,3", "a,b", "0,16", "16,-1", "1.5,2"])
def test_other_text_is_no_shape(text):
    with pytest.raises(ValueError, match="is not a shape"):
        parse_shape(text)
