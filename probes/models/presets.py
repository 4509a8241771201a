"""Known models: the sizes in their config.json, and what of them is FP4 as they are published.

Each is read by the code that reads a checkpoint's configuration. A model whose published form is
not quantised has no quantisation here: its layers are taken as FP4, the output layer as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """`model` is the Hugging Face name whose config.json has these numbers.

    `recipe` says where the quantisation is not that of `model` itself, and what is assumed.
    """

    model: str
    config: Mapping[str, Any]
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""

    @property
    def values(self) -> dict[str, Any]:
        more = {"quantization_config": self.quantisation} if self.quantisation else {}
        return {**self.config, **more}


def _nvfp4_config(*ignore: str, algorithm: str = "NVFP4") -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "group_size": 16,
        "ignore": ["lm_head", "*.mlp.gate", *ignore],
    }


def _mixed_config(table: Mapping[str, str], *ignore: str) -> dict[str, Any]:
    layers = {name: {"quant_algo": algorithm} for name, algorithm in table.items()}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "ignore": list(ignore),
    }


def _sizes(
    layers: int, hidden: int, intermediate: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        **more,
    }


def _attention_sizes(query: int, key_value: int, width: int) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "head_dim": width}


def _expert_sizes(count: int, top: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "num_experts": count,
        "num_experts_per_tok": top,
        "moe_intermediate_size": size,
        **more,
    }


def _latent(heads: int, q_rank: int, nope: int, value: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": 64,
        "v_head_dim": value,
    }


def _deepseek(
    layers: int, hidden: int, intermediate: int, experts: int, dense: int
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense,
    }


_LATENT_ONLY = ("*q_a_proj", "*q_b_proj", "*kv_a_proj_with_mqa", "*kv_b_proj")
_V3 = {
    "model_type": "deepseek_v3",
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "num_nextn_predict_layers": 1,
    **_deepseek(61, 7168, 18432, 256, 3),
    **_latent(128, 1536, 128, 128),
}
_V3_QUANTISED = _nvfp4_config(*_LATENT_ONLY, "model.layers.61*")
_V4 = {
    "model_type": "deepseek_v4",
    "swiglu_limit": 10.0,
    "vocab_size": 129280,
    "head_dim": 512,
    "num_key_value_heads": 1,
    "o_lora_rank": 1024,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "expert_dtype": "fp4",
}
_V4_QUANTISED = {
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "quantized_layers": {"layers.*.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
}
_GLM5 = {
    "model_type": "glm_moe_dsa",
    "routed_scaling_factor": 2.5,
    "vocab_size": 154880,
    "num_nextn_predict_layers": 1,
    "index_n_heads": 32,
    "index_head_dim": 128,
    **_deepseek(78, 6144, 12288, 256, 3),
    **_latent(64, 2048, 192, 256),
}
_KIMI = {
    "model_type": "kimi_k2",
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    **_deepseek(61, 7168, 18432, 384, 1),
    **_latent(64, 1536, 128, 128),
}
_QWEN_DELTA = {
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
}
_QWEN35 = {
    "vocab_size": 248320,
    "attn_output_gate": True,
    "mtp_num_hidden_layers": 1,
    **_QWEN_DELTA,
}
_NEMOTRON3 = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
}
_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_NANO_KEPT = (5, 12, 19, 26, 33, 42)
_SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
_ULTRA = "MEMEMEM*" + ("EMEMEM*" + "EMEMEMEM*" * 2) * 3 + "EMEMEM*EMEMEMEM*EMEMEMEME"
_MOST_OF_NEMOTRON = (
    "its list of layers that are not FP4 is not known: the latent and the output are"
)
_LLAMA4 = {
    "model_type": "llama4_text",
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 16384,
    **_sizes(48, 5120, 8192, 202048),
    **_attention_sizes(40, 8, 128),
}
_LLAMA4_QUANTISED = _nvfp4_config("*router", "*vision*", "*self_attn*")
_LLAMA4_RECIPE = "attention, the router and the output layer are taken as 16-bit"
_GPT_OSS = {
    "model_type": "gpt_oss",
    "swiglu_limit": 7.0,
    "num_experts_per_tok": 4,
    **_attention_sizes(64, 8, 64),
}
_GPT_OSS_QUANTISED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["*.self_attn", "*.mlp.router", "model.embed_tokens", "lm_head"],
}
_TABLED = {"*.mlp.experts": "W4A16_NVFP4", "*.mlp.shared_expert": "W4A16_NVFP4"}
_EIGHT = {
    "*.self_attn": "FP8",
    "*.linear_attn.in_proj_qkv": "FP8",
    "*.linear_attn.in_proj_z": "FP8",
}
_EIGHT |= {"*.linear_attn.out_proj": "FP8"}


def _dense_model(name: str, model: str, sizes: dict[str, Any], heads: dict[str, Any]) -> Preset:
    return Preset(model, {"model_type": name, **sizes, **heads})


PRESETS: dict[str, Preset] = {
    "llama-3.2-1b": _dense_model(
        "llama",
        "meta-llama/Llama-3.2-1B",
        _sizes(16, 2048, 8192, 128256, tie_word_embeddings=True),
        _attention_sizes(32, 8, 64),
    ),
    "llama-3.1-8b": _dense_model(
        "llama",
        "meta-llama/Llama-3.1-8B",
        _sizes(32, 4096, 14336, 128256),
        _attention_sizes(32, 8, 128),
    ),
    "llama-3.3-70b": _dense_model(
        "llama",
        "meta-llama/Llama-3.3-70B-Instruct",
        _sizes(80, 8192, 28672, 128256),
        _attention_sizes(64, 8, 128),
    ),
    "llama-3.1-405b": _dense_model(
        "llama",
        "meta-llama/Llama-3.1-405B",
        _sizes(126, 16384, 53248, 128256),
        _attention_sizes(128, 8, 128),
    ),
    "llama-4-scout": Preset(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        {**_LLAMA4, "num_local_experts": 16, "interleave_moe_layer_step": 1},
        _LLAMA4_QUANTISED,
        _LLAMA4_RECIPE,
    ),
    "llama-4-maverick": Preset(
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        {**_LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2},
        _LLAMA4_QUANTISED,
        _LLAMA4_RECIPE,
    ),
    "mistral-small-24b": _dense_model(
        "mistral",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        _sizes(40, 5120, 32768, 131072),
        _attention_sizes(32, 8, 128),
    ),
    "mixtral-8x7b": Preset(
        "mistralai/Mixtral-8x7B-v0.1",
        {
            "model_type": "mixtral",
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            **_sizes(32, 4096, 14336, 32000),
            **_attention_sizes(32, 8, 128),
        },
    ),
    "qwen2.5-7b": _dense_model(
        "qwen2", "Qwen/Qwen2.5-7B", _sizes(28, 3584, 18944, 152064), _attention_sizes(28, 4, 128)
    ),
    "qwen2.5-72b": _dense_model(
        "qwen2", "Qwen/Qwen2.5-72B", _sizes(80, 8192, 29568, 152064), _attention_sizes(64, 8, 128)
    ),
    "qwen3-0.6b": _dense_model(
        "qwen3",
        "Qwen/Qwen3-0.6B",
        _sizes(28, 1024, 3072, 151936, tie_word_embeddings=True),
        _attention_sizes(16, 8, 128),
    ),
    "qwen3-8b": _dense_model(
        "qwen3", "Qwen/Qwen3-8B", _sizes(36, 4096, 12288, 151936), _attention_sizes(32, 8, 128)
    ),
    "qwen3-14b": _dense_model(
        "qwen3", "Qwen/Qwen3-14B", _sizes(40, 5120, 17408, 151936), _attention_sizes(40, 8, 128)
    ),
    "qwen3-32b": _dense_model(
        "qwen3", "Qwen/Qwen3-32B", _sizes(64, 5120, 25600, 151936), _attention_sizes(64, 8, 128)
    ),
    "qwen3-30b-a3b": Preset(
        "Qwen/Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe",
            **_sizes(48, 2048, 6144, 151936),
            **_attention_sizes(32, 4, 128),
            **_expert_sizes(128, 8, 768),
        },
        _nvfp4_config(),
        "as nvidia/Qwen3-235B-A22B-NVFP4 is",
    ),
    "qwen3-235b-a22b": Preset(
        "nvidia/Qwen3-235B-A22B-NVFP4",
        {
            "model_type": "qwen3_moe",
            **_sizes(94, 4096, 12288, 151936),
            **_attention_sizes(64, 4, 128),
            **_expert_sizes(128, 8, 1536),
        },
        _nvfp4_config(),
    ),
    "qwen3-vl-235b-a22b": Preset(
        "Qwen/Qwen3-VL-235B-A22B-Instruct",
        {
            "model_type": "qwen3_vl_moe_text",
            **_sizes(94, 4096, 12288, 151936),
            **_attention_sizes(64, 4, 128),
            **_expert_sizes(128, 8, 1536),
        },
        _nvfp4_config("*visual*"),
        "as nvidia/Qwen3-235B-A22B-NVFP4 is, the vision tower 16-bit",
    ),
    "qwen3-next-80b-a3b": Preset(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        {
            "model_type": "qwen3_next",
            **_sizes(48, 2048, 5120, 151936),
            **_attention_sizes(16, 2, 256),
            **_expert_sizes(512, 10, 512, shared_expert_intermediate_size=512),
            **_QWEN_DELTA,
            "linear_num_value_heads": 32,
        },
        _nvfp4_config("*linear_attn*", "mtp*"),
        "linear attention and the output layer are taken as 16-bit",
    ),
    "qwen3.5-122b-a10b": Preset(
        "nvidia/Qwen3.5-122B-A10B-NVFP4",
        {
            "model_type": "qwen3_5_moe_text",
            **_QWEN35,
            "num_hidden_layers": 48,
            "hidden_size": 3072,
            **_attention_sizes(32, 2, 256),
            **_expert_sizes(256, 8, 1024, shared_expert_intermediate_size=1024),
            "linear_num_value_heads": 64,
        },
        _nvfp4_config("*linear_attn*", "*self_attn*", "*shared_expert*", "mtp*"),
    ),
    "qwen3.6-27b": Preset(
        "nvidia/Qwen3.6-27B-NVFP4",
        {
            "model_type": "qwen3_5_text",
            **_QWEN35,
            "num_hidden_layers": 64,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            **_attention_sizes(24, 4, 256),
            "linear_num_value_heads": 48,
        },
        _mixed_config(
            {"model.layers.*.mlp": "W4A16_NVFP4", "lm_head": "W4A16_NVFP4"} | _EIGHT, "mtp*"
        ),
    ),
    "qwen3.6-35b-a3b": Preset(
        "nvidia/Qwen3.6-35B-A3B-NVFP4",
        {
            "model_type": "qwen3_5_moe_text",
            **_QWEN35,
            "num_hidden_layers": 40,
            "hidden_size": 2048,
            **_attention_sizes(16, 2, 256),
            **_expert_sizes(256, 8, 512, shared_expert_intermediate_size=512),
            "linear_num_value_heads": 32,
        },
        _mixed_config(_TABLED | {"lm_head": "W4A16_NVFP4"} | _EIGHT, "mtp*"),
    ),
    "gemma-4-26b-a4b": Preset(
        "nvidia/Gemma-4-26B-A4B-NVFP4",
        {
            "model_type": "gemma4_text",
            **_sizes(30, 2816, 2112, 262144, tie_word_embeddings=True),
            **_attention_sizes(16, 8, 256),
            **_expert_sizes(128, 8, 704),
            "enable_moe_block": True,
            "attention_k_eq_v": True,
            "global_head_dim": 512,
            "num_global_key_value_heads": 2,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        },
        _nvfp4_config("*.mlp", "*.router", "*.self_attn"),
    ),
    "deepseek-v3": Preset(
        "deepseek-ai/DeepSeek-V3", _V3, _V3_QUANTISED, "as nvidia/DeepSeek-V3.1-NVFP4 is"
    ),
    "deepseek-r1": Preset(
        "deepseek-ai/DeepSeek-R1", _V3, _V3_QUANTISED, "as nvidia/DeepSeek-V3.1-NVFP4 is"
    ),
    "deepseek-v3.1": Preset("nvidia/DeepSeek-V3.1-NVFP4", _V3, _V3_QUANTISED),
    "deepseek-v3.2": Preset(
        "deepseek-ai/DeepSeek-V3.2",
        {**_V3, "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128},
        _nvfp4_config(*_LATENT_ONLY, "*indexer*", "model.layers.61*"),
        "as nvidia/DeepSeek-V3.1-NVFP4 is, the indexer 16-bit",
    ),
    "deepseek-v4-flash": Preset(
        "nvidia/DeepSeek-V4-Flash-NVFP4",
        {
            **_V4,
            "routed_scaling_factor": 1.5,
            "num_hidden_layers": 43,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "q_lora_rank": 1024,
            "o_groups": 8,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        },
        _V4_QUANTISED,
    ),
    "deepseek-v4-pro": Preset(
        "nvidia/DeepSeek-V4-Pro-NVFP4",
        {
            **_V4,
            "routed_scaling_factor": 2.5,
            "num_hidden_layers": 61,
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "o_groups": 16,
            "moe_intermediate_size": 3072,
            "n_routed_experts": 384,
            "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
        },
        _V4_QUANTISED,
    ),
    "glm-5": Preset("nvidia/GLM-5-NVFP4", _GLM5, _nvfp4_config("*self_attn*", "model.layers.78*")),
    "glm-5.2": Preset(
        "nvidia/GLM-5.2-NVFP4",
        _GLM5,
        _nvfp4_config(
            "*self_attn*", "*shared_experts*", *(f"model.layers.{i}.*" for i in (0, 1, 2, 78))
        ),
    ),
    "kimi-k2.5": Preset("nvidia/Kimi-K2.5-NVFP4", _KIMI, _nvfp4_config("*self_attn*")),
    "kimi-k2.7-code": Preset(
        "nvidia/Kimi-K2.7-Code-NVFP4",
        _KIMI,
        _nvfp4_config("*self_attn*", "*shared_experts*", "model.layers.0*"),
    ),
    "minimax-m2.5": Preset(
        "nvidia/MiniMax-M2.5-NVFP4",
        {
            "model_type": "minimax_m2",
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            **_sizes(62, 3072, 1536, 200064),
            **_attention_sizes(48, 8, 128),
        },
        _nvfp4_config("*self_attn*", "*block_sparse_moe.gate"),
    ),
    "minimax-m3": Preset(
        "MiniMaxAI/MiniMax-M3",
        {
            "model_type": "minimax_m3",
            "routed_scaling_factor": 2.0,
            "hidden_act": "swigluoai",
            "swiglu_limit": 7.0,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "shared_intermediate_size": 3072,
            "dense_intermediate_size": 12288,
            "first_k_dense_replace": 3,
            "sparse_attention_config": {
                "sparse_attention_freq": [0] * 3 + [1] * 57,
                "sparse_index_dim": 128,
                "sparse_num_index_heads": 4,
            },
            **_sizes(60, 6144, 3072, 200064),
            **_attention_sizes(64, 4, 128),
        },
        _mixed_config(
            {
                "*.block_sparse_moe.experts": "NVFP4",
                "*.block_sparse_moe.shared_experts": "MXFP8",
                "*.self_attn": "MXFP8",
                "*.mlp": "MXFP8",
            }
        ),
        "routed experts NVFP4, all else MXFP8",
    ),
    "gpt-oss-20b": Preset(
        "openai/gpt-oss-20b",
        {**_GPT_OSS, **_sizes(24, 2880, 2880, 201088), "num_local_experts": 32},
        _GPT_OSS_QUANTISED,
    ),
    "gpt-oss-120b": Preset(
        "openai/gpt-oss-120b",
        {**_GPT_OSS, **_sizes(36, 2880, 2880, 201088), "num_local_experts": 128},
        _GPT_OSS_QUANTISED,
    ),
    "nemotron-3-nano-30b-a3b": Preset(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
        {
            **_NEMOTRON3,
            "routed_scaling_factor": 2.5,
            **_sizes(52, 2688, 1856, 131072),
            "num_attention_heads": 32,
            "mamba_num_heads": 64,
            "hybrid_override_pattern": _NANO,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
        },
        _nvfp4_config(
            *(f"backbone.layers.{i}.mixer.{p}_proj" for i in _NANO_KEPT for p in "qkvo"),
            *(f"backbone.layers.{i - 1}.mixer.{p}_proj" for i in _NANO_KEPT for p in ("in", "out")),
        ),
    ),
    "nemotron-3-super-120b-a12b": Preset(
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4",
        {
            **_NEMOTRON3,
            "routed_scaling_factor": 5.0,
            **_sizes(88, 4096, 2688, 131072),
            "num_attention_heads": 32,
            "mamba_num_heads": 128,
            "hybrid_override_pattern": _SUPER,
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 2688,
            "moe_latent_size": 1024,
            "moe_shared_expert_intermediate_size": 5376,
        },
        _nvfp4_config("*latent_proj"),
        _MOST_OF_NEMOTRON,
    ),
    "nemotron-3-ultra-550b-a55b": Preset(
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4",
        {
            **_NEMOTRON3,
            "routed_scaling_factor": 5.0,
            **_sizes(108, 8192, 5120, 131072),
            "num_attention_heads": 64,
            "mamba_num_heads": 256,
            "hybrid_override_pattern": _ULTRA,
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 5120,
            "moe_latent_size": 2048,
            "moe_shared_expert_intermediate_size": 10240,
        },
        _nvfp4_config("*latent_proj"),
        _MOST_OF_NEMOTRON,
    ),
    "nemotron-h-56b": Preset(
        "nvidia/Nemotron-H-56B-Base-8K",
        {
            **_NEMOTRON3,
            **_sizes(118, 8192, 32768, 131072),
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "mamba_num_heads": 256,
            "ssm_state_size": 256,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*" + "-M-M-M-M-M*" * 8 + "-M-M-M-M-M-",
        },
    ),
}
