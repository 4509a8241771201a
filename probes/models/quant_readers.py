"""Quantisation configs, read as each method writes them.

ModelOpt (one algorithm with exclusions, or a table by layer), compressed-tensors, Quark, mxfp4 of
gpt-oss, fp8 with FP4 experts of DeepSeek-V4, torchao, FP-Quant and AutoRound; other methods are
named as what they are. A module that nothing is said of is not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .patterns import NamePatterns, unwrapped
from .quantisation import FP4_FORMATS, LayerFormat, QuantConfig

_FP8 = LayerFormat("fp8", "fp8")
_MODELOPT = {
    "NVFP4": LayerFormat("nvfp4", "fp4"),
    "NVFP4_AWQ": LayerFormat("nvfp4", "fp4"),
    "NVFP4_SVDQUANT": LayerFormat("unknown: nvfp4 with a low-rank part", "fp4"),
    "W4A16_NVFP4": LayerFormat("nvfp4", "bf16"),
    "W4A8_NVFP4_FP8": LayerFormat("nvfp4", "fp8"),
    "MXFP4": LayerFormat("mxfp4", "fp4"),
    "W4A16_MXFP4": LayerFormat("mxfp4", "bf16"),
    "W4A8_MXFP4_FP8": LayerFormat("mxfp4", "fp8"),
    "MXFP8": LayerFormat("mxfp8", "fp8"),
    "FP8": _FP8,
    "FP8_PB_WO": _FP8,
    "FP8_PB_REAL": _FP8,
    "FP8_BLOCK_SCALES": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": _FP8,
    "INT4_AWQ": LayerFormat("int4 (awq)", "bf16"),
    "W4A16_AWQ": LayerFormat("int4 (awq)", "bf16"),
    "W4A16": LayerFormat("int4", "bf16"),
    "W4A8_AWQ": LayerFormat("int4 (awq)", "fp8"),
    "INT8_SQ": LayerFormat("int8", "int8"),
    "W8A8_SQ_PER_CHANNEL": LayerFormat("int8", "int8"),
    "W8A16": LayerFormat("int8", "bf16"),
}
_BY_METHOD = {"modelopt_fp4": "NVFP4", "modelopt_fp8": "FP8", "modelopt_mxfp8": "MXFP8"}
"""The algorithm that a method's name says, where nothing else does."""
_OTHER_METHODS = {
    "awq": "int4 (awq)",
    "gptq": "int4 (gptq)",
    "gptq_marlin": "int4 (gptq)",
    "aqlm": "aqlm",
    "hqq": "hqq",
    "eetq": "int8",
    "quanto": "quanto",
    "higgs": "higgs",
    "vptq": "vptq",
    "spqr": "spqr",
    "bitnet": "bitnet",
    "gguf": "gguf",
    "fbgemm_fp8": "fp8",
}


def read_quantisation(source: str, values: Mapping[str, Any]) -> QuantConfig | None:
    """The `quantization_config` of a config.json, or what a hf_quant_config.json holds.

    None where it says nothing about weights. Raises ValueError for what is no such thing.
    """
    inner = values.get("quantization")
    if isinstance(inner, Mapping):
        values = inner
    elif inner:
        return no_table(source)
    method = str(values.get("quant_method") or "").lower()
    if values.get("quantized_layers") or values.get("quant_algo") or method.startswith("modelopt"):
        found = _modelopt(source, values, method)
    elif method in _READERS:
        found = _READERS[method](source, values)
    elif not method and ("config_groups" in values or "kv_cache_scheme" in values):
        found = _compressed(source, values)
    elif method in _OTHER_METHODS:
        found = _other(source, values, LayerFormat(_OTHER_METHODS[method], "bf16"))
    elif method:
        found = _other(source, values, LayerFormat(f"unknown: {method[:40]}", "bf16"))
    elif values.get("qformat_weight"):  # Mistral's params.json
        found = _other(source, values, _mistral(str(values["qformat_weight"])))
    else:
        return None
    if found.excluded.odd:
        found.remarks.append(f"{source}: {found.excluded.odd[0]!r} is no pattern of module names")
    return found


def no_table(source: str) -> QuantConfig:
    """The quantisation config of a file that has something else in its place."""
    told = LayerFormat("unknown: its quantisation config is no table", "bf16")
    remark = f"{source}: its quantisation config is no table, and says nothing that is understood"
    return QuantConfig(source, "unknown", base=told, remarks=[remark])


def _mistral(name: str) -> LayerFormat:
    if name.startswith("fp8"):
        return _FP8
    return _MODELOPT.get(name.upper(), LayerFormat(f"unknown: {name[:40]}", "bf16"))


def _as_tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _algorithm(name: object, group: object = None) -> LayerFormat | None:
    """The format of a ModelOpt algorithm; None for none at all."""
    known = str(name or "").upper()
    if known in ("", "NONE", "NO_QUANT"):
        return None
    found = _MODELOPT.get(known) or LayerFormat(f"unknown: {known[:40]}", "bf16")
    block = {"nvfp4": 16, "mxfp4": 32}.get(found.format)
    if block and isinstance(group, int) and group not in (0, block):
        return LayerFormat(f"unknown: {found.format} in groups of {group}", found.activation)
    return found


def _modelopt(source: str, values: Mapping[str, Any], method: str) -> QuantConfig:
    excluded = values.get("ignore", values.get("exclude_modules"))
    found = QuantConfig(source, "modelopt", excluding=_as_tuple(excluded))
    group = values.get("group_size")
    layers = values.get("quantized_layers")
    if isinstance(layers, Mapping):
        globs = []
        for name, about in layers.items():
            if not isinstance(about, Mapping):
                found.remarks.append(f"{source}: what it says of {str(name)[:80]} is no table")
                continue
            own = about.get("group_size", group)
            format_ = _algorithm(about.get("quant_algo"), own) or LayerFormat("bf16", "bf16")
            if "*" in str(name):
                globs.append((NamePatterns([name]), format_))
            else:
                found.table[unwrapped(str(name))] = format_
                found.names.append(str(name))
        found.groups += globs
    algorithm = str(values.get("quant_algo") or _BY_METHOD.get(method, "")).upper()
    if algorithm == "MIXED_PRECISION":
        if method == "fp8":
            # The table is of what was made FP4 out of a checkpoint whose other layers are fp8.
            found.base, found.table_first = _FP8, True
            found.excluding = _not_converted(values)
            found.excluded = NamePatterns(found.excluding)
            if values.get("expert_dtype") == "fp4":
                found.experts = LayerFormat("mxfp4", "fp8")
        elif not found.table and not found.groups:
            found.groups = _config_groups(source, values, found.remarks)
    else:
        found.base = _algorithm(algorithm, group)
        if found.base is not None and excluded is None:
            found.remarks.append(
                f"{source} does not say which modules are not quantised (it has no "
                "exclude_modules): all are taken to be, as it reads"
            )
    return found


_BY_GROUP: dict[object, str] = {16: "nvfp4", 32: "mxfp4"}
"""FP4 formats by the elements that share a block scale."""


def _tensor(args: object, packing: str) -> str | None:
    """The format of a compressed-tensors weight or activation scheme; None for none."""
    if not isinstance(args, Mapping):
        return None
    bits, kind, group = args.get("num_bits"), args.get("type", "int"), args.get("group_size")
    if kind == "int":
        return f"int{bits}"
    if bits == 4:
        if group is None and "fp4" in packing:
            group = 32 if "mxfp4" in packing else 16
        return _BY_GROUP.get(group) or f"unknown: 4-bit floats in groups of {group}"
    if bits == 8:
        return "mxfp8" if group == 32 else "fp8"
    return f"unknown: floats of {bits} bits"


def _activation_of(format_: str | None) -> str:
    if format_ is None:
        return "bf16"
    if format_ in FP4_FORMATS or format_.startswith("unknown: 4-bit"):
        return "fp4"
    return "fp8" if format_ in ("fp8", "mxfp8") else format_


_CLASSES = ("Linear", "LinearBase", "Conv1D")


def _config_groups(
    source: str, values: Mapping[str, Any], remarks: list[str]
) -> list[tuple[NamePatterns, LayerFormat | None]]:
    """The groups of a compressed-tensors config: those that name modules before others."""
    named: list[tuple[NamePatterns, LayerFormat | None]] = []
    by_class: list[tuple[NamePatterns, LayerFormat | None]] = []
    groups = values.get("config_groups")
    for key, group in (groups if isinstance(groups, Mapping) else {}).items():
        if not isinstance(group, Mapping):
            remarks.append(f"{source}: group {str(key)[:40]} is no table")
            continue
        packing = str(group.get("format") or values.get("format") or "")
        weight = _tensor(group.get("weights"), packing)
        if weight is None:
            continue
        format_ = LayerFormat(
            weight, _activation_of(_tensor(group.get("input_activations"), packing))
        )
        targets = _as_tuple(group.get("targets"))
        patterns = NamePatterns(t for t in targets if t not in _CLASSES)
        if patterns:
            named.append((patterns, format_))
        if any(t in _CLASSES for t in targets):
            by_class.append((NamePatterns(["re:"]), format_))
    return named + by_class


def _compressed(source: str, values: Mapping[str, Any]) -> QuantConfig:
    found = QuantConfig(source, "compressed-tensors", excluding=_as_tuple(values.get("ignore")))
    found.groups = _config_groups(source, values, found.remarks)
    return found


def _quark_tensor(spec: object) -> str | None:
    if isinstance(spec, list):
        spec = next((each for each in spec if isinstance(each, Mapping)), None)
    if not isinstance(spec, Mapping):
        return None
    dtype, group = str(spec.get("dtype")), spec.get("group_size")
    if dtype.startswith("fp4"):
        return _BY_GROUP.get(group) or f"unknown: fp4 in groups of {group}"
    if dtype.startswith("fp8"):
        return "mxfp8" if group == 32 and spec.get("scale_format") == "e8m0" else "fp8"
    if dtype.startswith("fp6"):
        return "mxfp6"
    return dtype if dtype.startswith(("int", "uint")) else f"unknown: {dtype[:40]}"


def _quark_layer(config: object) -> LayerFormat | None:
    if not isinstance(config, Mapping):
        return None
    weight = _quark_tensor(config.get("weight"))
    if weight is None:
        return None
    return LayerFormat(weight, _activation_of(_quark_tensor(config.get("input_tensors"))))


def _quark(source: str, values: Mapping[str, Any]) -> QuantConfig:
    base = _quark_layer(values.get("global_quant_config"))
    found = QuantConfig(source, "quark", base, excluding=_as_tuple(values.get("exclude")))
    own = values.get("layer_quant_config")
    for pattern, config in (own if isinstance(own, Mapping) else {}).items():
        found.groups.append((NamePatterns([pattern]), _quark_layer(config)))
    return found


def _not_converted(values: Mapping[str, Any]) -> tuple[object, ...]:
    """What Transformers' own methods leave as it is; the output layer, where nothing is said."""
    for key in ("modules_to_not_convert", "ignored_layers", "modules_to_skip"):
        if isinstance(values.get(key), list):
            return tuple(values[key])
    return ("lm_head", "output", "head")


def _other(source: str, values: Mapping[str, Any], format_: LayerFormat) -> QuantConfig:
    method = str(values.get("quant_method") or "quantization")
    return QuantConfig(source, method, base=format_, excluding=_not_converted(values))


def _mxfp4(source: str, values: Mapping[str, Any]) -> QuantConfig:
    """gpt-oss: routed experts, weights alone."""
    experts = LayerFormat("mxfp4", "bf16")
    return QuantConfig(source, "mxfp4", experts=experts, excluding=_not_converted(values))


def _fp8(source: str, values: Mapping[str, Any]) -> QuantConfig:
    found = _other(source, values, _FP8)
    if values.get("scale_fmt") == "ue8m0" and values.get("expert_dtype") == "fp4":
        found.experts = LayerFormat("mxfp4", "fp8")
    return found


def _fp_quant(source: str, values: Mapping[str, Any]) -> QuantConfig:
    name = str(values.get("forward_dtype", "nvfp4")).lower()
    format_ = name if name in FP4_FORMATS else f"unknown: {name[:40]}"
    return _other(source, values, LayerFormat(format_, "fp4"))


def _auto_round(source: str, values: Mapping[str, Any]) -> QuantConfig:
    def one(spec: Mapping[str, Any]) -> LayerFormat | None:
        spec = {**values, **spec}
        kind, bits, group = (
            str(spec.get("data_type", "int")),
            spec.get("bits"),
            spec.get("group_size"),
        )
        if isinstance(bits, int) and bits >= 16:
            return None
        act = spec.get("act_bits", 16)
        if kind.startswith(("nv_fp", "mx_fp")) and bits == 4:
            format_ = "nvfp4" if kind.startswith("nv_fp") else "mxfp4"
            return LayerFormat(format_, {4: "fp4", 8: "fp8"}.get(act, "bf16"))
        if kind.startswith("mx_fp"):
            return LayerFormat("mxfp8", "fp8")
        return LayerFormat(f"int{bits} in groups of {group}", "bf16")

    found = QuantConfig(source, "auto-round", base=one({}), excluding=("lm_head",))
    extra = values.get("extra_config")
    for name, spec in (extra if isinstance(extra, Mapping) else {}).items():
        if isinstance(spec, Mapping):
            found.groups.append((NamePatterns([name]), one(spec)))
    return found


def _bitsandbytes(source: str, values: Mapping[str, Any]) -> QuantConfig:
    four = values.get("load_in_4bit", values.get("_load_in_4bit"))
    kind = f"bitsandbytes {values.get('bnb_4bit_quant_type', 'fp4')}" if four else "int8"
    return _other(source, values, LayerFormat(kind, "bf16"))


def _torchao(source: str, values: Mapping[str, Any]) -> QuantConfig:
    found = QuantConfig(source, "torchao", excluding=_not_converted(values))
    spec = values.get("quant_type")
    if isinstance(spec, Mapping):
        spec = spec.get("default", spec)
    kind = str(spec.get("_type", "")) if isinstance(spec, Mapping) else str(spec)
    if "FqnToConfig" not in kind:
        found.base = _torchao_layer(spec)
        return found
    data = spec.get("_data", {}) if isinstance(spec, Mapping) else {}
    by_name = data.get("module_fqn_to_config") or data.get("fqn_to_config") or {}
    for name, config in by_name.items() if isinstance(by_name, Mapping) else ():
        if name == "_default":
            found.base = _torchao_layer(config)
        elif str(name).startswith("re:"):
            found.groups.append((NamePatterns([name]), _torchao_layer(config)))
        else:
            format_ = _torchao_layer(config) or LayerFormat("bf16", "bf16")
            found.table[unwrapped(str(name))] = format_
    return found


def _torchao_layer(spec: object) -> LayerFormat | None:
    """One of torchao's configurations, by its class and its dtypes."""
    if spec is None:
        return None
    data: Mapping[str, Any] = {}
    if isinstance(spec, Mapping):
        data = spec.get("_data") if isinstance(spec.get("_data"), Mapping) else {}  # type: ignore[assignment]
        name = str(spec.get("_type", ""))
    else:
        name = str(spec)
    kind = name.lower().replace("_", "")
    weight_only = "weightonly" in kind or ("weight" in kind and "activation" not in kind)
    if "nvfp4" in kind:
        return LayerFormat("nvfp4", "bf16" if weight_only else "fp4")
    if kind.startswith("mx"):
        weight, act = str(data.get("weight_dtype")), str(data.get("activation_dtype"))
        if "float4" in weight or "float4" in str(data.get("elem_dtype")):
            return LayerFormat(
                "mxfp4", "fp8" if "float8" in act else "bf16" if weight_only else "fp4"
            )
        return LayerFormat("mxfp8", "fp8")
    for part, format_ in (("float8", "fp8"), ("int4", "int4"), ("uint4", "int4"), ("int8", "int8")):
        if part in kind:
            return LayerFormat(format_, "bf16" if weight_only else format_)
    return LayerFormat(f"unknown: {name[:40]}", "bf16")


_READERS = {
    "compressed-tensors": _compressed,
    "compressed_tensors": _compressed,
    "quark": _quark,
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "deepseek_v4_fp8": _fp8,
    "fp_quant": _fp_quant,
    "auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
