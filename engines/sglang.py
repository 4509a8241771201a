"""The plugin for SGLang (entry point ``sglang.srt.plugins``).

It runs in every process of the engine before arguments are looked at. At level ``process`` and
``call`` a hook before ``ServerArgs.resolve_once`` fills in ``--fp4-gemm-backend`` where it was left
at auto, and ``--moe-runner-backend`` where the model's routed experts are those that were probed;
at ``call`` FlashInfer's `mm_fp4` is wrapped besides.
"""

from __future__ import annotations

import os
from typing import Any

from . import plugin
from .read_sglang import FIELD, OPTION
from .read_sglang_experts import FIELD as EXPERTS_FIELD
from .read_sglang_experts import OPTION as EXPERTS_OPTION
from .serving import ServedModel
from .watching import CHECKPOINT

ARGUMENTS = "sglang.srt.server_args.ServerArgs"


@plugin.guarded
def register() -> None:
    """Called by SGLang's `load_plugins`."""
    if plugin.only_watches():
        _hook()  # for the checkpoint's name
    plugin.run("sglang", f"would run SGLang with {OPTION}", _hook)


def _hook() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    # Where it resolves what it was given: a hook on __post_init__ never runs there, since the
    # Struct that ServerArgs is has taken that method when it was made.
    method = "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"
    HookRegistry.register(f"{ARGUMENTS}.{method}", _before_resolving, HookType.BEFORE)


def _before_resolving(args: Any, *rest: Any, **named: Any) -> None:
    """Hook before a method of ServerArgs; None leaves its arguments as they are."""
    if getattr(args, "model_path", None):
        os.environ.setdefault(CHECKPOINT, str(args.model_path))
    if not plugin.only_watches():
        _fill_in_sglang(args)
        _fill_in_sglang_experts(args)


@plugin.guarded
def _fill_in_sglang(args: Any) -> None:
    if getattr(args, "_resolution_finished", False):
        return  # a copy in a child process: decided, and sealed
    value = getattr(args, FIELD, None)
    if value is None:
        plugin.say_once(f"fp4tune: this SGLang has no {OPTION}")
        return
    if value != "auto":
        if os.environ.get(plugin.APPLIED) != "1":
            plugin.left_alone("sglang", OPTION, value, (OPTION, str(value)))
        return
    found = plugin.advice("sglang")
    if found is None:
        return
    options = found.setting.options()
    if OPTION in options:
        setattr(args, FIELD, options[OPTION])
    if "--disable-flashinfer-autotune" in options:
        args.disable_flashinfer_autotune = True
    os.environ[plugin.APPLIED] = "1"
    plugin.say_once(plugin.describe(found, f"SGLang runs {OPTION}"))


@plugin.guarded
def _fill_in_sglang_experts(args: Any) -> None:
    value = getattr(args, EXPERTS_FIELD, None)
    model = _served_by_sglang(args)
    if getattr(args, "_resolution_finished", False) or value is None or model is None:
        return
    if value != "auto":
        if os.environ.get(plugin.APPLIED_EXPERTS) != "1":
            asked = (EXPERTS_OPTION, str(value))
            plugin.experts_left_alone("sglang", model, EXPERTS_OPTION, value, asked)
        return
    found = plugin.experts_advice("sglang", model)
    if found is None or plugin.contradicted("sglang", found):
        return
    options = found.setting.options()
    setattr(args, EXPERTS_FIELD, options[EXPERTS_OPTION])
    if "--disable-flashinfer-autotune" in options:
        args.disable_flashinfer_autotune = True
    os.environ.update(found.setting.env)
    os.environ[plugin.APPLIED_EXPERTS] = "1"
    plugin.say_once(plugin.describe(found, f"SGLang runs {EXPERTS_OPTION}"))


def _served_by_sglang(args: Any) -> ServedModel | None:
    name = getattr(args, "model_path", None)
    if not name:
        return None
    spread = getattr(args, "ep_size", 1) > 1 or getattr(args, "moe_a2a_backend", "none") != "none"
    return ServedModel(str(name), int(getattr(args, "tp_size", 1) or 1), spread)
