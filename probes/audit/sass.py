"""Machine code as nvdisasm prints it: which kernels, what they multiply with, where they wait.

Pure: text in, values out. ``ACQBULK`` is PTX's ``griddepcontrol.wait`` and ``PREEXIT`` its
``launch_dependents``, on every SM from 90 to 121. The text is read in pieces, and of each kernel
only its control flow, waits and memory accesses are kept, so that size does not matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

NO_WAIT = "no-wait"
ACCESS_BEFORE_WAIT = "access-before-wait"
WAIT_PRESENT = "wait-present"

_FLOW = rb"ACQBULK|PREEXIT|BRA|BRX|BRXU|JMP|JMX|JMXU|CALL|RET|EXIT|KILL|BSSY|BSYNC|WARPSYNC"
# Global memory only: shared (LDS, STS, ATOMS), local (LDL, STL), tensor memory (LDTM) and the
# constant bank that holds parameters (LDC, LDCU, ULDC) are nobody else's. Prefetches (UTMAPF,
# UBLKPF, CCTL) bring nothing into the kernel.
_ACCESS = (
    rb"LD|LDG|LDGMC|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UTMALDG|UTMASTG|UTMAREDG"
    rb"|SULD|SUST|SUATOM|SURED|TEX|TLD|TLD4|TXD|TMML"
)
_LINE = re.compile(
    rb"^(?:"
    rb"\t\.section\t\.text\.([^\n]+?),\""  # 1: section
    rb"|[ \t]+\.other[ \t]+([^\n]+),@\"([^\"\n]*)\""  # 2, 3: symbol and its flags
    rb"|([^\s/][^\n]*):[ \t]*$"  # 4: label
    # 5: address, 6: predicate, 7: instruction, 8: operands
    rb"|[ \t]+/\*([0-9a-f]+)\*/[ \t]+(?:\{[ \t]*)?(?:@(!?U?P\w+)[ \t]+)?"
    rb"((?:" + _FLOW + rb"|" + _ACCESS + rb"|[A-Z]*MMA)(?:\.[\w.]+)?)(?=[ \t;])([^;\n]*)"
    rb")",
    re.MULTILINE,
)
_TARGET = re.compile(rb"`\(([^)]*)\)")
_TABLE = re.compile(rb"BRANCH_TARGETS ([^\"*]*)")
_BARRIER = re.compile(rb"\bB(\d+)\b")
_ACCESSES = frozenset(_ACCESS.split(b"|"))
# A matrix unit's operands are followed by the tensor-memory addresses of its scale factors.
_TMEM_SCALES = re.compile(rb"idesc\[[^\]]*\],[ \t]*tmem\[")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel's machine code says about launching it early.

    `mma` counts tensor-core instructions by kind (``OMMA.SF``, ``UTCOMMA``, ``HGMMA``, ...);
    `block_scaled` those of them that multiply block-scaled operands. `wait` is ``no-wait``,
    ``access-before-wait`` (some path loads or stores global memory before it waits) or
    ``wait-present``. `first_access` is that load or store, with its address.
    """

    name: str
    wait: str
    waits: int
    triggers: int
    mma: Mapping[str, int] = field(default_factory=dict)
    block_scaled: int = 0
    first_access: str | None = None
    unfollowed: tuple[str, ...] = ()
    """Indirect branches and calls that the walk could not follow."""


@dataclass(slots=True)
class _Node:
    """An instruction that matters to the walk."""

    at: int
    op: bytes
    always: bool
    targets: tuple[bytes, ...]
    text: bytes


@dataclass(slots=True)
class _Section:
    name: bytes
    nodes: list[_Node] = field(default_factory=list)
    labels: dict[bytes, int] = field(default_factory=dict)
    """Label to the index of the first node at or after it."""
    entries: set[bytes] = field(default_factory=set)
    mma: Counter[str] = field(default_factory=Counter)
    block_scaled: int = 0
    waits: int = 0
    triggers: int = 0


def kernels(text: Iterable[bytes]) -> Iterator[Kernel]:
    """The kernels of one cubin from ``nvdisasm -c`` output, in pieces of any size."""
    shared: dict[bytes, _Section] = {}
    waiting: list[_Section] = []
    for section in _sections(text):
        if not section.entries:
            shared[section.name] = section
        elif any(t not in section.labels for n in section.nodes for t in _called(n)):
            waiting.append(section)  # it calls functions that may come later
        else:
            yield _kernel(section, {})
    for section in waiting:
        yield _kernel(section, shared)


def _called(node: _Node) -> tuple[bytes, ...]:
    return node.targets if node.op == b"CALL" else ()


def pieces(read: Callable[[int], bytes], size: int = 1 << 20) -> Iterator[bytes]:
    """The output of `read(size)` cut at line ends."""
    rest = b""
    while block := read(size):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if end:
            yield block[:end]
    if rest:
        yield rest


def _sections(text: Iterable[bytes]) -> Iterator[_Section]:
    now: _Section | None = None
    for piece in text:
        for match in _LINE.finditer(piece):
            name, other, flags, label, at, predicate, op, rest = match.groups()
            if op is not None:
                if now is not None:
                    _add(now, int(at, 16), predicate, op, rest)
            elif label is not None:
                if now is not None:
                    now.labels[label] = len(now.nodes)
            elif name is not None:
                if now is not None:
                    yield now
                now = _Section(name)
            elif now is not None and b"STO_CUDA_ENTRY" in flags:
                now.entries.add(other)
    if now is not None:
        yield now


def _add(section: _Section, at: int, predicate: bytes | None, op: bytes, rest: bytes) -> None:
    name, _, modifiers = op.partition(b".")
    if name.endswith(b"MMA"):
        kind, scaled = mma_kind(name, modifiers, rest)
        section.mma[kind] += 1
        section.block_scaled += scaled
        return
    if name == b"PREEXIT":
        section.triggers += 1
        return
    if name == b"WARPSYNC" and b"`(" not in rest:
        return
    if predicate == b"!PT":
        return  # never executed
    if name == b"ACQBULK":
        section.waits += 1
    targets = tuple(_TARGET.findall(rest))
    if name in (b"BRX", b"BRXU", b"JMX", b"JMXU"):
        table = _TABLE.search(rest)
        targets = tuple(t.strip() for t in table.group(1).split(b",")) if table else ()
    elif name in (b"BSSY", b"BSYNC"):
        barrier = _BARRIER.search(rest)
        targets = (barrier.group(0) if barrier else b"", *targets)
    always = predicate in (None, b"PT") and not (
        # BRA.U UP0 and BRA.DIV and the like are conditional by an operand or by divergence.
        name == b"BRA" and (modifiers or b"P" in rest.split(b"`")[0])
    )
    keep = name in _ACCESSES
    section.nodes.append(
        _Node(at, name, always, targets, b" ".join((op + rest).split()) if keep else b"")
    )


def mma_kind(name: bytes, modifiers: bytes, operands: bytes) -> tuple[str, bool]:
    """The kind that is reported, and whether its operands are block-scaled.

    SM120 writes ``.SF`` for scale factors; SM100's ``UTCOMMA`` always has them, its ``UTCQMMA``
    where tensor-memory addresses of scale factors follow the instruction descriptor.
    """
    kind = name.decode()
    if b"SF" in modifiers.split(b"."):
        return kind + ".SF", True
    if kind == "UTCOMMA":
        return kind, True
    if kind.startswith("UTC") and _TMEM_SCALES.search(operands):
        return kind + " block-scaled", True
    return kind, False


@dataclass(slots=True)
class _Effect:
    """What a function may do before it waits."""

    access: str | None = None
    access_at: int | None = None
    returns: bool = False
    waits: bool = False
    unfollowed: set[str] = field(default_factory=set)


def _kernel(section: _Section, shared: Mapping[bytes, _Section]) -> Kernel:
    done: dict[tuple[bytes, int], _Effect] = {}
    effect = _walk(section, section.labels.get(section.name, 0), shared, done)
    waits = section.waits + sum(
        shared[name].waits for name in {key[0] for key in done} if name in shared
    )
    if not (effect.waits or (waits and effect.unfollowed)):
        wait = NO_WAIT
    else:
        wait = ACCESS_BEFORE_WAIT if effect.access else WAIT_PRESENT
    return Kernel(
        section.name.decode(errors="replace"),
        wait,
        waits,
        section.triggers,
        dict(sorted(section.mma.items())),
        section.block_scaled,
        effect.access,
        tuple(sorted(effect.unfollowed)),
    )


def _walk(
    section: _Section,
    start: int,
    shared: Mapping[bytes, _Section],
    done: dict[tuple[bytes, int], _Effect],
) -> _Effect:
    """Follow every path from node `start` up to its first wait."""
    key = (section.name, start)
    if key in done:
        return done[key]
    effect = done[key] = _Effect()  # a recursive call adds nothing
    nodes = section.nodes
    todo, seen = [start], {start}

    def go(*indices: int | None) -> None:
        for index in indices:
            if index is not None and index < len(nodes) and index not in seen:
                seen.add(index)
                todo.append(index)

    while todo:
        index = todo.pop()
        if index >= len(nodes):
            continue
        node = nodes[index]
        after = index + 1
        if node.op == b"ACQBULK":
            effect.waits = True
            if not node.always:
                go(after)
        elif node.op in _ACCESSES:
            _accessed(effect, f"{node.at:#06x} {node.text.decode(errors='replace')}", node.at)
            go(after)
        elif node.op in (b"EXIT", b"KILL"):
            go(None if node.always else after)
        elif node.op == b"RET":
            effect.returns = True
            go(None if node.always else after)
        elif node.op == b"CALL":
            if _call(section, node, effect, shared, done) or not node.always:
                go(after)
        elif node.op == b"BSYNC":
            go(after, *_reconverge(section, node))
        elif node.op == b"BSSY":
            go(after)
        else:
            if not node.targets:
                effect.unfollowed.add(f"{node.at:#06x} {node.op.decode()}")
            go(*(section.labels.get(t) for t in node.targets))
            if not node.always or node.op == b"WARPSYNC":
                go(after)
    return effect


def _accessed(effect: _Effect, what: str, at: int) -> None:
    if effect.access_at is None or at < effect.access_at:
        effect.access, effect.access_at = what, at


def _call(
    section: _Section,
    node: _Node,
    effect: _Effect,
    shared: Mapping[bytes, _Section],
    done: dict[tuple[bytes, int], _Effect],
) -> bool:
    """Add what the called function does; whether it may come back without having waited."""
    target = node.targets[0] if node.targets else b""
    if target in section.labels:
        callee = _walk(section, section.labels[target], shared, done)
    elif target in shared:
        other = shared[target]
        callee = _walk(other, other.labels.get(target, 0), shared, done)
    else:
        name = target.decode(errors="replace") or "indirect"
        effect.unfollowed.add(f"{node.at:#06x} CALL {name}")
        return True
    if callee.access:
        _accessed(effect, f"{callee.access} (called from {node.at:#06x})", node.at)
    effect.waits |= callee.waits
    effect.unfollowed |= callee.unfollowed
    return callee.returns


def _reconverge(section: _Section, sync: _Node) -> Iterator[int]:
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
