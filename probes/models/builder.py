"""The modules of one model, layer by layer, from the sizes in its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from .config import ModelConfig
from .dialects import (
    DIALECTS,
    DRAFTING,
    MISTRAL,
    MOST_LAYERS,
    OLD_WRAPPERS,
    PLAIN,
    TIED,
    UNGATED,
    is_gated,
)
from .modules import LinearModule, Unread
from .patterns import unwrapped


class ModuleBuilder:
    """The modules of one model, layer by layer: `modules`, and what of it is `unread`."""

    def __init__(self, config: ModelConfig) -> None:
        self.c = config
        self.hidden = config.needed("hidden_size")
        self.dialect = MISTRAL if config.mistral else DIALECTS.get(config.family, PLAIN)
        self.modules: list[LinearModule] = []
        self.unread: list[Unread] = []
        self.prefix = self._prefix()
        acts = (config.values.get(k) for k in ("mlp_hidden_act", "hidden_act"))
        act = next((a for a in acts if a is not None), None)
        self.gated = act not in UNGATED and config.family != "nemotron_h"
        self.layers = self.few("num_hidden_layers") or 1
        self.experts = (
            config.number("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
            or 0
        )

    # -- helpers

    @property
    def heads(self) -> int:
        """Attention heads. Raises ValueError: what needs no heads is built without."""
        return self.c.needed("num_attention_heads")

    def few(self, key: str) -> int:
        """A number of layers: each is built, so that it must be one that models have."""
        found = self.c.number(key) or 0
        if found > MOST_LAYERS:
            raise ValueError(f"{self.c.source}: {key} is {found}, more than {MOST_LAYERS}")
        return found

    def _prefix(self) -> str:
        """What comes before ``layers.``: as the quantisation configs have it, else as is usual."""
        for quantisation in self.c.quantisation:
            for name in quantisation.names:
                found = re.match(r"((?:[a-z_]+\.)*)layers\.\d+\.", name)
                if found and not name.startswith("mtp"):
                    return found.group(1)
        if self.c.mistral or self.c.family == "deepseek_v4":
            return ""
        if self.c.family == "nemotron_h":
            return "backbone."
        if not self.c.wrapped:
            return "model."
        return (
            "language_model.model." if self.c.wrapped in OLD_WRAPPERS else "model.language_model."
        )

    def add(self, name: str, n: int, k: int, groups: int = 1) -> None:
        self.modules.append(LinearModule(name, n, k, groups))

    def attempt(self, name: str, build: Callable[[], None]) -> None:
        """Build a part; where a value that it needs is not there, say so once and go on."""
        before = len(self.modules)
        try:
            build()
        except ValueError as error:
            del self.modules[before:]
            self.cannot(name, str(error))

    def cannot(self, name: str, reason: str) -> None:
        pattern = re.sub(r"\.\d+", ".*", name)
        if all(each.name != pattern or each.reason != reason for each in self.unread):
            self.unread.append(Unread(pattern, reason))

    def head(self) -> None:
        vocabulary = self.c.number("vocab_size")
        tied = self.c.values.get("tie_word_embeddings", self.c.family in TIED)
        if vocabulary is None or tied is True:
            return
        name = (
            "head" if self.c.family == "deepseek_v4" else "output" if self.c.mistral else "lm_head"
        )
        if self.prefix.startswith("language_model."):
            name = f"language_model.{name}"
        self.add(name, vocabulary, self.hidden)

    def towers(self) -> None:
        """Encoders of images and of sound, whose modules are not told from a configuration."""
        for tower in self.c.towers:
            name = "vision" if "vision" in tower else "audio"
            self.unread.append(Unread(f"{name} tower", "its modules are told by its files alone"))

    # -- one layer

    def layer(self, i: int) -> None:
        at = f"{self.prefix}layers.{i}"
        self.attempt(f"{at}.{self.dialect.attention}", partial(self._attention, at, i))
        self.attempt(f"{at}.{self.dialect.mlp}", partial(self._feed_forward, at, i))

    def _attention(self, at: str, i: int) -> None:
        if self._kind(i) == "linear_attention":
            self._linear_attention(f"{at}.linear_attn")
        elif self.c.number("kv_lora_rank"):
            self._latent(f"{at}.{self.dialect.attention}", i)
        else:
            self.grouped_attention(f"{at}.{self.dialect.attention}", i)

    def _kind(self, i: int) -> str:
        kinds = self.c.strings("layer_types")
        if i < len(kinds):
            return kinds[i]
        if self.c.number("linear_num_value_heads"):
            interval = self.c.number("full_attention_interval") or 4
            return "full_attention" if (i + 1) % interval == 0 else "linear_attention"
        return "full_attention"

    def head_dim(self, i: int = 0) -> int:
        whole = self.c.number("global_head_dim") if self._kind(i) == "full_attention" else None
        return whole or self.c.number("head_dim", "attention_head_dim") or self.hidden // self.heads

    def grouped_attention(self, at: str, i: int) -> None:
        """Grouped-query attention; half of a gated query projection gates the output."""
        q, k, v, o = self.dialect.attentions
        width = self.head_dim(i)
        kv = self.c.number("num_key_value_heads") or self.heads
        whole = self._kind(i) == "full_attention"
        if whole and self.c.number("num_global_key_value_heads"):
            kv = self.c.needed("num_global_key_value_heads")
        gate = 2 if is_gated(self.c) else 1
        joined = self.dialect.joined[0]
        if joined:
            self.add(f"{at}.{joined}", (self.heads * gate + 2 * kv) * width, self.hidden)
            self.add(f"{at}.{o}", self.hidden, self.heads * width)
            return
        self.add(f"{at}.{q}", self.heads * width * gate, self.hidden)
        # The last layers of some models use the keys and values of layers before.
        shared = self.c.number("num_kv_shared_layers") or 0
        if i < self.layers - shared or i >= self.layers:
            self.add(f"{at}.{k}", kv * width, self.hidden)
            if not (whole and self.c.values.get("attention_k_eq_v") is True):
                self.add(f"{at}.{v}", kv * width, self.hidden)
        self.add(f"{at}.{o}", self.hidden, self.heads * width)
        sparse = self.c.values.get("sparse_attention_config")
        if isinstance(sparse, dict) and _is_sparse(sparse, i):
            index, heads = sparse.get("sparse_index_dim"), sparse.get("sparse_num_index_heads")
            if type(index) is int and type(heads) is int and index > 0 and heads > 0:
                self.add(f"{at}.index_q_proj", heads * index, self.hidden)
                self.add(f"{at}.index_k_proj", index, self.hidden)

    def _latent(self, at: str, i: int) -> None:
        """Multi-head latent attention, with the indexer of its sparse kind."""
        q_a, q_b, kv_a, kv_b = self.dialect.latent
        rank, rope = self.c.needed("kv_lora_rank"), self.c.number("qk_rope_head_dim") or 0
        nope, value = self.c.needed("qk_nope_head_dim"), self.c.needed("v_head_dim")
        queries, q_rank = self.heads * (nope + rope), self.c.number("q_lora_rank")
        if q_rank is None:
            self.add(f"{at}.{self.dialect.attentions[0]}", queries, self.hidden)
        else:
            self.add(f"{at}.{q_a}", q_rank, self.hidden)
            self.add(f"{at}.{q_b}", queries, q_rank)
        self.add(f"{at}.{kv_a}", rank + rope, self.hidden)
        self.add(f"{at}.{kv_b}", self.heads * (nope + value), rank)
        self.add(f"{at}.{self.dialect.attentions[3]}", self.hidden, self.heads * value)
        heads, width = self.c.number("index_n_heads"), self.c.number("index_head_dim")
        kinds = self.c.strings("indexer_types")
        if heads and width and q_rank and (i >= len(kinds) or kinds[i] == "full"):
            self.add(f"{at}.indexer.wq_b", heads * width, q_rank)
            self.add(f"{at}.indexer.wk", width, self.hidden)
            self.add(f"{at}.indexer.weights_proj", heads, self.hidden)

    def _linear_attention(self, at: str) -> None:
        """Gated delta net, of Qwen3-Next with its inputs in one tensor and of Qwen3.5 in four."""
        heads = self.c.needed("linear_num_value_heads")
        keys = self.c.needed("linear_num_key_heads") * self.c.needed("linear_key_head_dim")
        values = heads * self.c.needed("linear_value_head_dim")
        if self.c.family == "qwen3_next":
            self.add(f"{at}.in_proj_qkvz", 2 * keys + 2 * values, self.hidden)
            self.add(f"{at}.in_proj_ba", 2 * heads, self.hidden)
        else:
            self.add(f"{at}.in_proj_qkv", 2 * keys + values, self.hidden)
            self.add(f"{at}.in_proj_z", values, self.hidden)
            self.add(f"{at}.in_proj_b", heads, self.hidden)
            self.add(f"{at}.in_proj_a", heads, self.hidden)
        self.add(f"{at}.out_proj", self.hidden, values)

    # -- MLPs and experts

    def _feed_forward(self, at: str, i: int) -> None:
        both = self.c.values.get("enable_moe_block") is True
        if self._is_moe(i) or both:
            self._moe(at)
        if not self._is_moe(i) or both:
            self.mlp(f"{at}.{self.dialect.mlp}", self._dense_size(i))

    def _dense_size(self, i: int) -> int:
        keys = ["intermediate_size"]
        if self.experts:
            keys = ["dense_intermediate_size", "intermediate_size_mlp", "intermediate_size"]
        size = self.c.needed(*keys) if self.c.number(*keys) else self.c.needed("intermediate_size")
        shared = self.c.number("num_kv_shared_layers") or 0
        wide = self.c.values.get("use_double_wide_mlp") is True and shared
        return 2 * size if wide and i >= self.layers - shared else size

    def _is_moe(self, i: int) -> bool:
        """Whether layer i has routed experts: each family says it in its own way."""
        if not self.experts:
            return False
        kinds = self.c.strings("mlp_layer_types")
        if i < len(kinds):
            return kinds[i] == "sparse"
        frequency = self.c.values.get("moe_layer_freq")
        if isinstance(frequency, list):
            return i >= len(frequency) or bool(frequency[i])
        dense = self.c.values.get("mlp_only_layers")
        if isinstance(dense, list) and i in dense:
            return False
        if i < (self.c.number("first_k_dense_replace", "moe_layer_start_index") or 0):
            return False
        last = self.c.values.get("moe_layer_end_index")
        if type(last) is int and 0 <= last < i:
            return False
        interval = self.c.number("moe_layer_interval") or 1
        if interval > 1:
            return (i + 1) % interval == 0
        if self.c.family.startswith("llama4"):
            step = self.c.number("interleave_moe_layer_step") or 1
            return i >= self.layers or i % step == step - 1
        step = self.c.number("decoder_sparse_step") or 1
        if step > 1:
            return (i + 1) % step == 0
        if type(frequency) is int and frequency > 1:
            return i % frequency == 0
        return not self._named_dense(i)

    def _named_dense(self, i: int) -> bool:
        """Whether a quantisation table has a dense MLP in layer i of a model that names none."""
        if self.dialect.moe == self.dialect.mlp:
            return False
        name = f"{self.prefix}layers.{i}.{self.dialect.mlp}.{self.dialect.names[2]}"
        return any(unwrapped(name) in each.table for each in self.c.quantisation)

    def mlp(self, at: str, size: int) -> None:
        gate, up, down = self.dialect.names
        joined = self.dialect.joined[1]
        if joined:
            self.add(f"{at}.{joined}", 2 * size, self.hidden)
        elif self.gated:
            self.add(f"{at}.{gate}", size, self.hidden)
        if not joined:
            self.add(f"{at}.{up}", size, self.hidden)
        self.add(f"{at}.{down}", self.hidden, size)

    def _moe(self, at: str) -> None:
        at = f"{at}.{self.dialect.moe}" if self.dialect.moe else at
        size = self.c.number("moe_intermediate_size", "expert_intermediate_size")
        size = size or self.c.needed("intermediate_size")
        self.add_experts(f"{at}.experts", size, self.hidden)
        shared = self._shared_size(size)
        if shared:
            self.mlp(f"{at}.{self.dialect.shared}", shared)

    def _shared_size(self, size: int) -> int:
        whole = self.c.number("shared_expert_intermediate_size")
        if whole:
            return whole
        count = self.c.number("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
        if count:
            return count * (self.c.number("shared_intermediate_size") or size)
        if self.c.family.startswith("llama4"):
            return self.c.needed("intermediate_size")
        return 0

    def add_experts(self, at: str, size: int, inputs: int) -> None:
        gate, up, down = self.dialect.experts
        if self.dialect.fused:
            width = 2 * size if self.gated else size
            self.add(
                f"{at}.gate_up_proj" if self.gated else f"{at}.up_proj", width, inputs, self.experts
            )
            self.add(f"{at}.down_proj", inputs, size, self.experts)
            return
        if self.gated:
            self.add(f"{at}.*.{gate}", size, inputs, self.experts)
        self.add(f"{at}.*.{up}", size, inputs, self.experts)
        self.add(f"{at}.*.{down}", inputs, size, self.experts)

    # -- layers that draft tokens

    def drafts(self) -> None:
        if self.c.family.startswith("qwen3_5"):
            for i in range(self.few("mtp_num_hidden_layers")):
                at = f"mtp.layers.{i}"
                self.attempt(at, partial(self.grouped_attention, f"{at}.self_attn", self.layers))
                self.attempt(at, partial(self._feed_forward, at, self.layers))
            if self.c.number("mtp_num_hidden_layers"):
                self.add("mtp.fc", self.hidden, 2 * self.hidden)
            return
        if self.c.family not in DRAFTING:
            return
        for i in range(self.few("num_nextn_predict_layers")):
            at = f"{self.prefix}layers.{self.layers + i}"
            self.attempt(at, partial(self.layer, self.layers + i))
            self.add(f"{at}.eh_proj", self.hidden, 2 * self.hidden)


def _is_sparse(sparse: dict[str, object], i: int) -> bool:
    frequency = sparse.get("sparse_attention_freq")
    return bool(frequency[i]) if isinstance(frequency, list) and i < len(frequency) else False
