"""The daemon's one TOML file: read, checked to the last key, and made into plain values."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticCustomError

from ..cache import state
from ..cache.experts import option_text
from ..errors import Refused
from ..machine import files
from ..probes.grouped.problem import experts_row
from ..probes.models import shapes
from ..probes.models.experts import experts_on_rank, split_of_experts
from ..probes.models.fusion import ENGINES
from ..probes.models.rows import CheckpointLayers
from ..probes.models.shapes import AskedLayer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "FP4TUNE_CONFIG"
SYSTEM = "/etc/fp4tune/daemon.toml"
Level = Literal["quick", "standard", "soak"]
Profile = Literal["strict", "sglang", "vllm"]
LEVELS: tuple[str, ...] = get_args(Level)
PROFILES: tuple[str, ...] = get_args(Profile)
LOCAL = ("127.0.0.1", "::1", "localhost")
NOWHERE = "none"
_MOST = 1 << 20
"""Bytes of a configuration."""


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
    if not (port.isascii() and port.isdecimal()) or not 0 <= int(port) < 65536:
        raise ValueError(f"{listen!r} has no port from 0 to 65535")
    return host, int(port)


# -- what the values of the file are: a type each, with the sentence for what is none


def _list_of(kind: type, said: str) -> BeforeValidator:
    """A TOML list of `kind` as a tuple; one string may stand for a list of one."""

    def check(value: Any) -> Any:
        if kind is str and isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and all(type(one) is kind for one in value):
            return tuple(value)
        raise PydanticCustomError("kind", said)

    return BeforeValidator(check)


def _check_table(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(one, str) for one in value.values()):
        return value
    raise PydanticCustomError("kind", "a table of strings")


def _names(value: Mapping[str, str]) -> Mapping[str, str]:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"{name!r} is not the name of a variable")
    return value


def _check_gpus(value: tuple[str, ...]) -> tuple[str, ...]:
    words = [name for name in value if name in ("all", "none")]
    if words and len(value) > 1:
        raise ValueError(f"{words[0]!r} stands alone")
    if not value:
        raise ValueError("name at least one, or 'none'")
    for name in value:
        if not re.fullmatch(r"all|none|cpu|\d+|GPU-[\w-]+", name, re.ASCII):
            raise ValueError(f"{name!r} is not an index, a UUID, 'cpu', 'all' or 'none'")
    return value


def _listens(value: str) -> str:
    address(value)
    return value


def _health(value: str) -> str:
    if not value.startswith("unix:"):
        raise ValueError(f"{value!r} is not unix:/path")
    return _listens(value)


Text = Annotated[str, Strict()]
Whole = Annotated[int, Strict(), Field(ge=1)]
Count = Annotated[int, Strict(), Field(ge=0)]
AnyWhole = Annotated[int, Strict()]
Positive = Annotated[float, Strict(), AllowInfNan(False), Field(gt=0)]
NotNegative = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0)]
_STRINGS = _list_of(str, "a list of strings")
Strings = Annotated[tuple[str, ...], _STRINGS]
Formats = Annotated[tuple[Literal["nvfp4", "mxfp4"], ...], _STRINGS]
Activations = Annotated[tuple[Literal["bf16", "fp4"], ...], _STRINGS]
Numbers = Annotated[tuple[int, ...], _list_of(int, "a list of whole numbers")]
Gpus = Annotated[tuple[str, ...], _STRINGS, AfterValidator(_check_gpus)]
Listen = Annotated[Text, AfterValidator(_listens)]
HealthSocket = Annotated[Text, AfterValidator(_health)]
Variables = Annotated[Mapping[str, str], BeforeValidator(_check_table), AfterValidator(_names)]

_CLOSED = ConfigDict(extra="forbid")
"""An unknown key is a mistake."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A layer of routed experts: its format, and the rest as ``--experts`` has it."""

    format: str
    text: str

    @staticmethod
    def of(format_: str, row: Mapping[str, Any]) -> RoutedLayer:
        """That of a row about routed experts: ``activation``, ``groups``, ``n`` and ``k``."""
        text = option_text(row)
        assert text is not None
        return RoutedLayer(format_, text)


@dataclass(frozen=True, slots=True, config=_CLOSED)
class ProbeOptions:
    """What is probed: the options of ``fp4tune probe`` by the same names."""

    presets: Strings = ()
    model_configs: Strings = ()
    checkpoints: Strings = ()
    shapes: Strings = ()
    experts: Strings = ()
    tp: Whole = 1
    ep: Whole = 1
    max_m: Whole | None = None
    formats: Formats = ()
    activations: Activations = ()
    out_dtype: Literal["bf16", "fp16"] = "bf16"
    backends: Strings = ()
    level: Level = "standard"
    profile: Profile | None = None
    python: Text | None = None
    seed: Count | None = None

    def kinds(self, layer: AskedLayer) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The formats and activations to probe a layer in, empty for a probe's own; None where
        those asked for leave it out."""
        if layer.format is None:
            return self.formats, self.activations
        if self.formats and layer.format not in self.formats:
            return None
        if layer.activation != "bf16":
            return (layer.format,), self.activations
        if self.activations and "bf16" not in self.activations:
            return None
        return (layer.format,), ("bf16",)


@dataclass(frozen=True, slots=True, config=_CLOSED)
class ProbeLimits:
    """What a probe may take. `day_seconds` 0: any; a memory of None: any."""

    host_gib: Positive | None = 32.0
    gpu_gib: Positive | None = None
    layer_seconds: Positive = 3600.0
    day_seconds: NotNegative = 0.0
    nice: AnyWhole = 10


@dataclass(frozen=True, slots=True, config=_CLOSED)
class IdleRule:
    """When a GPU counts as free, besides its lock and its processes."""

    utilisation_percent: Positive = 5.0
    quiet_seconds: NotNegative = 30.0


@dataclass(frozen=True, slots=True, config=_CLOSED)
class WatchOptions:
    """How often to look, and how long a GPU's driver may be silent before it counts as wedged."""

    seconds: Positive = 2.0
    wedged_seconds: Positive = 30.0
    ignore_xids: Numbers = (13, 31, 43, 45, 68)
    """XIDs of programs that misbehaved, not of the GPU (NVIDIA's list calls them so)."""


@dataclass(frozen=True, slots=True, config=_CLOSED)
class HttpOptions:
    """Where it answers, and how many connections it holds, in all and of one user."""

    listen: Listen = "127.0.0.1:9404"
    token_file: Text | None = None
    connections: Whole = 512
    connections_per_peer: Whole = 128
    health: HealthSocket | None = None
    """A socket for the daemon's own user, on which only the health is asked."""


@dataclass(frozen=True, slots=True, config=_CLOSED)
class CanaryOptions:
    """One choice tried beside a serving engine, every so often. 0: never."""

    every_seconds: NotNegative = 0.0
    launches: Whole = 8
    seconds: Positive = 120.0


@dataclass(frozen=True, slots=True, config=_CLOSED)
class DaemonConfig:
    """`gpus`: ``all``, ``none``, ``cpu`` for the processor, or indices and UUIDs.

    Raises pydantic's ValidationError for a value that cannot be; `load` says it in a sentence.
    """

    state: Text | None = None
    gpus: Gpus = ("all",)
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    limits: ProbeLimits = field(default_factory=ProbeLimits)
    idle: IdleRule = field(default_factory=IdleRule)
    watch: WatchOptions = field(default_factory=WatchOptions)
    http: HttpOptions = field(default_factory=HttpOptions)
    canary: CanaryOptions = field(default_factory=CanaryOptions)
    environment: Variables = field(default_factory=dict)

    @property
    def state_dir(self) -> Path:
        return state.directory(self.state)

    @property
    def environ(self) -> dict[str, str]:
        """The variables that its probes run with."""
        return {**os.environ, **self.environment}

    def layers(self) -> tuple[AskedLayer, ...]:
        """Every layer that the file names, each once. Raises ValueError."""
        probe = self.probe
        rules = probe.profile if probe.profile in ENGINES else None
        models = [shapes.preset_layers(name, probe.tp) for name in probe.presets]
        models += [shapes.config_layers(path, probe.tp) for path in probe.model_configs]
        models += [_checkpoint(given, probe.tp, rules) for given in probe.checkpoints]
        # A model that is FP4 in its routed experts alone has no linear layer to name.
        dense = [model for model in models if model.probed or not experts_on_rank(model)]
        return shapes.asked(dense, probe.shapes)

    def experts(self) -> tuple[RoutedLayer, ...]:
        """Every layer of routed experts that the file names or a model of it has, each once, in the
        formats asked for. Raises ValueError."""
        probe = self.probe
        rules = probe.profile if probe.profile in ENGINES else None
        split = split_of_experts(probe.tp, probe.ep)
        models = [shapes.preset_layers(name, split) for name in probe.presets]
        models += [shapes.config_layers(path, split) for path in probe.model_configs]
        models += [_checkpoint(given, split, rules) for given in probe.checkpoints]
        found = []
        for text in probe.experts:
            row = experts_row(text)
            found += [RoutedLayer.of(format_, row) for format_ in probe.formats or ("nvfp4",)]
        for model in models:
            for each in experts_on_rank(model, probe.ep):
                if not probe.formats or each.format in probe.formats:
                    found.append(RoutedLayer.of(each.format, each.row))
        return tuple(dict.fromkeys(found))


@lru_cache
def _checkpoint(given: str, tp: int, rules: str | None) -> CheckpointLayers:
    """The layers of a checkpoint, read once until the configuration is read again: it has the
    headers of hundreds of files, and may lie on a disk far away."""
    return shapes.checkpoint_layers(given, tp, rules)


def place(given: Path | None) -> Path | None:
    """The file to read: the one given, FP4TUNE_CONFIG's, the system's where there is one."""
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        return named
    return Path(SYSTEM) if os.path.exists(SYSTEM) else None


def load(path: Path | None) -> DaemonConfig:
    """The configuration in `path`, or the defaults for None.

    Raises Refused with one sentence per mistake, a line each.
    """
    config = DaemonConfig()
    mistakes: list[str] = []
    _checkpoint.cache_clear()
    if path is not None:
        document = _toml_document(path)
        try:
            config = TypeAdapter(DaemonConfig).validate_python(document)
        except ValidationError as error:
            try:
                mistakes = _sentences(error, document)
            except RecursionError:
                raise Refused(f"{path}: {_TOO_DEEP}") from None
    if not mistakes:
        mistakes = list(_beyond(config))
    if mistakes:
        raise Refused("\n".join(f"{path or 'the defaults'}: {mistake}" for mistake in mistakes))
    return config


_TOO_DEEP = "this is no configuration: it is nested too deeply"


def _toml_document(path: Path) -> dict[str, Any]:
    """The TOML in `path`. Raises Refused."""
    try:
        return tomllib.loads(files.text(path, _MOST))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: this is not TOML: {error}") from None
    except RecursionError:
        raise Refused(f"{path}: {_TOO_DEEP}") from None


def _sentences(error: ValidationError, document: Mapping[str, Any]) -> list[str]:
    """One sentence per mistaken key, in the order of the file."""
    found: dict[tuple[str, ...], str] = {}
    for detail in error.errors():
        # Places inside a list or of one of two types are those of the key that holds them.
        where = []
        value: Any = document
        for part in detail["loc"]:
            if not isinstance(value, Mapping) or part not in value:
                break
            where.append(str(part))
            value = value[part]
        found.setdefault(
            tuple(where), f"{'.'.join(where)}: {_mistake_in_words(detail, where, value)}"
        )
    order = {key: index for index, key in enumerate(_key_paths(document, ()))}
    return [found[key] for key in sorted(found, key=lambda key: order.get(key, -1))]


def _key_paths(table: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from _key_paths(value, (*above, key))


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
}


def _mistake_in_words(detail: ErrorDetails, where: list[str], value: Any) -> str:
    """One of pydantic's mistakes in a sentence that says what, and what to write instead."""
    kind, more = detail["type"], detail.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"there is no such key; there are {', '.join(_siblings(where[:-1]))}"
    if kind.startswith("dataclass"):
        return f"it is a table, [{'.'.join(where)}]"
    if kind == "literal_error":
        allowed = str(more["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{detail['input']!r} is not one of {allowed}"
    if kind == "greater_than":
        return f"it must be more than {more['gt']:g}, not {value:g}"
    if kind == "greater_than_equal":
        return f"it must be at least {more['ge']:g}, not {value:g}"
    if kind == "finite_number":
        return "it must be finite"
    if kind == "value_error":
        return str(more["error"])
    return f"it is {_KINDS.get(kind, detail['msg'])}, not {value!r}"


def _siblings(table: list[str]) -> list[str]:
    """The keys there are in a table of the file."""
    kind: Any = DaemonConfig()
    for name in table:
        kind = getattr(kind, name)
    return [one.name for one in fields(kind)]


def _beyond(config: DaemonConfig) -> Iterator[str]:
    """Mistakes that show only when what is named is looked up."""
    if "\0" in (config.state or ""):
        yield "state: a path has no NUL in it"
    try:
        layers, experts = config.layers(), config.experts()
        if layers and not experts and not any(map(config.probe.kinds, layers)):
            first = layers[0]
            yield (
                f"probe: nothing is left of its layers: {first.name} is {first.format} with "
                f"{first.activation} activations, which formats and activations leave out"
            )
    except (ValueError, OSError) as error:
        yield f"probe: {error}"
    if config.http.token_file is not None:
        try:
            token(config.http.token_file)
        except Refused as error:
            yield f"http.token_file: {error}"


def token(path: str) -> str:
    """The token in that file. Raises Refused where it is too short, or everyone may read it."""
    try:
        with files.opened(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: {getattr(error, 'strerror', None) or 'it is not ASCII'}") from None
    if mode & 0o004:
        raise Refused(f"{path}: everyone may read it; chmod o-r it")
    if len(text) < 16 or any(c.isspace() for c in text):
        raise Refused(f"{path}: a token is one word of at least 16 characters")
    return text
