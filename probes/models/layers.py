"""The layers of a checkpoint on one tensor-parallel rank, as an engine builds them.

What is in the files is believed before what the configuration says; where the two differ, that is
said. Where the weights are not here, the configuration is all there is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .agreement import contradictions, first_expert, said_format, two_configs
from .config import ModelConfig, read_config
from .dialects import GPT_OSS, OAI, is_gated
from .families import expected_modules
from .fusion import FusedLayer, FusedModel, FusionFacts, Heads, fuse
from .headers import FileHeader, read_header
from .modules import LinearModule, Unread
from .names import pattern_of, starred
from .place import CheckpointFiles, find_files
from .quantisation import LayerFormat, QuantConfig
from .rows import GROUPED, PARTS, SPLIT, CheckpointLayers, LayerRow
from .sharding import shard, undivided
from .stored import stored_modules

_MOST_TP = 4096


def read_layers(given: str | Path, tp: int = 1, engine: str | None = None) -> CheckpointLayers:
    """The layers of the checkpoint that `given` names: a folder, a file of it, or a model's name.

    Raises ValueError, one sentence, for what is none.
    """
    files = find_files(given)
    config = read_config(files)
    if not files.files and config is None:
        raise ValueError(f"{given} holds no safetensors file and no config.json{files.instead}")
    named_file = files.path.suffix == ".json" and files.path.name not in _USUAL
    remarks: list[str] = []
    modules: list[LinearModule] = []
    if files.files and not named_file:
        modules = _from_files(files, config, remarks)
    source = "files" if modules else "configuration"
    unread: list[Unread] = []
    if not modules or files.missing:
        if config is None:
            raise ValueError(f"{given} has no linear layer in its files and no config.json")
        more, unread = expected_modules(config)
        here = {module.name for module in modules}
        modules += [_configured(m, config) for m in more if m.name not in here]
        source = "files and configuration" if here else source
        if files.instead and not here:
            remarks.append(f"the weights are not read{files.instead}")
    return _layers(_Read(str(given), source, config, modules, unread, remarks), tp, engine)


_USUAL = ("config.json", "params.json", "hf_quant_config.json")


def layers_of_config(
    label: str, config: ModelConfig, tp: int = 1, assume: LayerFormat | None = None
) -> CheckpointLayers:
    """The layers that a configuration implies. `assume` is the format of what engines quantise by
    default, where the configuration says nothing of quantisation. Raises ValueError."""
    modules, unread = expected_modules(config)
    remarks = []
    assumed = assume is not None and not config.quantisation
    if not assumed or assume is None:
        modules = [_configured(m, config) for m in modules]
    else:
        modules = [replace(m, format=_assumed_format(m, assume)) for m in modules]
        remarks.append(
            f"{config.source or label} says nothing of quantisation: its layers are taken as "
            f"{assume.format}, the output layer as bf16"
        )
    read = _Read(label, "configuration", config, modules, unread, remarks, assumed)
    return _layers(read, tp, None)


def _assumed_format(module: LinearModule, assume: LayerFormat) -> LayerFormat:
    kept = module.leaf in ("lm_head", "head", "output") or "indexer" in module.name
    return LayerFormat("bf16", "bf16") if kept else assume


@dataclass(frozen=True, slots=True)
class _Read:
    """A checkpoint as it was read, not yet fused."""

    label: str
    source: str
    config: ModelConfig | None
    modules: Sequence[LinearModule]
    unread: Sequence[Unread]
    remarks: list[str]
    assumed: bool = False


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which walks hundreds of thousands of tensors again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _from_files(
    files: CheckpointFiles, config: ModelConfig | None, remarks: list[str]
) -> list[LinearModule]:
    hidden = config.number("hidden_size") if config is not None else None
    with _uncollected():
        headers = [read_header(file) for file in files.files]
        stored = stored_modules((header.tensors for header in headers), hidden)
    short = [header.file.name for header in headers if not header.whole]
    if short:
        remarks.append(
            f"{short[0]} is shorter than its header says"
            + (f", as are {len(short) - 1} other files" if len(short) > 1 else "")
        )
    if files.missing:
        remarks.append(
            f"{files.missing[0].name} is missing, which the index names"
            + (f", as are {len(files.missing) - 1} other files" if len(files.missing) > 1 else "")
        )
    remarks += _misplaced(files, headers)
    if files.unindexed:
        remarks.append(f"there are {len(files.files)} safetensors files and no index")
    quantisation = config.quantisation if config is not None else ()
    found = [_activated(module, quantisation) for module in stored]
    odd = contradictions(found, config, whole=not files.missing)
    if odd:
        name, why = next(iter(odd.items()))
        more = f" ({len(odd) - 1} more modules likewise)" if len(odd) > 1 else ""
        remarks.append(f"{name}: {why}{more}; the files are right")
    return found


_MANY = 20_000
"""Tensors from which on an index is read through only where it names another number of them."""


def _misplaced(files: CheckpointFiles, headers: Sequence[FileHeader]) -> list[str]:
    """What of an index is not in its files, and the other way round: a sentence each."""
    held = {header.file.name: header.tensors for header in headers}
    total = sum(map(len, held.values()))
    if files.missing or files.index is None or (total > _MANY and files.count() == total):
        return []
    listed = files.listed()
    wrong = [name for name, file in listed.items() if name not in held.get(file, ())]
    more = [name for tensors in held.values() for name in tensors if name not in listed]
    said = []
    if wrong:
        rest = f", nor {len(wrong) - 1} more where it has them" if len(wrong) > 1 else ""
        said.append(f"{wrong[0]} is not in {listed[wrong[0]]}, where the index has it{rest}")
    if more:
        rest = f", nor {len(more) - 1} more" if len(more) > 1 else ""
        said.append(f"the index does not name {more[0]}, which is in the files{rest}")
    return said


def _activated(module: LinearModule, quantisation: Sequence[QuantConfig]) -> LinearModule:
    """`module` with the activation that its configuration names: files do not say it of all."""
    if module.format is None or not module.format.fp4:
        return module
    for each in quantisation:
        said = each.of(first_expert(module.name))
        if said is not None and said.format == module.format.format:
            return replace(module, format=said)
    return module


def _configured(module: LinearModule, config: ModelConfig) -> LinearModule:
    if not config.quantisation:
        return replace(module, format=LayerFormat("bf16", "bf16"))
    return replace(module, format=said_format(module, config.quantisation[0]))


def fusion_facts(config: ModelConfig | None, engine: str | None = None) -> FusionFacts:
    """What of a configuration decides how modules are fused."""
    if config is None:
        return FusionFacts(engine, configured=False)
    query = config.number("num_attention_heads") or 0
    return FusionFacts(
        engine,
        len(config.strings("layers_block_type")) or config.number("num_hidden_layers") or 0,
        Heads(
            query,
            config.number("num_key_value_heads") or query,
            config.number("n_groups", "mamba_n_groups") or 0,
            config.number("ssm_state_size", "mamba_d_state") or 0,
            config.number("linear_num_key_heads") or 0,
        ),
        is_gated(config),
        config.values.get("attention_k_eq_v") is True,
        config.family == "gpt_oss",
    )


_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "experts_per_token", "top_k_experts",
    "moe_topk", "moe_top_k",
)  # fmt: skip


def _layers(read: _Read, tp: int, engine: str | None) -> CheckpointLayers:
    if tp < 1:
        raise ValueError(f"tensor parallelism must be at least 1, not {tp}")
    if tp > _MOST_TP:
        raise ValueError(f"tensor parallelism must be at most {_MOST_TP}, not {tp}")
    config = read.config
    model = fuse(read.modules, fusion_facts(config, engine))
    top_k = config.number(*_TOP_K) if config is not None else None
    rows = _all_rows(model, tp, top_k)
    for each in read.unread:
        rows.append(_unread(each))
    rows.sort(key=lambda row: PARTS.index(row.part))
    remarks = list(read.remarks)
    if config is not None:
        remarks += [*config.remarks, *two_configs(read.modules, config)]
    sizes = {"dense": 0, "grouped": 0}
    for layer, made_of in model.layers.items():
        if layer.format.fp4 and layer.kind in sizes:
            sizes[layer.kind] += len(made_of) * sum(layer.widths) * layer.k * layer.groups
    return CheckpointLayers(
        read.label,
        config.family if config is not None else "",
        read.source,
        tp,
        engine,
        tuple(rows),
        tuple(dict.fromkeys(remarks)),
        sizes["dense"],
        sizes["grouped"],
        _stops(model, tp),
        read.assumed,
        *_of_routed_experts(config),
    )


def _of_routed_experts(config: ModelConfig | None) -> tuple[float, tuple[str, float | None]]:
    """The routed scaling, and the activation with its limit, as far as they are said."""

    def real(name: str) -> float | None:
        found = config.values.get(name) if config is not None else None
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return float(found) if number else None  # type: ignore[arg-type]

    named = ("hidden_act", "hidden_activation")
    said = (config.values.get(name) for name in named if config is not None)
    word = str(next((each for each in said if each), ""))
    if config is not None and config.family == "gpt_oss":
        word = GPT_OSS  # its configuration says silu
    limit = real("swiglu_limit")
    if limit is None and word in (GPT_OSS, OAI):
        limit = 7.0  # what models of that activation have where theirs says nothing
    return real("routed_scaling_factor") or 1.0, (word, limit)


def _stops(model: FusedModel, tp: int) -> str | None:
    """Why no engine starts at this `tp`, where it does not divide the heads of the model."""
    reasons = (undivided(layer, tp) for layer in model.layers)
    return next((why for why in reasons if why), None) if tp > 1 else None


def _all_rows(model: FusedModel, tp: int, top_k: int | None) -> list[LayerRow]:
    merged: dict[tuple[object, ...], tuple[LayerRow, list[str]]] = {}
    totals: dict[str, int] = {}
    for layer, made_of in model.layers.items():
        names = [name for modules in made_of for name in {m.name: 0 for m in modules}]
        row = _row_of(layer, tp, top_k, len(made_of))
        key = (row.name, row.n, row.k, row.groups, row.format, row.activation, row.kind, row.reason)
        before = merged.get(key)
        if before is None:
            merged[key] = (row, names)
        else:
            merged[key] = (replace(row, count=before[0].count + row.count), before[1] + names)
        for name in names:
            pattern = starred(name)
            totals[pattern] = totals.get(pattern, 0) + 1
    return [replace(row, modules=pattern_of(names, totals)) for row, names in merged.values()]


def _row_of(layer: FusedLayer, tp: int, top_k: int | None, count: int) -> LayerRow:
    n, k, why = shard(layer, tp)
    if SPLIT in why and layer.format.fp4 and tp > 1:
        why += _next_fit(layer, tp)
    reason = (
        layer.fault
        or (why if layer.format.fp4 or layer.format.unknown else "")
        or _why_not_probed(layer)
    )
    return LayerRow(
        layer.name,
        "",
        count,
        n,
        k,
        layer.groups,
        top_k if layer.kind == "grouped" else None,
        layer.format.format,
        layer.format.activation,
        layer.kind,
        not reason,
        reason or None,
    )


def _why_not_probed(layer: FusedLayer) -> str:
    """Why a layer that could be split is not probed all the same."""
    if not layer.format.fp4:
        return f"it is {layer.format.format}"
    if layer.absorbed:
        return "it is absorbed into the queries and outputs of attention when weights are loaded"
    if layer.kind == "grouped":
        return GROUPED
    if layer.kind == "other":
        return f"it is not known how engines fuse and split a layer called {layer.name}"
    if layer.format.activation not in ("fp4", "bf16"):
        return f"{layer.format.activation} activations are not probed"
    return ""


def _next_fit(layer: FusedLayer, tp: int) -> str:
    """The nearest tensor parallelism that this layer can be split for, as the end of a sentence."""
    below = next((t for t in range(tp - 1, 0, -1) if not shard(layer, t)[2]), 1)
    above = next((t for t in range(tp + 1, 4 * tp + 1) if not shard(layer, t)[2]), None)
    more = f" below and {above} above" if above else ""
    return f" of {layer.name}; the next that fits is {below}{more}"


def _unread(each: Unread) -> LayerRow:
    name = each.name.rpartition(".")[2] if "*" in each.name else each.name
    name = name if name != "*" else "model"
    return LayerRow(
        name, each.name, 0, 0, 0, 1, None, "unknown", "bf16", "other", False, each.reason
    )  # fmt: skip
