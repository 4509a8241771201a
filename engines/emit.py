"""What an engine must be given so that it runs the proven choice: arguments, environment, files.

Every emission says in comments what evidence it rests on. Standard library only, but for the
files that pin FlashInfer's tactics.
"""

from __future__ import annotations

import json
import shlex

from ..errors import printable
from . import names
from .select import Selection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..cache.reader import Reader

TARGETS = ("sglang", "vllm", "flashinfer", "env", "json")


class Emission:
    """`args` for the engine's command line, `env` for its environment, `files` by name for a
    directory of the user's, and `comments` that say what it all rests on."""

    __slots__ = ("args", "comments", "env", "files", "selection")

    def __init__(
        self,
        selection: Selection,
        args: list[str],
        env: dict[str, str],
        comments: list[str],
        files: Mapping[str, Any] | None = None,
    ) -> None:
        self.selection = selection
        self.args = args
        self.env = env
        self.files = dict(files or {})
        self.comments = comments

    def shell(self) -> str:
        """A snippet for bash to source: exported variables, and FP4TUNE_ARGS for the engine."""
        # A comment ends where its line does, whatever a name in it holds.
        lines = [f"# {printable(line)}" for line in self.comments]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in self.env.items()]
        if self.args:
            lines.append(f"FP4TUNE_ARGS=({' '.join(map(shlex.quote, self.args))})")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        s = self.selection
        return {
            "engine": s.engine,
            "version": s.version,
            "backend": s.backend,
            "name": s.word,
            "arch": s.arch,
            "gpu": s.gpu,
            "profile": s.profile,
            "generation": s.generation,
            "format": s.format,
            "activation": s.activation,
            "args": self.args,
            "env": self.env,
            "files": sorted(self.files),
            "conditions": s.conditions,
            "layers": [list(layer) for layer in s.layers],
            "rejected": s.rejected,
            "default": s.default,
            "comments": self.comments,
        }


def emission(selection: Selection) -> Emission:
    """What `selection` asks of its engine; without arguments and environment where it found no
    backend."""
    comments = evidence(selection)
    if selection.backend is None:
        return Emission(selection, [], {}, comments)
    if selection.engine == "sglang":
        return Emission(selection, ["--fp4-gemm-backend", str(selection.word)], {}, comments)
    return Emission(
        selection,
        ["--kernel-config", json.dumps({"linear_backend_per_quant": per_quant(selection)})],
        {"VLLM_DISABLED_KERNELS": ",".join(disabled(selection))},
        comments,
    )


def per_quant(selection: Selection) -> dict[str, str]:
    """vLLM's ``linear_backend_per_quant`` for this choice; empty without one."""
    name = names.NAMES.get(selection.backend or "")
    if name is None or name.linear is None:
        return {}
    if selection.format == "mxfp4":
        return {"mxfp4": name.linear}
    if selection.activation == "fp4":
        return {"nvfp4_w4a4": name.linear}
    # A weight-only kernel also serves a W4A4 checkpoint where there is no FP4 hardware.
    both = (names.sm_of(selection.arch) or 0) < 100
    return {key: name.linear for key in ("nvfp4_w4a4", "nvfp4_w4a16") if both or key[-3:] == "a16"}


def disabled(selection: Selection) -> list[str]:
    """vLLM's kernels of this format, less the chosen one (and its emulation, the last resort)."""
    every = names.VLLM_KERNELS.get(selection.format, ())
    chosen = {selection.word}
    if selection.activation == "bf16" and (names.sm_of(selection.arch) or 0) >= 100:
        # Weight-only layers of a model whose other layers are W4A4: those keep their kernels.
        return [k for k in every if "W4A16" in k and k not in chosen]
    return [k for k in every if k not in chosen]


def environment(selection: Selection, level: str = "process") -> dict[str, str]:
    """What makes the plugins apply this very generation in every process of an engine."""
    return {
        "FP4TUNE_STATE": selection.place,
        "FP4TUNE_GENERATION": str(selection.generation),
        "FP4TUNE_LEVEL": level,
    }


def evidence(s: Selection) -> list[str]:
    """What an emission rests on, line by line."""
    from .. import __version__

    lines = [
        f"fp4tune {__version__}: generation {s.generation} of {s.place}",
        f"{s.gpu} ({s.arch}), profile {s.profile}, {s.format} with {s.activation} activations",
    ]
    known = names.VERSIONS[s.engine]
    if s.version is None:
        lines.append(f"{s.engine} is not installed here; names are those of {known}")
    elif s.version != known:
        lines.append(f"{s.engine} {s.version} is installed; it knows this name, read from {known}")
    else:
        lines.append(f"{s.engine} {s.version} is installed")
    if s.backend is None:
        lines.append(f"nothing that {s.engine} can name is proven in every bucket:")
    else:
        decisions = [d for *_, d in s.buckets]
        lines.append(
            f"{s.backend}: safe in all {len(decisions)} buckets of {len(s.layers)} layers, "
            f"at least {min(d.launches for d in decisions)} launches of "
            f"{min(d.problems for d in decisions)} problems in each regime"
        )
        lines.append("layers (n x k): " + ", ".join(f"{n}x{k}" for n, k in s.layers))
        lines.append("any other layer is unproven")
        lines += [f"holds if {condition['text']}" for condition in s.conditions]
        if s.default and s.default != s.backend:
            lines.append(f"by itself {s.engine} would run {s.default}")
    lines += [f"{backend}: {why}" for backend, why in sorted(s.rejected.items())]
    return lines + s.notes


def flashinfer(reader: Reader, selection: Selection) -> Emission:
    """Both files that pin the proven tactics of the selected backend. Raises ValueError where that
    is none of FlashInfer's."""
    from . import tactics

    name = names.NAMES.get(selection.backend or "")
    if selection.backend is None or name is None or name.runner is None:
        what = selection.backend or "nothing"
        raise ValueError(f"the choice here is {what}, of which FlashInfer keeps no tactics")
    pins = [
        tactics.Pin(selection.backend, n, k, m_hi, d.tactic, selection.format)
        for n, k, _, m_hi, d in selection.buckets
        if m_hi > 0
    ]
    proven = {pin.tactic for pin in pins}
    others = {
        row["tactic"]
        for row in reader.rows("candidate")
        if row["backend"] == selection.backend and row["tactic"] not in proven
    }
    files = tactics.files(pins, {selection.backend: sorted(others)})
    comments = [
        *evidence(selection),
        f"{tactics.CACHE}: the proven tactic of each bucket; load it with "
        "flashinfer.autotuner.AutoTuner.get().load_configs(), as fp4tune's plugins do",
        f"{tactics.BLOCKLIST}: every other tactic; the two belong together",
    ]
    return Emission(selection, [], {}, comments, files)
