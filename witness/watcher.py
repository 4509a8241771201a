"""One process's witness: which weights are watched, which calls, and what came of them.

`WatchedWeight`s are added as weights load; `see` stands behind each of their GEMMs; a thread reads
the devices once a second, judges what was suspicious, and hands on what it finds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import printable
from ..probes.problem import Problem
from . import here, launch
from .calls import Unreadable, fitted, with_whole_factor
from .confirm import CLEARED, FAULT, NOT_AS_LOADED, SUSPECTED, Confirmation, confirm
from .counts import COUNTED, MOST_LEFT, WatchedLayer, WatchReport, merged
from .launch import Bench, CallSite
from .limits import Limit, limit
from .plan import EVERY, FEW, PERIOD, WatchPlan
from .ring import Record, RingReader, RowEvidence, evidence
from .rows import WatchedCall, one_on
from .sources import HeldWeight, SourceGone, Weight, WeightSource, agrees, host_copy
from .vectors import Sums, agree_all, draw_signs, remake, sums_of

MOST_SITES = 4096
SLOTS = 32
LONGEST_ROW = 32768
"""The largest k that a record's evidence holds."""
_STOP = 5.0


@dataclass(frozen=True, slots=True)
class WitnessOptions:
    """How a process watches.

    share      ``few`` calls, or ``every``
    seconds    between two looks of the host at the devices
    redraw     seconds between two weights whose signs are drawn anew; 0 for never
    host_copies  whether a packed copy of each weight may be kept on the host
    turn       where to begin: with several processes of an engine, its rank
    """

    share: str = FEW
    seconds: float = 1.0
    redraw: float = 30.0
    host_copies: bool = False
    turn: int = 0

    @property
    def period(self) -> int:
        return 1 if self.share == EVERY else PERIOD


@dataclass(frozen=True, slots=True)
class WatchSubject:
    """What is watched: a layer, and who computes it.

    activation  as `Problem` has it: ``bf16`` for W4A16, ``fp4`` for W4A4
    width       of the accumulator in bits, as a probe measured it; None: not known
    accumulation  relative error of a row's group by accumulation, as a probe measured it
    """

    layer: str
    backend: str
    problem: Problem
    tactic: str = "default"
    width: int | None = None
    accumulation: float | None = None


@dataclass(slots=True)
class WatchedWeight:
    """One weight under the witness."""

    number: int
    subject: WatchSubject
    sums: Sums
    limit: Limit
    source: WeightSource | None
    eager: int
    """The site of its calls outside of graphs."""
    bias: torch.Tensor | None = None
    """What is added where a call has a bias, as it was loaded or as the first call had it."""
    held: HeldWeight | None = None
    """What signs may be drawn anew from where there is no source."""
    biased: bool = False
    """Whether `bias` is as it was loaded: what its backend prepared of it may lie in another order.
    """
    remaking: bool = False
    drawn: int = 1
    prepared: weakref.ref[torch.Tensor] | None = None
    """What the backend made of it, and with `stamp` whether it is still that."""
    stamp: int | None = None


@dataclass(slots=True)
class _Site:
    weight: WatchedWeight
    graph: bool
    m_lo: int
    m_hi: int
    judged: dict[str, int] = field(default_factory=lambda: {FAULT: 0, CLEARED: 0, SUSPECTED: 0})
    biased: set[bool] = field(default_factory=set)
    """Whether its calls have a bias: both, where some have."""


Handler = Callable[[WatchSubject, Record, Confirmation], None]
"""What is told of each suspicion that was judged, from the witness's own thread."""


@dataclass(frozen=True, slots=True)
class WatchDevice:
    """What a process computes on: the GPU's name, its architecture, its UUID."""

    gpu: str
    arch: str
    uuid: str


class DeviceWitness:
    """The benches of one device, and the weights watched there."""

    def __init__(self, device: torch.device) -> None:
        slot_bytes = launch.evidence_bytes(LONGEST_ROW, 1024)
        self.bench: Bench = launch.bench(device, MOST_SITES, SLOTS, slot_bytes)
        self.reader = RingReader(self.bench)
        self.sites: list[_Site] = []
        self.counters: torch.Tensor = torch.zeros(0, launch.WIDE, dtype=torch.int64)

    def site(self, weight: WatchedWeight, graph: bool, m: int) -> int | None:
        """A site of its own; None where there is none left."""
        if len(self.sites) == MOST_SITES - 1:  # the last is for `launch.warm`
            return None
        self.sites.append(_Site(weight, graph, m, m))
        return len(self.sites) - 1


class Witness:
    """All that one process watches. Its methods may be called from any thread."""

    def __init__(self, options: WitnessOptions, handle: Handler) -> None:
        self.options = options
        self.plan: WatchPlan[tuple[int, int, bool]] = WatchPlan(options.share, options.turn)
        self.weights: list[WatchedWeight] = []
        self.started = time.time()
        self.after: Callable[[], object] | None = None
        """What is called behind each look of the thread."""
        self.left_alone: dict[str, str] = {}
        """Layer to why it is not watched."""
        self._handle = handle
        self._devices: dict[torch.device, DeviceWitness] = {}
        self._lock = threading.RLock()
        self._looking = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._redrawn = time.monotonic()
        self._next = 0

    # -- weights

    def add(
        self,
        subject: WatchSubject,
        weights: Sequence[Weight],
        source: WeightSource | None = None,
        bias: torch.Tensor | None = None,
    ) -> WatchedWeight:
        """Watch a weight (one per expert), from before its backend prepares it.

        `source` counts only where it agrees with `weights`. `bias` (n,) is what is added where a
        call has a bias; without it, what the call says. Raises Unreadable.
        """
        problem = subject.problem
        if problem.k > LONGEST_ROW:
            raise Unreadable(f"k={problem.k} is more than the {LONGEST_ROW} of a record")
        try:
            sums = sums_of(weights, draw_signs(problem.n))
        except ValueError as error:
            raise Unreadable(str(error)) from None
        if not sums.finite:
            raise Unreadable("the weight holds numbers that are not finite")
        if source is not None and not agrees(source, weights):
            source = None
        if source is None and self.options.host_copies:
            source = host_copy(weights)
        allowed = limit(problem.out_dtype, sums.groups.width, problem.k, subject.accumulation)
        with self._lock:
            device = self._device(sums.signs.device)
            made = WatchedWeight(len(self.weights), subject, sums, allowed, source, -1)
            eager = device.site(made, False, 0)
            if eager is None:
                raise Unreadable("more weights than the witness has counters for")
            made.eager = eager
            made.bias, made.biased = bias, bias is not None
            self.weights.append(made)
            self.plan.layers = len(self.weights)
        if sums.signs.is_cuda:
            with torch.cuda.device(sums.signs.device):
                launch.warm(sums, allowed, problem, device.bench, bias is not None)
        return made

    def hold(self, weight: WatchedWeight, prepared: torch.Tensor) -> None:
        """Remember what a backend made of a weight: once that has changed (an engine that loads
        other weights into the same memory), nothing is confirmed any more."""
        weight.prepared, weight.stamp = weakref.ref(prepared), stamp_of(prepared)

    def redraw_from(self, weight: WatchedWeight, layer: torch.Tensor) -> None:
        """Signs may be drawn anew from `layer`, the weight (n, k) as its layer holds it, as long as
        that is what was loaded."""
        weight.held = HeldWeight(weakref.ref(layer))

    def _changed(self, weight: WatchedWeight) -> str | None:
        """Why a weight is not the one that was loaded any more; None where it is."""
        if weight.prepared is None:
            return None
        now = weight.prepared()
        if now is None:
            return "the weight is gone"
        with self._devices[weight.sums.signs.device].reader.quietly():
            return None if stamp_of(now) == weight.stamp else "the weight has changed since"

    def leave(self, layer: str, why: str) -> bool:
        """Note that a layer is not watched; whether that is news."""
        with self._lock:
            news = layer not in self.left_alone
            self.left_alone[layer] = why
        return news

    def _device(self, device: torch.device) -> DeviceWitness:
        if device not in self._devices:
            self._devices[device] = DeviceWitness(device)
            one_on(device)  # made before anything is captured, and imported before it, too
            if device.type == "cuda":
                from ..probes.regimes.pdl import edges  # noqa: F401
        return self._devices[device]

    # -- calls

    def see(self, weight: WatchedWeight, call: WatchedCall) -> bool:
        """Check `call` of `weight`, or leave it, as the plan has it; whether it is watched.

        On a GPU this enqueues one kernel on the current stream at most, also into a graph. Raises
        Unreadable for a call that is not one of this weight.
        """
        if call.y.device != weight.sums.signs.device:
            raise Unreadable(f"it was on {weight.sums.signs.device}, and is on {call.y.device} now")
        if call.y.is_cuda and torch.cuda.current_device() != call.y.device.index:
            # Kernels are launched on the current device's current stream, which is not this call's.
            with torch.cuda.device(call.y.device):
                return self.see(weight, call)
        device = self._devices[weight.sums.signs.device]
        m = call.y.shape[0]
        if not m:
            return False
        capturing = call.y.is_cuda and torch.cuda.is_current_stream_capturing()
        with self._lock:
            bucket = 1 << max(0, m - 1).bit_length()
            graph = _capture_number(call.y.device) if capturing else None
            if not self.plan.choose((weight.number, bucket, capturing), graph):
                return False
            call = fitted(call, weight.sums, weight.subject.problem)
            index = device.site(weight, True, m) if capturing else None
            site = index if index is not None else weight.eager
            own = device.sites[site]
            own.m_lo, own.m_hi = min(own.m_lo or m, m), max(own.m_hi, m)
            own.biased.add(call.bias is not None)
        if call.bias is not None and weight.biased:
            call = replace(call, bias=weight.bias)
        elif call.bias is not None and weight.bias is None and _stays(call.bias, capturing):
            weight.bias = call.bias.detach()
        # Outside of graphs the plan decides, call by call; in them the device, replay by replay.
        place = CallSite(site, site, self.options.period if index is not None else 1)
        call = with_whole_factor(call)
        if call.y.is_cuda:
            launch.launch(call, weight.sums, weight.limit, device.bench, place)
        else:
            here.look(call, weight.sums, weight.limit, device.bench, place)
        return True

    # -- looking

    def start(self) -> None:
        """Look once in `seconds`, in a thread of its own. A second call does nothing."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._wake.clear()
                self._thread = threading.Thread(
                    target=self._run, name="fp4tune witness", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Look once more, and end the thread."""
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP)
            if thread.is_alive():
                return  # it waits for a device that is gone; this thread need not, too
        self._thread = None
        self.look()

    def _run(self) -> None:
        while not self._wake.wait(self.options.seconds):
            # Whatever goes wrong here must not end what looks.
            with contextlib.suppress(Exception):
                self.look()
            with contextlib.suppress(Exception):
                if self.after is not None:
                    self.after()
            with contextlib.suppress(Exception):
                self._redraw()

    def look(self) -> list[Confirmation]:
        """Read every device once, and judge what came; what became of each suspicion."""
        found = []
        with self._looking:
            for device in list(self._devices.values()):
                device.counters = device.reader.counters().clone()
                for record in device.reader.records():
                    site = device.sites[record.site]
                    judged = self._judged(site, record)
                    site.judged[judged.status] += 1
                    found.append(judged)
                    # Whom it is told may fail; what was found is counted, and the others are told.
                    with contextlib.suppress(Exception):
                        self._handle(site.weight.subject, record, judged)
        return found

    def _judged(self, site: _Site, record: Record) -> Confirmation:
        try:
            return self._judge(site, record)
        except Exception as error:
            return Confirmation(SUSPECTED, f"it cannot be judged: {type(error).__name__}: {error}")

    def _judge(self, site: _Site, record: Record) -> Confirmation:
        weight = site.weight
        problem = weight.subject.problem
        kind = problem.format if problem.activation == "fp4" else "bf16"
        groups, subject = weight.sums.groups, weight.subject
        seen = evidence(record, kind, problem.dtype, groups, problem.k)
        changed = self._changed(weight)
        if changed is None:
            with self._devices[weight.sums.signs.device].reader.quietly():
                return self._confirmed(site, record, seen)
        self.leave(subject.layer, changed)
        return Confirmation(SUSPECTED, changed)

    @staticmethod
    def _confirmed(site: _Site, record: Record, seen: RowEvidence) -> Confirmation:
        """What the evidence says, with the bias where this site's calls have one; of a site whose
        calls have it now and then, what clears it counts."""
        weight = site.weight
        judged = None
        for biased in sorted(site.biased):
            if biased and weight.bias is None:
                return Confirmation(SUSPECTED, "its bias is not at hand")
            bias = weight.bias.cpu() if biased and weight.bias is not None else None
            width = weight.subject.width
            judged = confirm(record, seen, weight.source, weight.sums, width, bias)
            if judged.status != FAULT:
                break
        assert judged is not None
        return judged

    # -- drawing anew

    def _redraw(self) -> None:
        """Draw one weight's signs anew: closed at one look, made and opened at the next, so that
        no kernel is between the two."""
        wanted = self.options.redraw
        for weight in self.weights:
            if weight.remaking:
                weight.remaking = False
                self.redraw(weight)
                return
        if wanted <= 0 or time.monotonic() - self._redrawn < wanted or not self.weights:
            return
        self._redrawn = time.monotonic()
        self._next = (self._next + 1) % len(self.weights)
        weight = self.weights[self._next]
        if weight.source is not None or weight.held is not None:
            with self._devices[weight.sums.signs.device].reader.quietly():
                weight.sums.gate.zero_()
            weight.remaking = True

    def redraw(self, weight: WatchedWeight) -> None:
        """Fresh signs for a weight that can be had again as it was loaded; its check is closed
        meanwhile.

        Kernels that began before must be done: on a GPU a second after it was closed."""
        source = weight.source or weight.held
        assert source is not None
        whole = slice(0, weight.sums.groups.n)
        with self._devices[weight.sums.signs.device].reader.quietly():
            weight.sums.gate.zero_()
            try:
                raw = [source.rows(e, whole) for e in range(weight.sums.experts)]
                if not agree_all(weight.sums, raw):
                    raise SourceGone(NOT_AS_LOADED)
                remake(weight.sums, raw)
                weight.drawn += 1
            except SourceGone:
                weight.source = weight.held = None
            except Exception as error:  # before anything was written: see `remake`
                weight.source = weight.held = None
                self.leave(weight.subject.layer, f"no fresh signs: {type(error).__name__}")
            weight.sums.gate.fill_(1)

    # -- saying

    @property
    def devices(self) -> list[torch.device]:
        """What weights are watched on, in order of their coming."""
        return list(self._devices)

    def layers(self) -> tuple[WatchedLayer, ...]:
        """What was counted, by backend, tactic and shape."""
        found = []
        for device in list(self._devices.values()):
            for index, site in enumerate(device.sites):
                if index >= device.counters.shape[0]:
                    break
                found.append(_site_counts(site, device.counters[index].tolist()))
        return merged(found)

    def report(self, faults: Sequence[Mapping[str, Any]], device: WatchDevice) -> WatchReport:
        """This process's report."""
        with self._lock:
            unwatched = len(self.plan.unwatched())
        return WatchReport(
            pid=os.getpid(),
            started=self.started,
            at=time.time(),
            watched=self.layers(),
            faults=tuple(faults),
            unwatched=unwatched,
            left=tuple(printable(each, 200) for each in self.unwatched()[-MOST_LEFT:]),
            gpu=device.gpu,
            arch=device.arch,
            uuid=device.uuid,
        )

    def unwatched(self) -> list[str]:
        """What is watched nowhere in this process: layers and m, and layers that are left alone."""
        with self._lock:
            calls, left = self.plan.unwatched(), sorted(self.left_alone.items())
        found = []
        for number, m, captured in calls:
            where = " in graphs" if captured else ""
            found.append(f"{self.weights[number].subject.layer} up to m={m}{where}")
        return found + [f"{layer}: {why}" for layer, why in left]


def _stays(bias: torch.Tensor, capturing: bool) -> bool:
    """Whether it is what it is when a record of this call is read: what a graph makes is not."""
    return not capturing or isinstance(bias, torch.nn.Parameter)


def _capture_number(device: torch.device) -> int | None:
    """Of the capture that the current stream is part of; None where the driver does not tell."""
    from ..probes.regimes.pdl import edges  # imported by `_device`, before anything is captured

    try:
        return edges.capture_number(torch.cuda.current_stream(device).cuda_stream)
    except Exception:  # a driver's or a torch's that is otherwise: all graphs are one then
        return None


_SAMPLE = 4096


def stamp_of(tensor: torch.Tensor) -> int | None:
    """A sum over a sample of a tensor's bytes, and where it lies: another where other values were
    loaded. Waits for the device. None for a tensor that cannot be read so."""
    try:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        part = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.int64)
        weights = torch.arange(1, part.numel() + 1, device=part.device)
        return int((part * weights).sum()) ^ (tensor.data_ptr() << 8)
    except RuntimeError:
        return None


def _site_counts(site: _Site, counters: list[int]) -> WatchedLayer:
    subject = site.weight.subject
    p = subject.problem
    named = dict(zip(launch.COUNTERS, counters, strict=False))
    counts = dict.fromkeys(COUNTED, 0)
    for name in ("rows", "skipped", "suspicions", "beyond"):
        counts[name] = named[name]
    counts["launches"] = named["ticks"]
    counts["faults"] = site.judged[FAULT]
    counts["cleared"] = site.judged[CLEARED]
    counts["suspected"] = site.judged[SUSPECTED]
    backend, tactic = (printable(name, 200) for name in (subject.backend, subject.tactic))
    return WatchedLayer(
        backend, tactic, p.format, p.activation, p.out_dtype, p.groups, p.n, p.k,
        site.m_lo, site.m_hi, int(not site.graph), counts,
    )  # fmt: skip
