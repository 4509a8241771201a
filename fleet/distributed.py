"""One probe per GPU on every node of a Ray cluster, their bundles streaming into a fleet store.

Every task has a time limit of its own, kept on its node, and a longer one, kept here: a node that
hangs as a whole cannot be asked. A task that is done leaves a note in the store, so that a second
run with the same campaign does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import state
from ..cache.errors import StateError
from ..errors import Refused
from ..machine.processes import dying_with_parent
from . import bundle, export, merge
from .extras import need
from .places import Place

NOTES = "probed"
GRACE = 30.0
"""Seconds beyond its limit that a task may take to say so, before it is given up from here."""
TASK = "FP4TUNE_FLEET_TASK"
"""Set for the probe of a task: ``<node>/<gpu>``."""
_SAID = 400

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One GPU of one Ray node. `shared`: other Ray nodes are on the same machine."""

    node: str
    ray_id: str
    gpu: int
    shared: bool

    @property
    def name(self) -> str:
        return f"{self.node}/{self.gpu}"


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for: the arguments of ``fp4tune probe``, the seconds that each task has and is
    waited for beyond them, and by what name to resume; by default one made of the arguments."""

    arguments: tuple[str, ...] = ()
    limit: float = 3600.0
    grace: float = GRACE
    campaign: str | None = None

    @property
    def name(self) -> str:
        return self.campaign or campaign_of(self.arguments)


@dataclass(slots=True)
class Campaign:
    """What became of every GPU: done now, done before, or why not."""

    store: str
    campaign: str
    done: list[dict[str, Any]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def campaign_of(arguments: Sequence[str]) -> str:
    """A name for probes with these arguments, where none is given."""
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:12]


def tasks(nodes: Sequence[Mapping[str, Any]]) -> list[Task]:
    """A task for each GPU of the living nodes, as ``ray.nodes()`` tells of them."""
    alive = [n for n in nodes if n["Alive"] and n["Resources"].get("GPU", 0) >= 1]
    hosts = [n["NodeManagerHostname"] for n in alive]
    names = [n.get("NodeName") or n["NodeManagerHostname"] for n in alive]
    found = []
    for node, host, name in zip(alive, hosts, names, strict=True):
        # Two nodes of one name cannot be told apart in a later run, but they can in this one.
        own = name if names.count(name) == 1 else f"{name}-{node['NodeID'][:8]}"
        for gpu in range(int(node["Resources"]["GPU"])):
            found.append(Task(own, node["NodeID"], gpu, hosts.count(host) > 1))
    return sorted(found, key=lambda t: (t.node, t.gpu))


def probe_here(name: str, shared: bool, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Probe this worker's GPU in a process of its own and return the bundle.

    `status` is ``done``, ``hung`` or ``failed``; ``data`` the bundle where there is one: what was
    found before it hung or failed counts, too.
    """
    # Worker processes of Ray see their own GPU only, by CUDA_VISIBLE_DEVICES.
    with tempfile.TemporaryDirectory(prefix="fp4tune-fleet-") as folder:
        where = Path(folder)
        command = [sys.executable, "-m", "fp4tune.cli", "probe", *arguments, "--state", folder]
        process = subprocess.Popen(
            command,
            env={**os.environ, TASK: name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # A Ray worker that is killed takes its probe with it.
            preexec_fn=dying_with_parent(),
        )
        status, reason = "done", ""
        try:
            _, said = process.communicate(timeout=limit)
            # 1 says that something is unsafe: that is a result, and a probe that went well.
            if process.returncode not in (0, 1):
                lines = said.decode(errors="replace").strip().splitlines() or ["no message"]
                status, reason = "failed", lines[-1][-_SAID:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            status, reason = "hung", f"not done after {limit:g} s"
        try:
            rows = export.rows_of(where).rows
        except StateError as error:
            return {"status": status, "reason": reason or str(error), "data": None}
        if not rows["evidence"]:
            return {"status": status, "reason": reason, "data": None}
        _, data = bundle.pack(rows, _node_id(name, shared), round(time.time(), 3))
        return {"status": status, "reason": reason, "data": data}


def _node_id(name: str, shared: bool) -> str:
    """The machine's own node id; with several Ray nodes on it, one derived from that for each."""
    own = export.node_id(state.directory())
    if not shared:
        return own
    return hashlib.sha256(f"{own}/{name.rpartition('/')[0]}".encode()).hexdigest()[:32]


def probe(
    into: str, order: Order, address: str | None = None, say: Say = lambda line: None
) -> Campaign:
    """Probe every GPU of the cluster that this campaign has not probed yet.

    Raises Refused where there is no cluster or it has no GPU, ValueError for a limit that is none.
    """
    if not order.limit > 0:
        raise ValueError(f"--limit {order.limit:g}: it must be more than 0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = need("ray", "ray")
    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refused(f"no Ray cluster answers at {address or 'auto'}: {first}") from None
    place = Place(into)
    merge.prepare(place)
    result = Campaign(into, order.name)
    found = tasks(ray.nodes())
    if not found:
        raise Refused("no living node of this Ray cluster has a GPU")
    have = set(place.names(NOTES, _folder(order.name)))
    result.before = [t.name for t in found if _note(t) in have]
    start = time.monotonic()
    _run_tasks(ray, [t for t in found if _note(t) not in have], place, order, result, say)
    result.seconds = round(time.monotonic() - start, 1)
    result.done.sort(key=lambda row: row["task"])
    result.failed.sort(key=lambda row: row["task"])
    return result


def _run_tasks(
    ray: Any, todo: Sequence[Task], place: Place, order: Order, result: Campaign, say: Say
) -> None:
    """Start all of them, and take what comes as it comes."""
    scheduling = need("ray.util.scheduling_strategies", "ray")
    remote = ray.remote(probe_here)
    waiting: dict[Any, Task] = {}
    for task in todo:
        pinned = scheduling.NodeAffinitySchedulingStrategy(task.ray_id, soft=False)
        started = remote.options(
            num_gpus=1, num_cpus=0, max_retries=0, scheduling_strategy=pinned
        ).remote(task.name, task.shared, list(order.arguments), order.limit)
        waiting[started] = task
    deadline = time.monotonic() + order.limit + order.grace
    while waiting:
        left = deadline - time.monotonic()
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, min(left, 5.0)))
        for reference in ready:
            task = waiting.pop(reference)
            _store_answer(task, _answer(ray, reference), place, result, say)
        if not ready and left <= 0:
            for reference, task in waiting.items():
                ray.cancel(reference, force=True)
                why = f"no answer within {order.limit + order.grace:g} s"
                _store_answer(
                    task, {"status": "hung", "reason": why, "data": None}, place, result, say
                )
            return


def _answer(ray: Any, reference: Any) -> dict[str, Any]:
    errors = ray.exceptions
    try:
        answer: dict[str, Any] = ray.get(reference)
        return answer
    except (
        errors.NodeDiedError,
        errors.TaskUnschedulableError,
        errors.WorkerCrashedError,
        errors.ObjectLostError,
        errors.RaySystemError,
    ) as error:
        return {"status": "died", "reason": _error_in_a_line(error), "data": None}
    except errors.RayError as error:
        return {"status": "failed", "reason": _error_in_a_line(error), "data": None}


def _error_in_a_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_SAID]


def _store_answer(
    task: Task, answer: Mapping[str, Any], place: Place, result: Campaign, say: Say
) -> None:
    """Put what a task brought into the store, and note it as done if it is."""
    status, reason, data = answer["status"], answer["reason"], answer["data"]
    identity = None
    if data is not None:
        try:
            identity = merge.add(data, place.url)
        except bundle.Refusal as refusal:
            status, reason = "refused", str(refusal)
    if status == "done" and identity is None:
        status, reason = "failed", reason or "it brought no evidence"
    row: dict[str, Any] = {"task": task.name, "bundle": identity}
    if status == "done":
        place.write(json.dumps(row).encode(), NOTES, _folder(result.campaign), _note(task))
        result.done.append(row)
    else:
        result.failed.append({**row, "status": status, "reason": reason})
    say(f"{task.name}: {status}{': ' + reason if reason else ''}")


def _folder(campaign: str) -> str:
    return hashlib.sha256(campaign.encode()).hexdigest()[:16]


def _note(task: Task) -> str:
    return hashlib.sha256(task.name.encode()).hexdigest()[:16] + ".json"
