"""The environment that a backend's evidence holds for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache import fingerprint
from ..cache.rows import Environment
from ..machine import codedigest
from ..probes.worker.supervisor import WorkerFailed
from .runner import Runner


def environment_of(runner: Runner) -> Environment:
    """The fingerprint of what this backend's evidence depends on, as its worker sees it.

    Raises WorkerFailed.
    """
    files = [Path(name) for name in runner.ask("files")]
    try:
        return _environment_of_files(runner, files)
    except OSError as error:
        # What a backend named, and is not there: a cache that was cleared meanwhile, say.
        raise WorkerFailed("error", f"{error.filename}: {error.strerror}", "files") from error


def _environment_of_files(runner: Runner, files: Sequence[Path]) -> Environment:
    hello, target = runner.hello, runner.target
    hardware = fingerprint.hardware(target.uuid)
    on = fingerprint.Dependencies(
        device={**_lasting_facts(hello["device"]), **hardware},
        backend=runner.name,
        distributions={**hello["versions"], "python": hello["python"]},
        files=files,
        variables=dict(os.environ),
        code=codedigest.combined(files, codedigest.compiler(target.device.sm, hardware)),
        extra=fingerprint.source(hello["source"]),
        arch=target.device.arch,
    )
    found = fingerprint.environment(on)
    # A reader cannot ask for versions, but it can see that a distribution was replaced.
    installed = tuple(fingerprint.stamp(path) for path in (*hello["metadata"], *hello["source"]))
    return replace(found, stamps=found.stamps + installed)


def _lasting_facts(device: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same from one probe to the next; free memory does not."""
    return {key: value for key, value in device.items() if key != "free"}
