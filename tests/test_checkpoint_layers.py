"""The layers of dense checkpoints, told by their files, else by their configuration."""

from __future__ import annotations

import pytest
from checkpoints import FOUR, HIDDEN, LLAMA, MODELOPT, bf16, llama, nvfp4, of, rows, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.models.layers import read_layers


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
