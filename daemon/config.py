"""The daemon's one TOML file: read, checked to the last key, and made into plain values."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import state
from ..errors import Refused
from ..probes.models import shapes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "FP4TUNE_CONFIG"
SYSTEM = "/etc/fp4tune/daemon.toml"
LEVELS = ("quick", "standard", "soak")
PROFILES = ("strict", "sglang", "vllm")
_CHOICES = {
    "level": LEVELS,
    "profile": PROFILES,
    "formats": ("nvfp4", "mxfp4"),
    "activations": ("bf16", "fp4"),
    "out_dtype": ("bf16", "fp16"),
}
_NOT_NEGATIVE = {"every_seconds", "quiet_seconds", "day_seconds"}


@dataclass(frozen=True, slots=True)
class Probe:
    """What is probed: the options of ``fp4tune probe`` by the same names."""

    presets: tuple[str, ...] = ()
    model_configs: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    tp: int = 1
    max_m: int | None = None
    formats: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    out_dtype: str = "bf16"
    backends: tuple[str, ...] = ()
    level: str = "standard"
    profile: str | None = None
    python: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a probe may take. `day_seconds` 0: any; a memory of None: any."""

    host_gib: float | None = 32.0
    gpu_gib: float | None = None
    layer_seconds: float = 3600.0
    day_seconds: float = 0.0
    nice: int = 10


@dataclass(frozen=True, slots=True)
class Idle:
    """When a GPU counts as free, besides its lock and its processes."""

    utilisation_percent: float = 5.0
    quiet_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Watch:
    """How often to look, and how long a GPU's driver may be silent before it counts as wedged."""

    seconds: float = 2.0
    wedged_seconds: float = 30.0
    ignore_xids: tuple[int, ...] = (13, 31, 43, 45, 68)
    """XIDs of programs that misbehaved, not of the GPU (NVIDIA's list calls them so)."""


@dataclass(frozen=True, slots=True)
class Http:
    listen: str = "127.0.0.1:9404"
    token_file: str | None = None
    connections: int = 512


@dataclass(frozen=True, slots=True)
class Canary:
    """One choice tried beside a serving engine, every so often. 0: never."""

    every_seconds: float = 0.0
    launches: int = 8
    seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Config:
    """`gpus`: ``all``, ``none``, ``cpu`` for the processor, or indices and UUIDs."""

    state: str | None = None
    gpus: tuple[str, ...] = ("all",)
    probe: Probe = field(default_factory=Probe)
    limits: Limits = field(default_factory=Limits)
    idle: Idle = field(default_factory=Idle)
    watch: Watch = field(default_factory=Watch)
    http: Http = field(default_factory=Http)
    canary: Canary = field(default_factory=Canary)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def state_dir(self) -> Path:
        return state.directory(self.state)

    @property
    def environ(self) -> dict[str, str]:
        """The variables that its probes run with."""
        return {**os.environ, **self.environment}

    def layers(self) -> list[tuple[int, int]]:
        """The (n, k) of every layer that the file names, each once. Raises ValueError."""
        found = [
            layer for name in self.probe.presets for layer in shapes.preset(name, self.probe.tp)
        ]
        for path in self.probe.model_configs:
            found += shapes.from_config(path, self.probe.tp)
        found += [shapes.parse_shape(text) for text in self.probe.shapes]
        return list(dict.fromkeys((layer.n, layer.k) for layer in found))


def place(given: Path | None) -> Path | None:
    """The file to read: the one given, FP4TUNE_CONFIG's, the system's where there is one."""
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        return named
    return Path(SYSTEM) if os.path.exists(SYSTEM) else None


def load(path: Path | None) -> Config:
    """The configuration in `path`, or the defaults for None.

    Raises Refused with one sentence per mistake, a line each.
    """
    mistakes: list[str] = []
    config = Config()
    if path is not None:
        try:
            with open(path, "rb") as file:
                config = _made(Config, tomllib.load(file), "", mistakes)
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Refused(f"{path}: this is not TOML: {error}") from None
    if not mistakes:
        mistakes += _beyond(config)
    if mistakes:
        raise Refused("\n".join(f"{path or 'the defaults'}: {mistake}" for mistake in mistakes))
    return config


def _made(kind: type, table: Mapping[str, Any], at: str, mistakes: list[str]) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{at}{key}"
        if key not in known:
            mistakes.append(f"{where}: there is no such key; there are {', '.join(known)}")
            continue
        wanted = str(known[key].type)
        if wanted in _TABLES:
            if isinstance(value, dict):
                values[key] = _made(_TABLES[wanted], value, f"{where}.", mistakes)
            else:
                mistakes.append(f"{where}: it is a table, [{where}]")
            continue
        try:
            values[key] = _value(wanted, value)
        except TypeError as error:
            mistakes.append(f"{where}: it is {error}, not {value!r}")
            continue
        mistakes += [f"{where}: {wrong}" for wrong in _wrong(key, values[key])]
    return kind(**values)


_TABLES: dict[str, type] = {
    "Probe": Probe, "Limits": Limits, "Idle": Idle, "Watch": Watch, "Http": Http, "Canary": Canary,
}  # fmt: skip


def _value(wanted: str, value: Any) -> Any:
    """`value` as the annotation `wanted` has it. Raises TypeError with what it should be."""
    plain = wanted.removesuffix(" | None")
    if plain == "str" and isinstance(value, str):
        return value
    if plain == "int":
        if type(value) is int:
            return value
        raise TypeError("a whole number")
    if plain == "float":
        if type(value) in (int, float):
            return float(value)
        raise TypeError("a number")
    if plain == "tuple[str, ...]":
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise TypeError("a list of strings")
    if plain == "tuple[int, ...]":
        if isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        raise TypeError("a list of whole numbers")
    if plain == "Mapping[str, str]":
        if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            return dict(value)
        raise TypeError("a table of strings")
    raise TypeError("a string")


def _wrong(key: str, value: Any) -> Iterator[str]:
    allowed = _CHOICES.get(key)
    if allowed is not None:
        for one in value if isinstance(value, tuple) else (value,):
            if one not in allowed:
                yield f"{one!r} is not one of {', '.join(allowed)}"
    if type(value) in (int, float) and key != "nice":
        least = 0 if key in _NOT_NEGATIVE or key == "seed" else 1 if type(value) is int else None
        if least is not None and not value >= least:
            yield f"it must be at least {least}, not {value}"
        elif least is None and not value > 0:
            yield f"it must be more than 0, not {value:g}"
        elif value == float("inf"):
            yield "it must be finite"


def _beyond(config: Config) -> Iterator[str]:
    """Mistakes that show only when names are looked up."""
    try:
        config.layers()
    except (ValueError, OSError) as error:
        yield f"probe: {error}"
    words = [g for g in config.gpus if g in ("all", "none")]
    if words and len(config.gpus) > 1:
        yield f"gpus: {words[0]!r} stands alone"
    if not config.gpus:
        yield "gpus: name at least one, or 'none'"
    for gpu in config.gpus:
        if gpu not in ("all", "none", "cpu") and not re.fullmatch(r"\d+|GPU-[\w-]+", gpu):
            yield f"gpus: {gpu!r} is not an index, a UUID, 'cpu', 'all' or 'none'"
    try:
        address(config.http.listen)
    except ValueError as error:
        yield f"http.listen: {error}"
    if config.http.token_file is not None:
        try:
            token(config.http.token_file)
        except Refused as error:
            yield f"http.token_file: {error}"
    for name in config.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"environment: {name!r} is not the name of a variable"


LOCAL = ("127.0.0.1", "::1", "localhost")


NOWHERE = "none"


def address(listen: str) -> tuple[str, int] | str:
    """``host:port``, local ones only, or the path of ``unix:/path``; empty for ``none``.

    Raises ValueError.
    """
    if listen == NOWHERE:
        return ""
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if not os.path.isabs(path) or len(path.encode()) > 100:
            raise ValueError(f"{path!r} is not an absolute path of at most 100 bytes")
        return path
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if host not in LOCAL:
        raise ValueError(f"{listen!r}: it listens on {', '.join(LOCAL)} or unix:/path only")
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ValueError(f"{listen!r} has no port from 0 to 65535")
    return host, int(port)


def token(path: str) -> str:
    """The token in that file. Raises Refused where it is too short, or everyone may read it."""
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: {getattr(error, 'strerror', None) or 'it is not ASCII'}") from None
    if mode & 0o004:
        raise Refused(f"{path}: everyone may read it; chmod o-r it")
    if len(text) < 16 or any(c.isspace() for c in text):
        raise Refused(f"{path}: a token is one word of at least 16 characters")
    return text
