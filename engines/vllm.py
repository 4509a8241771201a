"""The plugin for vLLM (entry point ``vllm.general_plugins``).

It runs in every process of the engine. At level ``process`` and ``call`` it wraps
``EngineArgs.create_engine_config``, so that the configuration that all processes get names the
choice where the linear backend was left at auto; at ``call`` FlashInfer's `mm_fp4` is wrapped too.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys

from . import emit, plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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
        _fill_in(self)
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    return create_engine_config


@plugin.guarded
def _fill_in(args: Any) -> None:
    config = args.kernel_config
    said = {
        "--linear-backend": args.linear_backend,
        "kernel_config.linear_backend": config.linear_backend,
        "linear_backend_per_quant": config.linear_backend_per_quant or "auto",
        "VLLM_DISABLED_KERNELS": os.environ.get("VLLM_DISABLED_KERNELS") or "auto",
    }
    explicit = next(((option, v) for option, v in said.items() if v != "auto"), None)
    if explicit is not None:
        if os.environ.get(plugin.APPLIED) != "1":
            plugin.left_alone("vLLM", *explicit)
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
    mine = copy.copy(config)  # the default may be one object for all EngineArgs
    mine.linear_backend_per_quant = emit.per_quant(found)
    args.kernel_config = mine
    os.environ[plugin.APPLIED] = "1"
    plugin.say_once(plugin.describe(found, "vLLM runs linear layers with"))


def _refusal(word: str) -> str | None:
    """Why vLLM would not take the kernel of that name, as it says itself; None if it would.

    To name one that it cannot run is an error there, and would stop it from starting.
    """
    linear = importlib.import_module("vllm.model_executor.kernels.linear")
    for table in ("_POSSIBLE_NVFP4_KERNELS", "_POSSIBLE_MXFP4_KERNELS"):
        for kernels in getattr(linear, table, {}).values():
            for kernel in kernels:
                if kernel.__name__ == word:
                    supported, why = kernel.is_supported()
                    return None if supported else str(why)
    return "it has no such kernel"
