"""How each family of models calls its modules."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig

MOST_LAYERS = 4096
UNGATED = ("relu2", "relu_squared", "squared_relu", "xielu")
"""Activations of MLPs that have one up-projection and no gate."""


OAI = "swigluoai"
"""What configurations call the activation of gpt-oss, which MiniMax-M3 has, too."""
GPT_OSS = "swigluoai with biases"
"""The same where the experts add biases, as gpt-oss's do; no configuration has this word."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a family calls its modules. `experts` are gate, up, down of one expert; `fused` experts
    are one tensor a layer. `joined` are q, k, v and gate, up where its weights hold them as one."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    moe: str = "mlp"
    shared: str = "shared_experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    attentions: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    latent: tuple[str, str, str, str] = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    fused: bool = False
    joined: tuple[str, str] = ("", "")


PLAIN = Dialect()
_SHARED_EXPERT = Dialect(shared="shared_expert")
_SPARSE = Dialect(moe="block_sparse_moe", experts=("w1", "w3", "w2"))
_LLAMA4 = Dialect(mlp="feed_forward", moe="feed_forward", shared="shared_expert", fused=True)
DIALECTS = {
    "qwen2_moe": _SHARED_EXPERT,
    "qwen3_moe": _SHARED_EXPERT,
    "qwen3_vl_moe_text": Dialect(fused=True),
    "qwen3_next": _SHARED_EXPERT,
    "qwen3_5_moe_text": _SHARED_EXPERT,
    "qwen3_5_moe": _SHARED_EXPERT,
    "mixtral": _SPARSE,
    "phimoe": _SPARSE,
    "minimax_m2": _SPARSE,
    "minimax_m3": _SPARSE,
    "minimax_m3_vl": _SPARSE,
    "minimax_m3_vl_text": _SPARSE,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "gemma4": Dialect(moe=""),
    "gpt_oss": Dialect(fused=True),
    "gemma4_text": Dialect(moe=""),
    "phi3": Dialect(joined=("qkv_proj", "gate_up_proj")),
    "glm4": Dialect(joined=("", "gate_up_proj")),
}
DIALECTS.update(
    dict.fromkeys(
        (
            "", "llama", "mistral", "mistral3", "ministral", "ministral3", "qwen2", "qwen3",
            "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_5", "qwen3_5_text",
            "gemma", "gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "granite", "exaone4",
            "smollm3", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "helium", "arcee", "nemotron",
            "apertus", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25",
            "glm_moe_dsa", "glm4_moe", "glm4_moe_lite", "dots1", "olmoe", "cohere", "cohere2",
            "ernie4_5_moe",
        ),
        PLAIN,
    )
)  # fmt: skip
MISTRAL = Dialect(
    attention="attention",
    mlp="feed_forward",
    moe="",
    names=("w1", "w3", "w2"),
    experts=("w1", "w3", "w2"),
    attentions=("wq", "wk", "wv", "wo"),
    latent=("wq_a", "wq_b", "wkv_a_with_mqa", "wkv_b"),
)
_OF_THEIR_OWN = ("nemotron_h", "nemotron-nas", "deepseek_v4")


_GATED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
DRAFTING = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite")
"""Families whose layers behind the last are those that draft tokens."""
TIED = (
    "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "cohere", "cohere2",
    "smollm3", "ernie4_5", "ernie4_5_moe",
)  # fmt: skip
"""Families whose output layer is the embedding where the configuration does not say."""
OLD_WRAPPERS = (
    "kimi_k25",
    "kimi_vl",
    "llama4",
    "minimax_m3_vl",
    "mistral3",
    "llava",
    "internvl_chat",
)


def is_gated(config: ModelConfig) -> bool:
    """Whether half of the query projection gates the output of attention."""
    return bool(config.values.get("attn_output_gate", config.family in _GATED))


def known_family(config: ModelConfig) -> bool:
    """Whether the modules of this model can be told from its configuration alone."""
    return config.mistral or config.family in DIALECTS or config.family in _OF_THEIR_OWN
