"""What a kernel can do before, beside and after its wait: every path of its control flow.

A wait covers what comes after it on the same path. A kernel is `idle` where nothing comes after.
A *doubt* is raised for a store before the wait, for a path on which a whole block never waits,
and for a thread that stores while others wait for it. Kernels of specialised warps, in which one
warp waits and wakes the others through barriers, raise none: their paths part by thread, and the
warps that never wait reach a barrier before they store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .origins import THREAD, early_operands, predicate_origins
from .parameters import Parameters
from .sass import (
    ACCESS_BEFORE_WAIT,
    ACCESSES,
    NO_WAIT,
    STORES,
    SYNCS,
    WAIT_PRESENT,
    CodeSection,
    Node,
    SassKernel,
    sections,
)


def kernels(
    text: Iterable[bytes], parameters: Mapping[str, Parameters] | None = None
) -> Iterator[SassKernel]:
    """The kernels of one cubin from ``nvdisasm -c`` output, in pieces of any size.

    parameters: where each kernel's parameters stand in its constant bank, as far as known.
    """
    known = parameters or {}
    shared: dict[bytes, CodeSection] = {}
    waiting: list[CodeSection] = []
    for section in sections(text):
        if not section.entries:
            shared[section.name] = section
        elif any(t not in section.labels for n in section.nodes for t in _called(n)):
            waiting.append(section)  # it calls functions that may come later
        else:
            yield _kernel_of_section(section, {}, known)
    for section in waiting:
        yield _kernel_of_section(section, shared, known)


def _called(node: Node) -> tuple[bytes, ...]:
    return node.targets if node.op == b"CALL" else ()


@dataclass(slots=True)
class _Effect:
    """What a function may do before it waits."""

    access: str | None = None
    access_at: int | None = None
    stores: bool = False
    returns: bool = False
    waits: bool = False
    unfollowed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Walker:
    """The functions of one kernel, each followed once from each place it is entered at."""

    shared: Mapping[bytes, CodeSection]
    done: dict[tuple[bytes, int], _Effect] = field(default_factory=dict)


def _kernel_of_section(
    section: CodeSection, shared: Mapping[bytes, CodeSection], known: Mapping[str, Parameters]
) -> SassKernel:
    walker = _Walker(shared)
    entry = section.labels.get(section.name, 0)
    effect = _walk(section, entry, walker)
    names = {key[0] for key in walker.done}
    waits = section.waits + sum(shared[name].waits for name in names if name in shared)
    name = section.name.decode(errors="replace")
    if not (effect.waits or (waits and effect.unfollowed)):
        wait = NO_WAIT
    else:
        wait = ACCESS_BEFORE_WAIT if effect.access else WAIT_PRESENT
    idle = False
    doubts: tuple[str, ...] = ()
    if effect.waits:
        paths = _Paths(section, walker)
        idle = bool(effect.access) and not effect.unfollowed and paths.nothing_follows(entry)
        if not idle:
            doubts = tuple(_doubts(section, paths, entry, known.get(name)))
    return SassKernel(
        name,
        wait,
        waits,
        section.triggers,
        dict(sorted(section.mma.items())),
        section.block_scaled,
        effect.access,
        tuple(sorted(effect.unfollowed)),
        idle,
        doubts,
    )


# --- up to the first wait ------------------------------------------------------------------


def _walk(section: CodeSection, start: int, walker: _Walker) -> _Effect:
    """Follow every path from node `start` up to its first wait."""
    key = (section.name, start)
    if key in walker.done:
        return walker.done[key]
    effect = walker.done[key] = _Effect()  # a recursive call adds nothing
    nodes = section.nodes
    todo, seen = [start], {start}
    while todo:
        index = todo.pop()
        if index >= len(nodes):
            continue
        node = nodes[index]
        after = True
        if node.op == b"ACQBULK":
            effect.waits = True
            after = not node.always
        elif node.op in ACCESSES:
            _accessed(effect, f"{node.at:#06x} {node.text.decode(errors='replace')}", node.at)
            effect.stores |= node.op in STORES
        elif node.op == b"RET":
            effect.returns = True
        elif node.op == b"CALL":
            after = _add_callee(section, node, effect, walker) or not node.always
        elif not node.targets and _jumps(node):
            effect.unfollowed.add(f"{node.at:#06x} {node.op.decode()}")
        if after:
            for following in _successors(section, index):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
    return effect


def _jumps(node: Node) -> bool:
    return node.op in (b"BRA", b"BRX", b"BRXU", b"JMP", b"JMX", b"JMXU", b"WARPSYNC")


def _successors(section: CodeSection, index: int) -> list[int]:
    """Nodes that may run next within the section. A call goes on behind itself."""
    node = section.nodes[index]
    following: list[int | None] = []
    if node.op in (b"EXIT", b"KILL", b"RET"):
        following = [] if node.always else [index + 1]
    elif node.op == b"BSYNC":
        following = [index + 1, *_reconverge(section, node)]
    elif _jumps(node):
        following = [section.labels.get(target) for target in node.targets]
        if not node.always or node.op == b"WARPSYNC":
            following.append(index + 1)
    else:
        following = [index + 1]
    return [i for i in following if i is not None and i < len(section.nodes)]


def _accessed(effect: _Effect, what: str, at: int) -> None:
    if effect.access_at is None or at < effect.access_at:
        effect.access, effect.access_at = what, at


def _callee(section: CodeSection, node: Node, walker: _Walker) -> _Effect | None:
    """What the called function does; None where it is not known which it is."""
    target = node.targets[0] if node.targets else b""
    if target in section.labels:
        return _walk(section, section.labels[target], walker)
    if target in walker.shared:
        other = walker.shared[target]
        return _walk(other, other.labels.get(target, 0), walker)
    return None


def _add_callee(section: CodeSection, node: Node, effect: _Effect, walker: _Walker) -> bool:
    """Add what the called function does; whether it may come back without having waited."""
    callee = _callee(section, node, walker)
    if callee is None:
        name = node.targets[0].decode(errors="replace") if node.targets else "indirect"
        effect.unfollowed.add(f"{node.at:#06x} CALL {name}")
        return True
    if callee.access:
        _accessed(effect, f"{callee.access} (called from {node.at:#06x})", node.at)
    effect.stores |= callee.stores
    effect.waits |= callee.waits
    effect.unfollowed |= callee.unfollowed
    return callee.returns


def _reconverge(section: CodeSection, sync: Node) -> Iterator[int]:
    """Where a BSYNC goes on: behind itself, or where the BSSY around it says."""
    for node in section.nodes:
        if node.at > sync.at:
            break
        if node.op == b"BSSY" and node.targets[0] == sync.targets[0] and len(node.targets) > 1:
            index = section.labels.get(node.targets[1])
            # Only the one around it: barriers are used again further down.
            if (
                index is not None
                and index < len(section.nodes)
                and section.nodes[index].at > sync.at
            ):
                yield index


# --- beside and after the wait -------------------------------------------------------------


class _Paths:
    """A kernel's section as a graph of nodes, with what each does."""

    def __init__(self, section: CodeSection, walker: _Walker) -> None:
        self.nodes = section.nodes
        self.next = [_successors(section, i) for i in range(len(section.nodes))]
        self._calls = {
            i: _callee(section, node, walker)
            for i, node in enumerate(section.nodes)
            if node.op == b"CALL"
        }
        self._leads_to_wait = self._backwards(i for i in range(len(self.nodes)) if self.may_wait(i))

    def may_wait(self, index: int) -> bool:
        call = self._calls.get(index)
        return self.nodes[index].op == b"ACQBULK" or bool(call and call.waits)

    def must_wait(self, index: int) -> bool:
        node, call = self.nodes[index], self._calls.get(index)
        return node.always and self.may_wait(index) and not (call and call.returns)

    def stores(self, index: int) -> bool:
        call = self._calls.get(index)
        return self.nodes[index].op in STORES or bool(call and call.stores)

    def acts(self, index: int) -> bool:
        """Whether it touches memory, wakes or awaits other warps, or does what is not known."""
        node = self.nodes[index]
        if node.op == b"CALL":
            call = self._calls[index]
            return call is None or call.access is not None or bool(call.unfollowed)
        return node.op in ACCESSES or node.op in SYNCS

    def leads_to_wait(self, index: int) -> bool:
        """Whether some path from this node on, itself included, waits."""
        return index in self._leads_to_wait

    def _backwards(self, ends: Iterable[int]) -> set[int]:
        before: list[list[int]] = [[] for _ in self.nodes]
        for index, following in enumerate(self.next):
            for each in following:
                before[each].append(index)
        seen = set(ends)
        todo = list(seen)
        while todo:
            for each in before[todo.pop()]:
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
        return seen

    def _forwards(self, starts: Iterable[int]) -> set[int]:
        seen = set(starts)
        todo = list(seen)
        while todo:
            for each in self.next[todo.pop()]:
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
        return seen

    def nothing_follows(self, entry: int) -> bool:
        """Whether no memory is touched and no other warp is woken after any wait."""
        waits = [i for i in self._forwards([entry]) if self.may_wait(i)]
        if any(self.nodes[i].op == b"CALL" for i in waits):
            return False
        after = self._forwards(each for i in waits for each in self.next[i])
        return not any(self.acts(i) for i in after if not self.may_wait(i))

    def parting(self, index: int) -> bool:
        """Whether a way that never waits parts here from one that may."""
        following = self.next[index]
        node = self.nodes[index]
        if self.may_wait(index):
            return not node.always and node.op == b"ACQBULK"
        leads = [self.leads_to_wait(i) for i in following]
        ends = node.op in (b"EXIT", b"KILL", b"RET") and not node.always
        return any(leads) and (ends or not all(leads))


def _doubts(
    section: CodeSection, paths: _Paths, entry: int, parameters: Parameters | None
) -> Iterator[str]:
    """Sentences on stores that no wait comes before, and on operands that are read too early."""
    partings = [i for i in range(len(paths.nodes)) if paths.parting(i)]
    text = b"".join(section.text)
    origins = predicate_origins(text, {paths.nodes[i].at: paths.nodes[i].guard for i in partings})
    by_thread = {i for i in partings if origins.get(paths.nodes[i].at, THREAD) & THREAD}
    early: set[int] = set()
    told: set[str] = set()
    # `parted`: other threads of the block are on a way that waits.
    todo, seen = [(entry, False)], {(entry, False)}
    while todo:
        index, parted = todo.pop()
        node = paths.nodes[index]
        if paths.must_wait(index) or (parted and node.op in SYNCS):
            continue
        if paths.stores(index):
            if paths.leads_to_wait(index):
                kind = "it stores to global memory before it waits"
            elif parted:
                kind = "threads store beside those that wait, and no barrier holds them back"
            else:
                kind = "a path round the wait, which whole blocks can take, stores to global memory"
            if kind not in told:
                told.add(kind)
                yield f"{kind}: {node.at:#06x} {node.text.decode(errors='replace')}".rstrip()
        elif node.op in ACCESSES and not parted and paths.leads_to_wait(index):
            early.add(node.at)
        parts = index in by_thread
        for following in paths.next[index]:
            state = (following, parted or (parts and not paths.leads_to_wait(following)))
            # Threads that go on to the wait are alone with it: what they do is before it.
            if state not in seen:
                seen.add(state)
                todo.append(state)
    if early and section.mma and text:
        yield from early_operands(text, early, parameters)
