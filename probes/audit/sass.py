"""Machine code as nvdisasm prints it: what multiplies, waits, branches and touches memory.

Pure: text in, values out. ``ACQBULK`` is PTX's ``griddepcontrol.wait`` and ``PREEXIT`` its
``launch_dependents``, on every SM from 90 to 121. The text is read in pieces. Of each kernel its
control flow, waits and memory accesses are kept as `Node`; the whole text only of a kernel that
waits, for the questions of `flow` that need its registers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

NO_WAIT = "no-wait"
ACCESS_BEFORE_WAIT = "access-before-wait"
WAIT_PRESENT = "wait-present"
MOST_TEXT = 24 << 20
"""Bytes of text of one kernel that are kept to follow its registers."""

_FLOW = rb"ACQBULK|PREEXIT|BRA|BRX|BRXU|JMP|JMX|JMXU|CALL|RET|EXIT|KILL|BSSY|BSYNC|WARPSYNC"
# What makes warps of a block, or blocks of a cluster, wait for each other.
_SYNC = rb"BAR|SYNCS|UCGABAR_ARV|UCGABAR_WAIT"
# Global memory only: shared (LDS, STS, ATOMS), local (LDL, STL), tensor memory (LDTM) and the
# constant bank that holds parameters (LDC, LDCU, ULDC) are nobody else's. Prefetches (UTMAPF,
# UBLKPF, CCTL) bring nothing into the kernel.
_LOADS = rb"LD|LDG|LDGMC|LDGSTS|UBLKCP|UTMALDG|SULD|TEX|TLD|TLD4|TXD|TMML"
_STORES = rb"ST|STG|ATOM|ATOMG|RED|REDG|UBLKRED|UTMASTG|UTMAREDG|SUST|SUATOM|SURED"
_ACCESS = _LOADS + rb"|" + _STORES
_LINE = re.compile(
    rb"^(?:"
    rb"\t\.section\t\.text\.([^\n]+?),\""  # 1: section
    rb"|[ \t]+\.other[ \t]+([^\n]+),@\"([^\"\n]*)\""  # 2, 3: symbol and its flags
    rb"|([^\s/][^\n]*):[ \t]*$"  # 4: label
    # 5: address, 6: predicate, 7: instruction, 8: operands
    rb"|[ \t]+/\*([0-9a-f]+)\*/[ \t]+(?:\{[ \t]*)?(?:@(!?U?P\w+)[ \t]+)?"
    rb"((?:" + _FLOW + rb"|" + _SYNC + rb"|" + _ACCESS + rb"|[A-Z]*MMA)(?:\.[\w.]+)?)"
    rb"(?=[ \t;])([^;\n]*)"
    rb")",
    re.MULTILINE,
)
_TARGET = re.compile(rb"`\(([^)]*)\)")
_TABLE = re.compile(rb"BRANCH_TARGETS ([^\"*]*)")
_BARRIER = re.compile(rb"\bB(\d+)\b")
LOADS = frozenset(_LOADS.split(b"|"))
STORES = frozenset(_STORES.split(b"|"))
ACCESSES = LOADS | STORES
SYNCS = frozenset(_SYNC.split(b"|"))
# A matrix unit's operands are followed by the tensor-memory addresses of its scale factors.
_TMEM_SCALES = re.compile(rb"idesc\[[^\]]*\],[ \t]*tmem\[")


@dataclass(frozen=True, slots=True)
class SassKernel:
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
    idle: bool = False
    """Whether it waits only when there is nothing left to do: all its accesses come before."""
    doubts: tuple[str, ...] = ()
    """Why its wait may come too late, or not on every path; one sentence each."""

    @property
    def unwaited(self) -> bool:
        """Whether it touches memory and no wait comes before that on any path."""
        if self.idle:
            return True
        touches = self.first_access is not None or bool(self.unfollowed)
        return self.wait == NO_WAIT and touches


@dataclass(slots=True)
class Node:
    """An instruction that matters to control flow or memory. `guard`: its predicates as text."""

    at: int
    op: bytes
    always: bool
    targets: tuple[bytes, ...]
    text: bytes
    guard: bytes = b""


@dataclass(slots=True)
class CodeSection:
    """One section of machine code: a kernel with its own functions, or functions kernels share."""

    name: bytes
    nodes: list[Node] = field(default_factory=list)
    labels: dict[bytes, int] = field(default_factory=dict)
    """Label to the index of the first node at or after it."""
    entries: set[bytes] = field(default_factory=set)
    mma: Counter[str] = field(default_factory=Counter)
    block_scaled: int = 0
    waits: int = 0
    triggers: int = 0
    text: list[bytes] = field(default_factory=list)
    """Its lines, while it waits and they are no more than MOST_TEXT."""


def sections(text: Iterable[bytes]) -> Iterator[CodeSection]:
    """The sections of one cubin from ``nvdisasm -c`` output, in pieces that end at line ends."""
    now: CodeSection | None = None
    size = 0
    for piece in text:
        begin = 0
        for match in _LINE.finditer(piece):
            name, other, flags, label, at, predicate, op, rest = match.groups()
            if op is not None:
                if now is not None:
                    _add_instruction(now, int(at, 16), predicate, op, rest)
            elif label is not None:
                if now is not None:
                    now.labels[label] = len(now.nodes)
            elif name is not None:
                if now is not None:
                    now.text.append(piece[begin : match.start()])
                    yield _closed(now)
                now, begin, size = CodeSection(name), match.start(), 0
            elif now is not None and b"STO_CUDA_ENTRY" in flags:
                now.entries.add(other)
        if now is not None:
            size += len(piece) - begin
            if size <= MOST_TEXT:
                now.text.append(piece[begin:])
            else:
                now.text.clear()
    if now is not None:
        yield _closed(now)


def _closed(section: CodeSection) -> CodeSection:
    if not section.waits:
        section.text.clear()  # its registers are never asked about
    return section


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


def _add_instruction(
    section: CodeSection, at: int, predicate: bytes | None, op: bytes, operands: bytes
) -> None:
    name, _, modifiers = op.partition(b".")
    if name.endswith(b"MMA"):
        kind, scaled = mma_kind(name, modifiers, operands)
        section.mma[kind] += 1
        section.block_scaled += scaled
        return
    if name == b"PREEXIT":
        section.triggers += 1
        return
    if name == b"WARPSYNC" and b"`(" not in operands:
        return
    if predicate == b"!PT":
        return  # never executed
    if name == b"ACQBULK":
        section.waits += 1
    targets = tuple(_TARGET.findall(operands))
    if name in (b"BRX", b"BRXU", b"JMX", b"JMXU"):
        table = _TABLE.search(operands)
        targets = tuple(t.strip() for t in table.group(1).split(b",")) if table else ()
    elif name in (b"BSSY", b"BSYNC"):
        barrier = _BARRIER.search(operands)
        targets = (barrier.group(0) if barrier else b"", *targets)
    condition = operands.split(b"`")[0]
    always = predicate in (None, b"PT") and not (
        # BRA.U UP0 and BRA.DIV and the like are conditional by an operand or by divergence.
        name == b"BRA" and (modifiers or b"P" in condition)
    )
    guard = b" ".join((predicate or b"", modifiers, condition)) if not always else b""
    keep = name in ACCESSES
    shown = b" ".join((op + operands).split()) if keep else b""
    section.nodes.append(Node(at, name, always, targets, shown, guard))


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
