"""Where the values in a kernel's registers come from: thread, block, parameters, loaded memory.

A forward data-flow analysis over nvdisasm's text. It answers two questions of `flow`: does a
branch part the threads of a block, or whole blocks; and are values that belong to one operand of
the matrix unit read on both sides of the wait. Values that go through shared memory are lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .parameters import Parameters

THREAD, LOADED = 1, 2
"""Bits of an origin: it differs between threads of a block; it was loaded from memory."""
_FIRST = 4
"""The first bit that stands for a parameter, or for memory that a parameter points to."""
MOST_INSTRUCTIONS = 40_000

_LINE = re.compile(
    rb"^(?:([^\s/][^\n]*):[ \t]*$"
    rb"|[ \t]+/\*([0-9a-f]+)\*/[ \t]+(?:\{[ \t]*)?(?:@(!?U?P\w+)[ \t]+)?"
    rb"([A-Z][\w]*)((?:\.\w+)*)[ \t]*([^;\n]*))",
    re.MULTILINE,
)
_REGISTER = re.compile(rb"(?<![\w.])(UR|R|UP|P)(\d+)\b(\.64)?")
_CONSTANT = re.compile(rb"c\[0x0\]\[(?:[^\]]*\+)?(0x[0-9a-f]+)\]")
_DESCRIPTOR = re.compile(rb"g?desc\[[^\]]*\]")
_TARGET = re.compile(rb"`\(([^)]*)\)")
_TABLE = re.compile(rb"BRANCH_TARGETS ([^\"*]*)")
_PREDICATE = re.compile(rb"U?P(\d+|T)$")
_TWO_PREDICATES = (b"SETP", b"PLOP3")
_BY_THREAD = re.compile(
    rb"SR_(TID|LANEID|LTMASK|LEMASK|GTMASK|GEMASK|EQMASK|NWARPID|WARPID|VIRTID)"
)
_NO_RESULT = re.compile(
    rb"(?:ST|STG|STS|STL|RED|REDG|BRA|BRX|BRXU|JMP|EXIT|KILL|RET|CALL|BAR|BSSY|BSYNC|NOP|ACQBULK"
    rb"|PREEXIT|MEMBAR|ERRBAR|CCTL|DEPBAR|LDGDEPBAR|LDGSTS|UTMA\w+|UBLK\w+|WARPSYNC|YIELD|UCGABAR\w*"
    rb"|NANOSLEEP|FENCE|STTM|ARRIVES|BREAK)$"
)
_FROM_MEMORY = (b"LDG", b"LD", b"LDGMC", b"ATOMG", b"ATOM")
_MULTIPLIES = re.compile(rb"(?:FMUL2?|HMUL2|FFMA2?|HFMA2|FMUL32I)$")


@dataclass(slots=True)
class _Instruction:
    at: int
    predicate: bytes
    op: bytes
    modifiers: tuple[bytes, ...]
    rest: bytes
    targets: tuple[bytes, ...]
    _operands: tuple[bytes, ...] | None = None

    @property
    def operands(self) -> tuple[bytes, ...]:
        if self._operands is None:
            self._operands = tuple(_split_operands(self.rest))
        return self._operands


State = dict[bytes, int]
"""Origin of each register and predicate; one that is not there has none."""


class _Program:
    """The instructions of one kernel and how control passes between them."""

    def __init__(self, text: bytes) -> None:
        self.code: list[_Instruction] = []
        self.labels: dict[bytes, int] = {}
        for match in _LINE.finditer(text):
            label, at, predicate, op, modifiers, rest = match.groups()
            if label is not None:
                self.labels[label] = len(self.code)
                continue
            table = _TABLE.search(rest)
            targets = tuple(_TARGET.findall(rest))
            if table:
                targets = tuple(t.strip() for t in table.group(1).split(b","))
            self.code.append(
                _Instruction(
                    int(at, 16),
                    predicate or b"",
                    op,
                    tuple(modifiers.split(b".")[1:]),
                    rest,
                    targets,
                )
            )
            if len(self.code) > MOST_INSTRUCTIONS:
                break
        self.whole = len(self.code) <= MOST_INSTRUCTIONS

    def next(self, index: int) -> list[int]:
        one = self.code[index]
        following = []
        if one.op in (b"BRA", b"BRX", b"BRXU", b"JMP", b"WARPSYNC", b"BSSY"):
            following = [self.labels[t] for t in one.targets if t in self.labels]
        ends = one.op in (b"EXIT", b"RET", b"KILL", b"BRX", b"BRXU", b"JMP")
        if one.op == b"BRA":
            ends = not one.modifiers and len(one.operands) == 1
        if one.predicate not in (b"", b"PT") or not ends:
            following.append(index + 1)
        return [i for i in following if i < len(self.code)]


def _split_operands(text: bytes) -> Iterator[bytes]:
    """The operands, cut at commas outside of brackets."""
    depth = start = 0
    for i, c in enumerate(text):
        if c in b"[(":
            depth += 1
        elif c in b"])":
            depth -= 1
        elif c == 44 and not depth:
            yield text[start:i].strip()
            start = i + 1
    last = text[start:].strip()
    if last:
        yield last


def _results(one: _Instruction) -> int:
    """How many of the operands, from the first on, an instruction writes."""
    if _NO_RESULT.match(one.op) or not one.operands:
        return 0
    if one.op.endswith(_TWO_PREDICATES):
        return 2
    count = 0
    for operand in one.operands:
        if not _PREDICATE.match(operand):
            break
        count += 1
    if count:  # predicates come first: SHFL P0, R1, ...; VOTE.ANY P0, ...
        follows = count < len(one.operands) and one.op in _WITH_REGISTER
        return min(count, 2) + follows
    count = 1
    for operand in one.operands[1:3]:
        if not _PREDICATE.match(operand):
            break
        count += 1
    return count


_WITH_REGISTER = (b"SHFL", b"ATOM", b"ATOMG", b"ATOMS", b"LOP3", b"ULOP3", b"MATCH", b"REDUX")


def _registers(operand: bytes) -> Iterator[bytes]:
    for kind, number, wide in _REGISTER.findall(operand):
        yield kind + number
        if wide:
            yield kind + b"%d" % (int(number) + 1)


def _width(one: _Instruction) -> int:
    """How many registers the first result takes."""
    if one.op.endswith(b"MMA"):
        return 4
    for modifier in one.modifiers:
        if modifier == b"128":
            return 4
        if modifier in (b"64", b"WIDE"):
            return 2
    if one.op == b"CS2R" and b"32" not in one.modifiers:
        return 2
    if one.op == b"LDSM" and one.modifiers and one.modifiers[-1].isdigit():
        return int(one.modifiers[-1])
    return 1


class _Analysis:
    """Origins at the beginning of every block that can be reached, as a fixed point.

    parameters: for each pointer, its offset; without them only THREAD and LOADED are told.
    until: instructions, by index, that are asked about; what leads to none of them is left out.
    """

    def __init__(
        self, program: _Program, parameters: Parameters = (), until: Iterable[int] | None = None
    ) -> None:
        self.program = program
        self.pointers = [offset for offset, size in parameters if size == 8]
        self.next = [program.next(i) for i in range(len(program.code))]
        self.needed = self._leading(until) if until is not None else None
        self.leaders = {0}
        for index, several in enumerate(self.next):
            if several != [index + 1]:
                self.leaders.update(several)
        self.entry: dict[int, State] = {0: {}}
        todo = [0]
        while todo:
            block = todo.pop()
            for following, state in self._through(block):
                if self._join(following, state):
                    todo.append(following)

    def _leading(self, until: Iterable[int]) -> set[int]:
        before: dict[int, list[int]] = {}
        for index, following in enumerate(self.next):
            for each in following:
                before.setdefault(each, []).append(index)
        seen = set(until)
        todo = list(seen)
        while todo:
            for each in before.get(todo.pop(), ()):
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
        return seen

    def _through(self, block: int) -> Iterator[tuple[int, State]]:
        """The blocks that follow, with the state that control arrives with."""
        index, state = block, dict(self.entry[block])
        while self.needed is None or index in self.needed:
            self._run(self.program.code[index], state)
            following = self.next[index]
            if len(following) == 1 and following[0] == index + 1 and index + 1 not in self.leaders:
                index += 1
                continue
            for each in following:
                yield each, state
            return

    def states(self) -> Iterator[tuple[_Instruction, State]]:
        """Each instruction that can be reached, and what is known before it runs; the state is
        good until the next one is asked for."""
        for block in sorted(self.entry):
            index, state = block, dict(self.entry[block])
            while self.needed is None or index in self.needed:
                yield self.program.code[index], state
                self._run(self.program.code[index], state)
                if self.next[index] != [index + 1] or index + 1 in self.leaders:
                    break
                index += 1

    def _join(self, index: int, state: State) -> bool:
        there = self.entry.get(index)
        if there is None:
            self.entry[index] = dict(state)
            return True
        changed = False
        for register, origin in state.items():
            mine = there.get(register, 0)
            if origin & ~mine:
                there[register] = mine | origin
                changed = True
        return changed

    def points_to(self, operands: tuple[bytes, ...], state: State) -> int:
        """Bits of the pointers that an address is made from."""
        address = b"".join(_DESCRIPTOR.sub(b"", o) for o in operands if b"[" in o)
        bits = 0
        for register in _registers(address):
            bits |= state.get(register, 0)
        bits |= self._constants(address)
        return bits & self._pointer_bits

    @property
    def _pointer_bits(self) -> int:
        return sum(_FIRST << (2 * i) for i in range(len(self.pointers)))

    def _constants(self, operand: bytes) -> int:
        bits = 0
        for offset in _CONSTANT.findall(operand):
            place = int(offset, 16) & ~7
            if place in self.pointers:
                bits |= _FIRST << (2 * self.pointers.index(place))
        return bits

    def origin(self, operand: bytes, state: State) -> int:
        bits = self._constants(operand)
        if b"SR_" in operand and _BY_THREAD.search(operand):
            bits |= THREAD
        for register in _registers(operand):
            bits |= state.get(register, 0)
        return bits

    def _run(self, one: _Instruction, state: State) -> None:
        """Change `state` as the instruction does."""
        if one.op == b"R2P":
            value = self.origin(one.operands[1], state)
            state.update({b"P%d" % i: value for i in _masked(one)})
            return
        count = _results(one)
        if not count:
            return
        sources = one.operands[count:]
        if one.op == b"PRMT" and sources[:2] == (b"RZ", b"0x7610"):
            sources = ()  # the low half becomes zero; what is left above it is not used
        value = 0
        for operand in sources:
            value |= self.origin(operand, state)
        if one.op == b"P2R":
            for i in _masked(one):
                value |= state.get(b"P%d" % i, 0)
        if one.op in _FROM_MEMORY:
            # What a pointer points to, whatever the address was computed from otherwise.
            value = (value & THREAD) | LOADED | (self.points_to(sources, state) << 1)
        elif one.op in (b"ELECT", b"UELECT", b"SYNCS", b"CS2R", b"LDS", b"LDSM", b"LDL", b"LDTM"):
            value = THREAD if one.op != b"LDS" else value & THREAD
        elif one.op.endswith(b"MMA"):
            value = 0
        weak = one.predicate not in (b"", b"PT")
        for place, operand in enumerate(one.operands[:count]):
            match = _REGISTER.match(operand)
            if match is None:
                continue
            kind, number = match[1], int(match[2])
            for i in range(_width(one) if place == 0 else 1):
                register = kind + b"%d" % (number + i)
                state[register] = value | (state.get(register, 0) if weak else 0)


def _masked(one: _Instruction) -> list[int]:
    """The predicates that P2R and R2P move between a register and the whole set."""
    try:
        mask = int(one.operands[-1], 16)
    except ValueError:
        mask = 0x7F
    return [i for i in range(7) if mask >> i & 1]


def predicate_origins(text: bytes, guards: Mapping[int, bytes]) -> dict[int, int]:
    """The origin of what decides each conditional instruction, by its address.

    guards: the predicates of each, as text. What cannot be followed is not in the answer.
    """
    if not guards or not text:
        return {}
    program = _Program(text)
    if not program.whole:
        return {}
    asked = [i for i, one in enumerate(program.code) if one.at in guards]
    analysis = _Analysis(program, until=asked)
    found = {}
    for one, state in analysis.states():
        guard = guards.get(one.at)
        if guard is None:
            continue
        bits = 0
        for register in _registers(guard):
            bits |= state.get(register, 0)
        # BRA.DIV and the like ask whether the threads agree.
        found[one.at] = bits | (THREAD if b"DIV" in guard else 0)
    return found


def early_operands(text: bytes, early: set[int], parameters: Parameters | None) -> Iterator[str]:
    """Doubts about reads before the wait, in a kernel that multiplies on tensor cores.

    A weight may rightly be read before the wait, with all that belongs to it. So it is doubtful if
    every array is, or if one is multiplied, ahead of the matrix unit, with one that is not.

    early: addresses of the loads that come before the wait. parameters: None where unknown.
    """
    program = _Program(text)
    if not program.whole or not parameters:
        return
    analysis = _Analysis(program, parameters)
    before = after = 0
    pairs: set[tuple[int, int]] = set()
    for one, state in analysis.states():
        if one.op in _FROM_MEMORY:
            bits = analysis.points_to(one.operands[_results(one) :], state)
            if one.at in early:
                before |= bits
            else:
                after |= bits
        elif _MULTIPLIES.match(one.op) and len(one.operands) >= 3:
            sides = [_arrays(analysis.origin(o, state)) for o in one.operands[1:3]]
            pairs |= {(a, b) for a in sides[0] for b in sides[1] if a != b}
    first, later = set(_arrays(before << 1)), set(_arrays(after << 1))
    if first and not later - first and len(first) > 1:
        yield "every array that it reads, it reads before it waits"
        return
    both = pairs | {pair[::-1] for pair in pairs}
    mixed = sorted((a, b) for a, b in both if a in first and b in later - first)
    if mixed:
        places = [offset for offset, _ in parameters]
        names = [places.index(analysis.pointers[number]) for number in mixed[0]]
        yield (
            f"it reads what parameter {names[0]} points to before it waits, but multiplies it with"
            f" what it reads through parameter {names[1]} only after: are both weights?"
        )


def _arrays(origin: int) -> list[int]:
    """Which pointers' memory an origin holds, by their number."""
    bits, found, number = origin // _FIRST >> 1, [], 0
    while bits:
        if bits & 1:
            found.append(number)
        bits >>= 2
        number += 1
    return found
