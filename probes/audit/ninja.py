"""What a FlashInfer build file says: the flags, the sources and where they include from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...machine import files

_ASSIGN = re.compile(r"^(\w+) = ?(.*)$")
_BUILD = re.compile(r"^build (\S+): (?:cuda_compile|compile) (\S+)")
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
# Third-party trees: what they could do is not what the module does.
_FOREIGN = ("/cutlass/", "/cccl/", "/spdlog/", "/tvm_ffi/", "/cuda")


@dataclass(frozen=True, slots=True)
class NinjaBuild:
    """A parsed ``build.ninja``."""

    flags: tuple[str, ...]
    """Of the CUDA compiler, variables replaced."""
    sources: tuple[Path, ...]
    includes: tuple[Path, ...]
    nvcc: str

    @property
    def own(self) -> tuple[Path, ...]:
        """The include folders that are the module's own, not CUTLASS's or CUDA's."""
        return tuple(p for p in self.includes if not any(f in f"{p}/" for f in _FOREIGN))


def read(path: Path) -> NinjaBuild | None:
    """Parse a build file; None where there is none."""
    try:
        text = files.text(path, errors="replace").replace("$\n", " ")
    except OSError:
        return None
    variables: dict[str, str] = {}
    sources = []
    for line in text.splitlines():
        if match := _ASSIGN.match(line):
            variables[match[1]] = match[2]
        elif match := _BUILD.match(line):
            sources.append(Path(match[2].replace("$ ", " ").replace("$:", ":")))
    flags = _expand(variables.get("cuda_cflags", ""), variables).split()
    after = dict(enumerate(flags[1:]))
    includes = [Path(after.get(i, "")) for i, flag in enumerate(flags) if flag == "-isystem"]
    includes += [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    nvcc = _expand(variables.get("nvcc", ""), variables)
    return NinjaBuild(tuple(flags), tuple(sources), tuple(dict.fromkeys(includes)), nvcc)


def _expand(text: str, variables: dict[str, str], depth: int = 8) -> str:
    """Replace ``$name``; what is not set (``$in``, ``$out``) becomes nothing, as in ninja."""
    if depth == 0 or "$" not in text:
        return text
    replaced = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], ""), text)
    return _expand(replaced, variables, depth - 1)
