"""The plugin for vLLM (entry point ``vllm.general_plugins``).

It runs in every process of the engine. At level ``process`` and ``call`` it wraps
``EngineArgs.create_engine_config``, so that the configuration that all processes get names the
choice where the linear backend was left at auto, and where that of the experts was and the model's
are those that were probed; at ``call`` FlashInfer's `mm_fp4` is wrapped too.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import sys
from typing import Any

from . import plugin
from .asked import Configured
from .read_vllm import BACKEND, CONFIG, DISABLED, LINEAR
from .read_vllm_experts import FIELD as EXPERTS_FIELD
from .read_vllm_experts import OPTION as EXPERTS_OPTION
from .serving import ServedModel

_MARK = "_fp4tune_wrapped"


@plugin.guarded
def register() -> None:
    """Called by vLLM's `load_general_plugins`, once in each process."""
    plugin.run("vllm", "would run vLLM's linear layers with", _wrap)


def _wrap() -> None:
    # Arguments are parsed in the first process only; importing their module elsewhere is slow.
    module = sys.modules.get("vllm.engine.arg_utils")
    arguments = getattr(module, "EngineArgs", None)
    if arguments is not None and not hasattr(arguments.create_engine_config, _MARK):
        arguments.create_engine_config = _configuring(arguments.create_engine_config)


def _configuring(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _fill_in_vllm(self)
        _fill_in_vllm_experts(self)
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    return create_engine_config


@plugin.guarded
def _fill_in_vllm(args: Any) -> None:
    explicit = _explicit(args)
    if explicit is not None:
        if os.environ.get(plugin.APPLIED) != "1":
            option, value = explicit
            asked = (LINEAR, value) if option.endswith("linear_backend") else ()
            plugin.left_alone("vllm", option, value, asked)
        return
    found = plugin.advice("vllm")
    if found is None:
        return
    refusal = _refusal(str(found.word))
    if refusal is not None:
        plugin.say_once(
            f"fp4tune: vLLM would refuse {found.word} here, so it keeps auto: {refusal}"
        )
        return
    _apply(args, found.setting)
    os.environ[plugin.APPLIED] = "1"
    plugin.say_once(plugin.describe(found, "vLLM runs linear layers with"))


def _explicit(args: Any) -> tuple[str, str] | None:
    """(option, value) that the user asks with; None where all is left at auto."""
    config = getattr(args, "kernel_config", None)
    said = {
        "linear_backend": getattr(args, "linear_backend", None),
        "kernel_config.linear_backend": getattr(config, "linear_backend", None),
        "linear_backend_per_quant": getattr(config, "linear_backend_per_quant", None),
        DISABLED: os.environ.get(DISABLED),
        BACKEND: os.environ.get(BACKEND),
    }
    return next(((k, str(v)) for k, v in said.items() if v and v != "auto"), None)


def _apply(args: Any, setting: Configured) -> None:
    """Give the engine's arguments what `setting` has; its environment, for all its processes."""
    options = setting.options()
    asked = json.loads(options.get(CONFIG, "{}"))
    if LINEAR in options:
        asked["linear_backend"] = options[LINEAR]
    if "--no-enable-flashinfer-autotune" in options:
        asked["enable_flashinfer_autotune"] = False
    if asked:
        mine = copy.copy(args.kernel_config)  # the default may be one object for all EngineArgs
        for name, value in asked.items():
            setattr(mine, name, value)
        args.kernel_config = mine
        return  # the kernels that it turns off besides are a belt to these braces
    for name, value in setting.env.items():
        os.environ[name] = value


@plugin.guarded
def _fill_in_vllm_experts(args: Any) -> None:
    model = _served_by_vllm(args)
    if model is None or not hasattr(args, EXPERTS_FIELD):
        return
    said = (getattr(args, EXPERTS_FIELD), getattr(args.kernel_config, EXPERTS_FIELD, None))
    value = next((v for v in said if v and v != "auto"), None)
    if value is not None:
        if os.environ.get(plugin.APPLIED_EXPERTS) != "1":
            asked = (EXPERTS_OPTION, str(value))
            plugin.experts_left_alone("vllm", model, EXPERTS_OPTION, value, asked)
        return
    found = plugin.experts_advice("vllm", model)
    if found is None or plugin.contradicted("vllm", found):
        return
    options = found.setting.options()
    mine = copy.copy(args.kernel_config)
    setattr(mine, EXPERTS_FIELD, options[EXPERTS_OPTION])
    if "--no-enable-flashinfer-autotune" in options:
        mine.enable_flashinfer_autotune = False
    args.kernel_config = mine
    os.environ.update(found.setting.env)
    os.environ[plugin.APPLIED_EXPERTS] = "1"
    plugin.say_once(plugin.describe(found, "vLLM runs routed experts with"))


def _served_by_vllm(args: Any) -> ServedModel | None:
    name = getattr(args, "model", None)
    if not name:
        return None
    tp = int(getattr(args, "tensor_parallel_size", 1) or 1)
    return ServedModel(str(name), tp, bool(getattr(args, "enable_expert_parallel", False)))


def _refusal(word: str) -> str | None:
    """Why vLLM would not take the kernel of that name, as it says itself; None if it would.

    To name one that it cannot run is an error there, and would stop it from starting.
    """
    try:
        linear = importlib.import_module("vllm.model_executor.kernels.linear")
    except ImportError:
        return None  # before kernels were classes: its source has said that it takes the word
    tables = [
        getattr(linear, name)
        for name in ("_POSSIBLE_NVFP4_KERNELS", "_POSSIBLE_MXFP4_KERNELS")
        if hasattr(linear, name)
    ]
    for table in tables:
        for kernels in table.values():
            for kernel in kernels:
                if kernel.__name__ == word:
                    supported, why = kernel.is_supported()
                    return None if supported else str(why)
    return "it has no such kernel" if tables else None
