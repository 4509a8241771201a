"""What evidence of one backend holds for, as one SHA-256: its environment's fingerprint.

It holds only what this backend depends on: another provider's upgrade leaves it alone. A GPU's
UUID and the files' paths and times are not part of it, so that equal nodes share evidence; the
files' stamps go beside it, for readers to see a local change by.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..machine import files
from ..machine.codedigest import CodeDigest
from ..machine.hardware import IDENTITY, hardware
from . import state
from .codec import canonical
from .rows import Environment, Stamp

__all__ = [
    "Dependencies",
    "content",
    "environment",
    "hardware",
    "of",
    "source",
    "stamp",
    "variables",
]

COMMON = (
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_MODULE_LOADING",
    "CUDA_FORCE_PTX_JIT",
    "CUDA_DISABLE_PTX_JIT",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)
"""Variables that change what every backend does."""

PREFIXES = {
    "FLASHINFER_": ("flashinfer",),
    "TORCHINDUCTOR_": ("torch", "triton"),
    "TRITON_": ("triton",),
    "HUMMING_": ("humming",),
    "CUDNN_": ("cudnn",),
    "TORCH_BLAS_": ("torch",),
    "SGLANG_": ("sglang",),
    "VLLM_": ("vllm",),
}
"""Prefix -> which distributions' behaviour such variables change (a part of their names)."""

_ONLY_A_PLACE = re.compile(r"_(DIR|DIRS|PATH|HOME|BASE|ROOT|FILE|DIRECTORY)$|CACHE|LOG|VERBOSE")
"""Where something is kept, or how much is said: no change of behaviour; the code digest sees what
came from there."""


def variables(
    environ: Mapping[str, str], distributions: Iterable[str] | None = None
) -> dict[str, str]:
    """Of `environ`, what changes behaviour; with `distributions`, only what concerns those."""
    names = None if distributions is None else [d.lower() for d in distributions]

    def concerns(variable: str) -> bool:
        if variable in COMMON:
            return True
        if _ONLY_A_PLACE.search(variable):
            return False
        for prefix, owners in PREFIXES.items():
            if variable.startswith(prefix):
                return names is None or any(o in name for o in owners for name in names)
        return False

    return {name: environ[name] for name in sorted(environ) if concerns(name)}


def stamp(path: str | os.PathLike[str]) -> Stamp:
    """The file's local change stamp. Raises FileNotFoundError."""
    plain = os.path.abspath(path)
    found = state.file_stamp(plain)
    if found is None:
        raise FileNotFoundError(2, "no such file", plain)
    return Stamp(plain, *found)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What evidence of a backend depends on.

    device         `hardware`'s facts and what else torch knows (SM count, compute capability)
    distributions  name -> version, of those this backend depends on only
    files          its compiled files: their stamps are kept, their paths are not in the print
    variables      the process's; filtered to those that concern `distributions`
    code           `codedigest.combined` of `files`. Where it is unknown, the bytes of `files`
                   stand in: evidence then goes stale too soon rather than too late. Of what the
                   driver compiles there is a fact of its own, `COMPILED`
    extra          anything else it depends on, as JSON holds it
    arch           ``sm90`` or ``cpu``; without it, `device`'s ``arch``, or its ``kind``
    """

    device: Mapping[str, Any]
    backend: str
    distributions: Mapping[str, str]
    files: Iterable[str | os.PathLike[str]] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    code: CodeDigest | str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    arch: str | None = None


def environment(on: Dependencies) -> Environment:
    """The environment that evidence which depends on all this holds for.

    Raises FileNotFoundError for a file that is not there, ValueError for what JSON cannot hold.
    """
    paths = sorted({os.path.abspath(f) for f in on.files})
    value = on.code.value if isinstance(on.code, CodeDigest) else on.code
    where = on.arch or str(on.device.get("arch") or on.device["kind"])
    facts: dict[str, Any] = {
        "backend": on.backend,
        "arch": where,
        "device": {k: v for k, v in on.device.items() if k not in IDENTITY},
        "distributions": dict(on.distributions),
        "variables": variables(on.variables, on.distributions),
        "code": value,
        "extra": dict(on.extra),
    }
    if value is None:
        facts["files"] = sorted(content(path) for path in paths)
    if isinstance(on.code, CodeDigest):
        facts["code_kernels"], facts["code_how"] = on.code.kernels, on.code.how
        facts |= compiled(on.code)
    return Environment(of(facts), on.backend, where, facts, tuple(stamp(path) for path in paths))


COMPILED = "compiled_by_driver"
"""A digest of the PTX that the driver compiles here, with the driver's version; no fact without
any."""


def compiled(code: CodeDigest) -> dict[str, str]:
    """The fact of what the driver compiles."""
    return {} if code.compiled is None else {COMPILED: code.compiled}


_ASIDE = ("code_kernels", "code_how")
"""Facts that say how the code digest came about, and are no part of the print."""


def of(facts: Mapping[str, Any]) -> str:
    """The fingerprint that stands for an environment's `facts`."""
    known = {key: value for key, value in facts.items() if key not in _ASIDE}
    return hashlib.sha256(canonical(known).encode()).hexdigest()


def source(paths: Iterable[str]) -> dict[str, str]:
    """Facts for `Dependencies.extra`: the contents of a backend's own Python files, if any.

    Their names and places are no part of it. Raises OSError.
    """
    contents = sorted(content(path) for path in paths)
    return {"source": hashlib.sha256("".join(contents).encode()).hexdigest()} if contents else {}


def content(path: str) -> str:
    """SHA-256 of a file's bytes. Raises OSError."""
    sha = hashlib.sha256()
    with files.opened(path) as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
