"""The plugin for SGLang (entry point ``sglang.srt.plugins``).

It runs in every process of the engine before arguments are looked at. At level ``process`` and
``call`` a hook after ``ServerArgs.__post_init__`` fills in ``--fp4-gemm-backend`` where it was left
at auto; at ``call`` FlashInfer's `mm_fp4` is wrapped besides.
"""

from __future__ import annotations

import os

from . import plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FIELD, OPTION = "fp4_gemm_runner_backend", "--fp4-gemm-backend"
TARGET = "sglang.srt.server_args.ServerArgs.__post_init__"


@plugin.guarded
def register() -> None:
    """Called by SGLang's `load_plugins`."""
    level = plugin.level()
    if level == "off":
        return
    if level == "emit":
        found = plugin.advice("sglang")
        if found is not None:
            plugin.say_once(plugin.describe(found, f"would run SGLang with {OPTION}"))
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, _after_arguments, HookType.AFTER)
    plugin.pinned_tactics()
    if level == "call":
        from . import per_call

        per_call.install()


def _after_arguments(result: Any, args: Any, *rest: Any, **named: Any) -> Any:
    """Hook after ``ServerArgs.__post_init__``; returns its result as it was."""
    _fill_in(args)
    return result


@plugin.guarded
def _fill_in(args: Any) -> None:
    value = getattr(args, FIELD, None)
    if value is None:
        plugin.say_once(f"fp4tune: this SGLang has no {OPTION}")
        return
    if value != "auto":
        if os.environ.get(plugin.APPLIED) != "1":
            plugin.left_alone("SGLang", OPTION, value)
        return
    found = plugin.advice("sglang")
    if found is None:
        return
    setattr(args, FIELD, found.word)
    os.environ[plugin.APPLIED] = "1"
    plugin.say_once(plugin.describe(found, f"SGLang runs {OPTION}"))
