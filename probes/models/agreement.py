"""What a configuration says of modules, held against their files and against another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .config import ModelConfig
from .modules import LinearModule
from .quantisation import LayerFormat, QuantConfig


def first_expert(name: str) -> str:
    """The name of the first of like experts."""
    return name.replace(".*.", ".0.")


def said_format(module: LinearModule, quantisation: QuantConfig) -> LayerFormat:
    """What a configuration says of a module. Of experts in one tensor, it may name single ones."""
    plain = LayerFormat("bf16", "bf16")
    name = first_expert(module.name)
    found = quantisation.of(name)
    if found is None and module.groups > 1 and "*" not in module.name:
        for leaf in ("gate_proj", "w1", "up_proj"):
            found = found or quantisation.of(f"{module.parent}.0.{leaf}")
    return found or plain


def contradictions(
    modules: Sequence[LinearModule], config: ModelConfig | None, whole: bool = True
) -> dict[str, str]:
    """Modules that the configuration calls something else than the files hold: name to what.

    Left out is what engines quantise, or not, whatever a configuration says. `whole`: all files are
    there.
    """
    if config is None or not config.source:
        return {}
    experts = _other_experts(modules, config) if whole else {}
    return experts | _other_formats(modules, config)


_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


def _other_experts(modules: Iterable[LinearModule], config: ModelConfig) -> dict[str, str]:
    """Routed experts of which the files hold another number than the configuration names."""
    named = config.number(*_EXPERTS)
    return {
        each.name: f"{config.source} says {named} experts, the files hold {each.groups}"
        for each in modules
        if named and each.groups not in (1, named) and ".experts" in each.name
    }


def _other_formats(modules: Iterable[LinearModule], config: ModelConfig) -> dict[str, str]:
    """Modules that the configuration gives another format."""
    if not config.quantisation:
        says = f"{config.source} says nothing of quantisation, the files hold"
        return {m.name: f"{says} {m.format.format}" for m in modules if m.format and m.format.fp4}
    quantisation = config.quantisation[0]
    odd: dict[str, str] = {}
    for module in modules:
        if module.format is None or module.leaf in _NEVER or any(w in module.name for w in _ODD):
            continue
        said, held = said_format(module, quantisation), module.format
        if said.unknown or held.unknown or _plainly(said.format) == _plainly(held.format):
            continue
        odd[module.name] = f"{quantisation.source} says {said.format}, the files hold {held.format}"
    return odd


def two_configs(modules: Iterable[LinearModule], config: ModelConfig) -> list[str]:
    """Where two quantisation configs do not agree on what is FP4: one sentence."""
    if len(config.quantisation) < 2:
        return []
    first, second = config.quantisation[:2]
    odd = []
    for module in modules:
        one, other = said_format(module, first), said_format(module, second)
        if one != other and (one.fp4 or other.fp4):
            odd.append(
                f"{module.name} is {one.format} with {one.activation} activations in "
                f"{first.source}, {other.format} with {other.activation} in {second.source}"
            )
    more = f" ({len(odd) - 1} more modules likewise)" if len(odd) > 1 else ""
    return [f"{odd[0]}{more}: the first is what engines read"] if odd else []


_NEVER = ("gate", "router", "shared_expert_gate", "weights_proj", "eh_proj", "fc")
_ODD = ("indexer", "compressor", "visual", "vision", "audio", "projector")


def _plainly(format_: str) -> str:
    """A format without what two ways of telling it differ in."""
    return "16-bit" if format_ in ("bf16", "fp16", "fp32") else format_.split(" ")[0]
