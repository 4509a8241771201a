"""A model's configuration files: sizes of its text model, its family, and its quantisation configs.

Read are config.json (with a nested text_config and what wraps it), Mistral's params.json where
there is none, and hf_quant_config.json beside either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...machine import files
from .patterns import NamePatterns, cut_off
from .place import CheckpointFiles
from .quant_readers import no_table, read_quantisation
from .quantisation import QuantConfig

_MOST = 1 << 26
_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_TELLING = ("minimax_m3_vl", "kimi_k25", "llama4", "gemma4", "qwen3_5", "qwen3_5_moe")
"""Wrappers that tell the family of a text model that does not name its own."""
_VISION = ("vision_config", "vision_encoder", "audio_config")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the configuration files say.

    `values` are those of the text model, `family` is its model_type. `quantisation` are the
    quantisation configs, the one that engines read first before the other. `wrapped`: the text
    model is a part of a multimodal one, whose other parts are `towers`. `remarks` grow as values
    are read that cannot be used.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    quantisation: tuple[QuantConfig, ...] = ()
    wrapped: str = ""
    towers: tuple[str, ...] = ()
    mistral: bool = False
    remarks: list[str] = field(default_factory=list)

    def number(self, *keys: str) -> int | None:
        """The first of `keys` that holds a positive integer; None where none does."""
        for key in keys:
            value = self.values.get(key)
            if type(value) is int and value > 0:
                return value
            if value not in (None, 0, False) and not isinstance(value, list):
                self.remark(f"{self.source}: {key} is {value!r:.60}, not a positive integer")
        return None

    def needed(self, *keys: str) -> int:
        """As `number`. Raises ValueError, one sentence, where none does."""
        found = self.number(*keys)
        if found is None:
            value = self.values.get(keys[0])
            raise ValueError(f"{self.source}: {keys[0]} is {value!r:.60}, not a positive integer")
        return found

    def strings(self, key: str) -> list[str]:
        """The list of words under `key`; empty for anything else."""
        value = self.values.get(key)
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return list(value) if good and isinstance(value, list) else []

    def remark(self, sentence: str) -> None:
        if sentence not in self.remarks:
            self.remarks.append(sentence)


def read_config(files: CheckpointFiles) -> ModelConfig | None:
    """The configuration of a checkpoint; None where it has none.

    Raises ValueError, one sentence, for a file that is no JSON object.
    """
    own = files.path if files.path.suffix == ".json" and not _is_index(files.path) else None
    config = own if own and own.name not in _BESIDE else files.beside("config.json")
    extra = files.beside("hf_quant_config.json")
    given = read_json(extra) if extra is not None else None
    if config is not None:
        return made(config.name, read_json(config), given)
    params = files.beside("params.json")
    if params is not None:
        return _from_params(params.name, read_json(params), given)
    return made("", {}, given) if given else None


_BESIDE = ("hf_quant_config.json", "params.json")


def _is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, one sentence, where there is none."""
    try:
        if path.stat().st_size > _MOST:
            raise ValueError(f"{path} is too large for a configuration")
        values = json.loads(files.text(path, _MOST))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a model's {path.name}: it holds no object")
    return values


def made(
    source: str, outer: Mapping[str, Any], hf_quant: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The configuration in the values of a config.json and of a hf_quant_config.json."""
    key = next((k for k in _INNER if isinstance(outer.get(k), Mapping)), "")
    values = outer[key] if key else outer
    if key == "thinker_config" and isinstance(values.get("text_config"), Mapping):
        values = values["text_config"]
    kind = values.get("model_type") or ""
    if key and not kind and outer.get("model_type") in _TELLING:
        kind = str(outer["model_type"])
    quants = []
    for name, found in (
        (source, outer.get("quantization_config") or values.get("quantization_config")),
        ("hf_quant_config.json", hf_quant),
    ):
        if isinstance(found, Mapping):
            read = read_quantisation(name, {**_native(values, str(kind)), **found})
            quants.append(read and _completed(read, values.get("num_hidden_layers")))
        elif found:
            quants.append(no_table(name))
    towers = [k for k in _VISION if isinstance(outer.get(k), Mapping) and outer[k]]
    config = ModelConfig(
        source,
        {**values, **({} if "tie_word_embeddings" in values else _tie(outer))},
        str(kind),
        tuple(each for each in quants if each is not None),
        str(outer.get("model_type") or key) if key else "",
        tuple(towers),
    )
    if key and not kind:
        config.remark(f"{source}: {key} names no family: it is read by the keys that most share")
    config.remarks.extend(remark for each in config.quantisation for remark in each.remarks)
    return config


def _completed(quantisation: QuantConfig, layers: object) -> QuantConfig:
    """`quantisation` with what a list of exclusions that was cut off leaves out."""
    more = cut_off(quantisation.excluding, layers) if type(layers) is int else []
    if more:
        quantisation.excluded = NamePatterns([*quantisation.excluding, *more])
        quantisation.remarks.append(
            f"{quantisation.source}: its list of modules that are not quantised is cut off; "
            f"{more[0]} is taken to be in it"
            + (f", and {len(more) - 1} more such" if len(more) > 1 else "")
        )
    return quantisation


def _tie(outer: Mapping[str, Any]) -> dict[str, Any]:
    return {k: outer[k] for k in ("tie_word_embeddings",) if k in outer}


def _native(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What DeepSeek-V4 says of its experts beside its quantisation config; where not, FP4."""
    if family.startswith("deepseek_v4"):
        return {"expert_dtype": values.get("expert_dtype", "fp4")}
    return {}


_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
}
_PARAMS_MOE = {
    "num_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
}


def _from_params(
    source: str, values: Mapping[str, Any], hf_quant: Mapping[str, Any] | None
) -> ModelConfig:
    """Mistral's params.json, under the names that a config.json has for the same."""
    moe = values.get("moe")
    named = {_PARAMS.get(key, key): value for key, value in values.items()}
    for key, value in (moe if isinstance(moe, Mapping) else {}).items():
        named[_PARAMS_MOE.get(key, str(key))] = value
    named["tie_word_embeddings"] = values.get("tied_embeddings", False)
    quants = []
    for name, found in ((source, values.get("quantization")), ("hf_quant_config.json", hf_quant)):
        if isinstance(found, Mapping):
            quants.append(read_quantisation(name, found))
        elif found:
            quants.append(no_table(name))
    towers = [key for key in _VISION if isinstance(values.get(key), Mapping)]
    read = tuple(each for each in quants if each is not None)
    return ModelConfig(
        source,
        named,
        "mistral",
        read,
        towers=tuple(towers),
        mistral=True,
        remarks=[remark for each in read for remark in each.remarks],
    )
