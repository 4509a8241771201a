"""Where a checkpoint is: a folder, a file of it, or a model's name in the local Hugging Face cache.

Nothing is downloaded. The cache is where ``huggingface_hub`` puts it: ``HF_HUB_CACHE``, else
``HF_HOME/hub``, else ``~/.cache/huggingface/hub``; a model's files are those of the snapshot that
``refs/main`` names (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...machine import files

INDEX = "model.safetensors.index.json"
_MOST_REF = 1000
"""Bytes of the name of a revision."""
_MOST_INDEX = 1 << 28
_SHARD = re.compile(rb':\s*"([^"\\]*\.safetensors)"')
_OF = re.compile(r"([\w.-]+)-(\d{5,6})-of-(\d{5,6})\.safetensors$")
_MOST_FILES = 100_000
_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_OTHER_WEIGHTS = {
    ".gguf": "GGUF",
    ".bin": "pickle",
    ".pt": "pickle",
    ".pth": "pickle",
    ".ckpt": "pickle",
}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a checkpoint.

    `path` is what was named, found; `folder` holds it. `missing` are files that the `index` names
    and that are not here.
    `unindexed`: there are several files and no index. `instead` says what weights of another kind
    the folder holds, as the rest of a sentence.
    """

    path: Path
    folder: Path
    files: tuple[Path, ...] = ()
    missing: tuple[Path, ...] = ()
    index: Path | None = None
    unindexed: bool = False
    instead: str = ""

    def listed(self) -> Mapping[str, str]:
        """Where the index has each tensor; nothing without one. Raises ValueError."""
        return {} if self.index is None else _read_index(self.index)

    def count(self) -> int:
        """How many tensors the index names, without reading it through; none without one. Raises
        ValueError."""
        if self.index is None:
            return 0
        try:
            return _bytes(self.index).count(b'.safetensors"')
        except OSError as error:
            raise ValueError(f"{self.index} cannot be read: {error.strerror}") from None

    def beside(self, name: str) -> Path | None:
        """The file of that name in the folder, where there is one."""
        file = self.folder / name
        return file if file.is_file() else None


def find_files(given: str | Path) -> CheckpointFiles:
    """The checkpoint that `given` names. Raises ValueError, one sentence, where there is none."""
    if not str(given):
        raise ValueError("the checkpoint's name is empty: a folder, a file or a model is expected")
    path = Path(given)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return _by_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return _in_folder(_snapshot(str(given)))


def _by_file(path: Path) -> CheckpointFiles:
    if path.name.endswith(".index.json"):
        return _indexed(path, path)
    if path.suffix == ".safetensors":
        return CheckpointFiles(path, path.parent, (path,))
    if path.suffix == ".json":
        return _in_folder(path.parent, path)
    kind = _OTHER_WEIGHTS.get(path.suffix)
    if kind is None:
        raise ValueError(f"{path} is no checkpoint: neither safetensors nor a config.json")
    raise ValueError(f"{path} is a {kind} file: only safetensors files are read")


def _in_folder(folder: Path, path: Path | None = None) -> CheckpointFiles:
    path = path or folder
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX, path)
    files = sorted(folder.glob("*.safetensors"))
    # Mistral's own form of the weights lies beside the one that engines load by default.
    usual = [file for file in files if not file.name.startswith("consolidated")]
    others = sorted(folder.glob("*.safetensors.index.json"))
    if len(others) == 1 and len(usual) != 1:
        return _indexed(others[0], path)
    files = usual or files
    kinds = {_OTHER_WEIGHTS[f.suffix] for f in folder.iterdir() if f.suffix in _OTHER_WEIGHTS}
    instead = f": its weights are {' and '.join(sorted(kinds))} files" if kinds else ""
    return CheckpointFiles(
        path, folder, tuple(files), unindexed=len(files) > 1, instead="" if files else instead
    )


def _numbered_files(index: Path) -> list[Path]:
    """The files of a checkpoint that are numbered and say how many they are; empty otherwise."""
    here = [found for file in index.parent.glob("*.safetensors") if (found := _OF.match(file.name))]
    stems = {(found.group(1), found.group(3)) for found in here}
    if len(stems) != 1 or index.name != f"{here[0].group(1)}.safetensors.index.json":
        return []
    ((stem, count),) = stems
    if not 0 < int(count) <= _MOST_FILES:
        return []
    names = (f"{stem}-{i:0{len(count)}}-of-{count}" for i in range(1, int(count) + 1))
    return [index.parent / f"{name}.safetensors" for name in names]


def _indexed(index: Path, path: Path) -> CheckpointFiles:
    files = _numbered_files(index) or _named_files(index)
    here = [file.is_file() for file in files]
    return CheckpointFiles(
        path,
        index.parent,
        tuple(file for file, there in zip(files, here, strict=True) if there),
        tuple(file for file, there in zip(files, here, strict=True) if not there),
        index,
    )


def _named_files(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        if index.stat().st_size > _MOST_INDEX:
            raise ValueError(f"{index} is too large for an index")
        # An index names each of hundreds of thousands of tensors: the files alone are looked for.
        names = {name.decode() for name in _SHARD.findall(_bytes(index))}
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        names = set()
    shards = sorted(names or set(_read_index(index).values()))
    for shard in shards:
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\0" in shard:
            raise ValueError(f"{index} names {shard[:80]!r}, which is no file beside it")
    return [index.parent / shard for shard in shards]


def _bytes(index: Path) -> bytes:
    return files.whole(index, _MOST_INDEX, links=True)


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = msgspec.json.decode(_bytes(index), type=_Index).weight_map
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        listed = {}
    if not listed:
        raise ValueError(f"{index} is no index of safetensors files")
    return listed


def _snapshot(name: str) -> Path:
    """The snapshot of the model `name` in the local cache."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"there is no checkpoint {name}")
    hub = _hub()
    place = hub / ("models--" + name.replace("/", "--"))
    snapshots = place / "snapshots"
    if not snapshots.is_dir():
        raise ValueError(
            f"there is no checkpoint {name}: no such file or folder, and no model of that name in "
            f"{hub}; nothing is downloaded"
        )
    found = sorted(p for p in snapshots.iterdir() if p.is_dir())
    try:
        main = files.text(place / "refs" / "main", _MOST_REF).strip()
    except (OSError, UnicodeDecodeError):
        main = found[0].name if len(found) == 1 else ""
    for each in found:
        if each.name == main:
            return each
    raise ValueError(f"{place} has no whole snapshot of its main revision; nothing is downloaded")


def _hub() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"
