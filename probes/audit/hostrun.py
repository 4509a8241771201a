"""Host functions run on abstract values: with what attributes do they launch which kernel?

An x86-64 function is followed along all of its branches at once. A value is a small set of
constants and places on the stack, or unknown; where branches meet, sets are joined. That is enough
to see the ``cudaLaunchConfig_t`` that a compiler builds on the stack (CUDA's driver_types.h), and
to tell an attribute that is always there from one that is decided as the program runs. Functions
of the same file that lead to a launch are entered with the values they are called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .hostimage import HostImage

YES, NO, POSSIBLE, UNKNOWN = "yes", "no", "possible", "unknown"

_WITH_ATTRIBUTES = ("cudaLaunchKernelExC", "cuLaunchKernelEx")
_PLAIN = (
    "cudaLaunchKernel",
    "__cudaLaunchKernel",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchCooperativeKernel",
)
REGISTERS_KERNEL = "__cudaRegisterFunction"
REGISTERS_MODULE = "__cudaRegisterFatBinary"
# Calls that are given a kernel and launch nothing.
_HARMLESS = (
    REGISTERS_KERNEL,
    REGISTERS_MODULE,
    "__cudaGetKernel",
    "__cudaPopCallConfiguration",
    "cudaFuncGetAttributes",
    "cudaFuncGetName",
    "cudaFuncSetAttribute",
    "cudaFuncSetCacheConfig",
    "cudaFuncSetSharedMemConfig",
    "cudaGetFuncBySymbol",
    "cudaOccupancy",
)
_ATTRIBUTES, _COUNT = 40, 48
"""Where a launch configuration has the address of its attributes, and how many there are."""
_EACH, _VALUE = 72, 8
"""Bytes of one launch attribute, and where its value is."""
_EARLY = (6, 7)
"""Attribute ids: programmatic stream serialisation, programmatic event."""
_MOST_VALUES = 8
_MOST_ATTRIBUTES = 16
_DEEPEST = 6

ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_LOST = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")

Place = tuple[str, int]
"""An address on the stack, from where the first function began."""
Value = frozenset[Any] | None
"""Constants and `Place`; None is unknown. "unset" is what a branch left as it was."""


def launch_call(name: str) -> str | None:
    """Whether a function launches ("attributes" or "plain"), by its name with its suffixes."""
    base = name.partition("@")[0].removesuffix("_ptsz")
    if base in _WITH_ATTRIBUTES:
        return "attributes"
    return "plain" if base in _PLAIN else None


@dataclass(frozen=True, slots=True)
class LaunchSite:
    """A launch as it was seen: where, of which kernels (None: not known), and whether with PDL."""

    at: int
    kernels: frozenset[int] | None
    pdl: str
    attributes: bool = True
    """Whether the call takes launch attributes at all."""


@dataclass(slots=True)
class _Frame:
    """What is known at one point: registers, and the stack by offset as (size, value)."""

    registers: dict[str, Value]
    stack: dict[int, tuple[int, Value]]

    def copy(self) -> _Frame:
        return _Frame(dict(self.registers), dict(self.stack))

    def join(self, other: _Frame) -> bool:
        """Take over what `other` allows as well; whether that is anything new."""
        changed = False
        for name in list(self.registers):
            new = _union(self.registers[name], other.registers.get(name))
            if new != self.registers[name]:
                self.registers[name], changed = new, True
        for at in set(self.stack) | set(other.stack):
            mine, theirs = self.stack.get(at), other.stack.get(at)
            size = (mine or theirs or (8, None))[0]
            value: Value = None
            if not (mine and theirs) or mine[0] == theirs[0]:
                unset: Value = frozenset(["unset"])
                value = _union(mine[1] if mine else unset, theirs[1] if theirs else unset)
            if mine != (size, value):
                self.stack[at], changed = (size, value), True
        return changed

    def load(self, at: int, size: int) -> Value:
        cell = self.stack.get(at)
        if cell is None:
            return self._pieced(at, size)
        if cell[0] == size or cell[1] is None:
            return cell[1]
        if cell[0] > size:
            mask = (1 << 8 * size) - 1
            if all(isinstance(v, int) for v in cell[1]):
                return frozenset(v & mask for v in cell[1])
            return None
        return self._pieced(at, size)

    def _pieced(self, at: int, size: int) -> Value:
        """A value put together from two constants of half its size."""
        half = size // 2
        low, high = self.stack.get(at), self.stack.get(at + half)
        if size < 8 or not low or not high or low[0] != half or high[0] != half:
            return None
        if not low[1] or not high[1] or len(low[1]) != 1 or len(high[1]) != 1:
            return None
        (a,), (b,) = low[1], high[1]
        if isinstance(a, int) and isinstance(b, int):
            return frozenset([a | b << 8 * half])
        return None

    def store(self, at: int, size: int, value: Value) -> None:
        self.forget(at, at + size)
        self.stack[at] = (size, value)

    def forget(self, start: int, end: int) -> None:
        """What lies there is no longer known."""
        for at in range(start - 31, end):
            cell = self.stack.get(at)
            if cell is not None and at + cell[0] > start:
                del self.stack[at]
                # What is left of it before and behind.
                for place in (*range(at, start, 4), *range(end, at + cell[0], 4)):
                    self.stack[place] = (4, _word_of(cell[1], 8 * (place - at)))


def _word_of(value: Value, shift: int) -> Value:
    """32 bits of a constant."""
    if value is None or not all(isinstance(v, int) for v in value):
        return None
    return frozenset(v >> shift & 0xFFFFFFFF for v in value)


def _union(one: Value, two: Value) -> Value:
    if one is None or two is None:
        return None
    both = one | two
    return both if len(both) <= _MOST_VALUES else None


@dataclass(slots=True)
class HostRun:
    """Runs functions of `image`; `sites`, `registered` and `escaped` are what was seen.

    calls: names of functions that are known by them, by address. leads: functions, by their start,
    from which a launch is reached. steps: instructions that may still be run.
    """

    image: HostImage
    calls: Mapping[int, str]
    leads: frozenset[int]
    steps: int
    found: dict[tuple[int, ...], LaunchSite] = field(default_factory=dict)
    """Launches by the calls that lead to them, the last the launch itself."""
    registered: dict[int, str] = field(default_factory=dict)
    """Kernels by the address of their host function: (mangled) names."""
    modules: dict[str, set[int]] = field(default_factory=dict)
    """By kernel: addresses of the descriptors of the fatbins that have it."""
    escaped: set[int] = field(default_factory=set)
    """Addresses that were stored away or given to functions which were not followed."""
    watched: frozenset[int] = frozenset()
    """Addresses whose way is followed: of host functions of kernels."""
    entered: set[int] = field(default_factory=set)
    """Functions that were run."""
    gave_up: bool = False
    _decoded: dict[int, list[Any]] = field(default_factory=dict)
    _disassembler: Any = None
    _module: Value = None

    @property
    def sites(self) -> set[LaunchSite]:
        """The launches that were seen."""
        return set(self.found.values())

    def root(self, start: int) -> None:
        """Run a function of which nothing is known how it is called."""
        registers: dict[str, Value] = {name: None for name in _REGISTERS}
        registers["rsp"] = frozenset([("stack", 0)])
        self._module = None
        self._function(start, _Frame(registers, {}), (start,))

    # --- one function ---

    def _instructions(self, start: int) -> list[Any]:
        if start not in self._decoded:
            span = self.image.function(start) or (start, start)
            if self._disassembler is None:
                import capstone

                self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
                self._disassembler.detail = True
            code = self.image.code(*span)
            found = list(self._disassembler.disasm(code, span[0]))
            self._decoded[start] = found
        return self._decoded[start]

    def _function(self, start: int, frame: _Frame, chain: tuple[int, ...]) -> None:
        self.entered.add(start)
        code = self._instructions(start)
        if not code:
            return
        index = {one.address: i for i, one in enumerate(code)}
        leaders, direct = _leaders(code, index)
        indirect = sorted(leaders - direct)
        entry: dict[int, _Frame] = {0: frame}
        todo = [0]
        while todo:
            block = todo.pop()
            now = entry[block].copy()
            following: list[int] = []
            i = block
            while True:
                self.steps -= 1
                if self.steps <= 0:
                    self.gave_up = True
                    return
                one = code[i]
                name = one.mnemonic
                if name.startswith("j") or name in ("notrack jmp", "bnd jmp"):
                    target = _immediate(one)
                    if target in index:
                        following.append(index[target])
                    elif target is not None and name == "jmp":
                        self._call(
                            one.address, self.image.target(target), now, chain
                        )  # a tail call
                    elif target is None:
                        slot = self._slot(one)
                        if slot is not None:
                            self._call(one.address, slot, now, chain)
                        else:
                            following += indirect
                    if not name.endswith("jmp") and i + 1 < len(code):
                        following.append(i + 1)
                    break
                if name in ("ret", "bnd ret", "ud2", "hlt"):
                    break
                if name in ("call", "bnd call"):
                    target = _immediate(one)
                    to = self.image.target(target) if target is not None else self._slot(one)
                    self._call(one.address, to, now, chain)
                else:
                    _run_instruction(one, now, self)
                i += 1
                if i >= len(code):
                    break
                if i in leaders:
                    following.append(i)
                    break
            for each in following:
                if each not in entry:
                    entry[each] = now.copy()
                    todo.append(each)
                elif entry[each].join(now):
                    todo.append(each)

    def _slot(self, one: Any) -> int | None:
        """What a call or jump through a word of memory goes to."""
        operand = one.operands[0] if one.operands else None
        if (
            operand is not None
            and operand.type == _MEMORY
            and one.reg_name(operand.mem.base) == "rip"
        ):
            return self.image.words.get(one.address + one.size + operand.mem.disp)
        return None

    # --- calls ---

    def _call(self, at: int, to: int | None, frame: _Frame, chain: tuple[int, ...]) -> None:
        known = self.calls.get(to, "") if to is not None else ""
        kind = launch_call(known)
        arguments = [frame.registers.get(r) for r in ARGUMENTS]
        if kind:
            self._launched((*chain, at), kind, frame)
        elif known.partition("@")[0] == REGISTERS_KERNEL:
            self._registered(arguments)
        elif to is not None and to in self.leads and len(chain) <= _DEEPEST:
            called = frame.copy()
            for place in _places(frame.registers.get("rsp")):
                called.registers["rsp"] = frozenset([("stack", place - 8)])
            self._function(to, called, (*chain, at))
        elif not known.startswith(_HARMLESS):
            for value in arguments:
                self.escape(value)
        if known == "memset":
            _fill(frame, arguments)
        elif not kind and not known.startswith(_HARMLESS):
            for value in arguments:
                for place in _places(value):
                    frame.forget(place, place + 64)
        for register in _LOST:
            frame.registers[register] = None
        if known == REGISTERS_MODULE:
            # What it returns stands for the module: its descriptor will do.
            frame.registers["rax"] = self._module = arguments[0]
        for number in range(16):
            frame.registers[f"xmm{number}"] = None

    def escape(self, value: Value) -> None:
        """Whoever gets it may do with it what is not followed."""
        self.escaped |= {v for v in value or () if v in self.watched}

    def _registered(self, arguments: list[Value]) -> None:
        host, name = arguments[1], arguments[3] or arguments[2]
        if host and name and len(host) == 1 and len(name) == 1:
            (address,), (at,) = host, name
            text = self.image.text(at) if isinstance(at, int) else None
            if isinstance(address, int) and text:
                self.registered[address] = text
                module = arguments[0] or self._module
                if module is not None and len(module) == 1:
                    self.modules.setdefault(text, set()).update(module)

    def _launched(self, chain: tuple[int, ...], kind: str, frame: _Frame) -> None:
        which = frame.registers.get("rsi" if kind == "attributes" else "rdi")
        kernels = None
        if which is not None and all(isinstance(v, int) for v in which):
            kernels = frozenset(which)
        pdl = NO if kind == "plain" else _attributes(frame)
        # Seen again as branches meet, with all that they allow: the last time counts.
        self.found[chain] = LaunchSite(chain[-1], kernels, pdl, kind == "attributes")


def _attributes(frame: _Frame) -> str:
    """Whether the configuration that rdi points to asks for an early start."""
    answers = set()
    places = _places(frame.registers.get("rdi"))
    for config in places:
        counts = frame.load(config + _COUNT, 4)
        where = _places(frame.load(config + _ATTRIBUTES, 8))
        if counts == frozenset([0]):
            answers.add(NO)
            continue
        if len(where) != 1:
            answers.add(UNKNOWN)
            continue
        answers.add(_launch_attributes(frame, where[0], counts))
    if not answers or UNKNOWN in answers:
        return UNKNOWN
    return answers.pop() if len(answers) == 1 else POSSIBLE


def _launch_attributes(frame: _Frame, at: int, counts: Value) -> str:
    """From the attributes at `at`, of which there are `counts`."""
    sure = counts is not None and all(isinstance(c, int) for c in counts)
    most = max(counts) if sure and counts else _MOST_ATTRIBUTES
    least = min(counts) if sure and counts else 0
    possible = False
    unclear = not sure or most > _MOST_ATTRIBUTES
    for number in range(min(most, _MOST_ATTRIBUTES)):
        place = at + _EACH * number
        ids = frame.load(place, 4)
        if ids is None:
            unclear |= sure
            continue
        early = [i for i in ids if i in _EARLY]
        if not early:
            unclear |= "unset" in ids and number < most and sure
            continue
        value = frame.load(place + _VALUE, 4)
        if early == [7]:
            value = frozenset([1])  # an event is the wish
        if value == frozenset([0]):
            continue
        certain = len(ids) == 1 and value is not None and 0 not in value and "unset" not in value
        if certain and number < least:
            return YES
        possible = True
    if possible:
        return POSSIBLE
    return UNKNOWN if unclear else NO


# --- instructions --------------------------------------------------------------------------

_REGISTER, _IMMEDIATE, _MEMORY = 1, 2, 3
_REGISTERS = [
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{i}" for i in range(8, 16)),
    *(f"xmm{i}" for i in range(16)),
]
_FULL: dict[str, tuple[str, int]] = {}
for _letter in "abcd":
    for _name, _size in ((f"r{_letter}x", 8), (f"e{_letter}x", 4), (f"{_letter}x", 2),
                         (f"{_letter}l", 1), (f"{_letter}h", 1)):  # fmt: skip
        _FULL[_name] = (f"r{_letter}x", _size)
for _letter in ("si", "di", "bp", "sp"):
    for _name, _size in ((f"r{_letter}", 8), (f"e{_letter}", 4), (_letter, 2), (f"{_letter}l", 1)):
        _FULL[_name] = (f"r{_letter}", _size)
for _number in range(8, 16):
    for _name, _size in ((f"r{_number}", 8), (f"r{_number}d", 4), (f"r{_number}w", 2),
                         (f"r{_number}b", 1)):  # fmt: skip
        _FULL[_name] = (f"r{_number}", _size)
for _number in range(16):
    _FULL[f"xmm{_number}"] = (f"xmm{_number}", 16)
    _FULL[f"ymm{_number}"] = (f"xmm{_number}", 32)

_VECTOR_MOVES = ("movaps", "movups", "movdqa", "movdqu", "movapd", "movupd", "movq", "movd")
_MOVES = frozenset(["mov", "movabs", *_VECTOR_MOVES, *(f"v{name}" for name in _VECTOR_MOVES)])
_ONLY_READ = frozenset(
    ["cmp", "test", "ucomiss", "comiss", "ucomisd", "comisd", "bt", "nop", "endbr64", "push"]
)


def _leaders(code: list[Any], index: dict[int, int]) -> tuple[set[int], set[int]]:
    """Where blocks begin: all, and those that a branch names or the one before falls into."""
    leaders, direct = {0}, {0}
    for i, one in enumerate(code):
        name = one.mnemonic
        jump = name.startswith("j") or name.endswith(" jmp")
        if jump:
            target = _immediate(one)
            if target in index:
                leaders.add(index[target])
                direct.add(index[target])
        if (jump or name in ("ret", "bnd ret", "ud2", "hlt")) and i + 1 < len(code):
            leaders.add(i + 1)
            if jump and not name.endswith("jmp"):
                direct.add(i + 1)
    return leaders, direct


def _immediate(one: Any) -> int | None:
    operands = one.operands
    return operands[0].imm if operands and operands[0].type == _IMMEDIATE else None


def _places(value: Value) -> list[int]:
    return [v[1] for v in value or () if isinstance(v, tuple)]


def _map(value: Value, change: Callable[[int], int]) -> Value:
    """`value` with each constant, or place's offset, changed."""
    if value is None:
        return None
    mask = (1 << 64) - 1
    made: set[Any] = set()
    for each in value:
        if isinstance(each, int):
            made.add(change(each) & mask)
        elif isinstance(each, tuple):
            made.add((each[0], change(each[1])))
        else:
            return None
    return frozenset(made)


def _address(one: Any, memory: Any, frame: _Frame) -> Value:
    """Where an operand in memory is."""
    base = one.reg_name(memory.base) if memory.base else None
    if base == "rip":
        return frozenset([one.address + one.size + memory.disp])
    if memory.index or memory.segment:
        return None
    if base is None:
        return frozenset([memory.disp])
    return _map(frame.registers.get(_FULL.get(base, ("", 0))[0]), lambda v: v + memory.disp)


def _operand_value(one: Any, operand: Any, frame: _Frame, image: HostImage) -> Value:
    if operand.type == _IMMEDIATE:
        return frozenset([operand.imm & ((1 << 8 * max(operand.size, 1)) - 1)])
    if operand.type == _REGISTER:
        name, size = _FULL.get(one.reg_name(operand.reg), ("", 0))
        value = frame.registers.get(name)
        if size in (1, 2, 4) and value is not None:
            if not all(isinstance(v, int) for v in value):
                return None
            return frozenset(v & ((1 << 8 * size) - 1) for v in value)
        return value
    found: Value = frozenset()
    for place in _address(one, operand.mem, frame) or ("nowhere",):
        value = None
        if isinstance(place, tuple):
            value = frame.load(place[1], operand.size)
        elif isinstance(place, int):
            constant = image.word(place, operand.size)
            value = None if constant is None else frozenset([constant])
        found = _union(found, value)
    return found


def _write(one: Any, operand: Any, value: Value, frame: _Frame, run: HostRun) -> None:
    if operand.type == _REGISTER:
        name, size = _FULL.get(one.reg_name(operand.reg), ("", 0))
        if name:
            frame.registers[name] = value if size >= 4 else None
        return
    address = _address(one, operand.mem, frame)
    places = _places(address)
    if address is None or len(places) != len(address):
        run.escape(value)
    for place in places:
        if len(places) == 1 and address and len(address) == 1:
            if operand.size > 8 and value and all(isinstance(v, int) for v in value):
                for part in range(0, operand.size, 8):
                    piece = frozenset(v >> 8 * part & ((1 << 64) - 1) for v in value)
                    frame.store(place + part, 8, piece)
            else:
                frame.store(place, operand.size, value)
        else:
            frame.store(place, operand.size, None)


def _run_instruction(one: Any, frame: _Frame, run: HostRun) -> None:
    """One instruction that neither branches nor calls."""
    name, operands = one.mnemonic, one.operands
    if name == "push":
        frame.registers["rsp"] = _map(frame.registers["rsp"], lambda v: v - 8)
        value = _operand_value(one, operands[0], frame, run.image)
        for place in _places(frame.registers["rsp"]):
            frame.store(place, 8, value)
    elif name == "pop":
        for place in _places(frame.registers["rsp"]):
            _write(one, operands[0], frame.load(place, 8), frame, run)
        frame.registers["rsp"] = _map(frame.registers["rsp"], lambda v: v + 8)
    elif name == "leave":
        frame.registers["rsp"] = _map(frame.registers["rbp"], lambda v: v + 8)
        for place in _places(frame.registers["rbp"]):
            frame.registers["rbp"] = frame.load(place, 8)
    elif name == "lea":
        _write(one, operands[0], _address(one, operands[1].mem, frame), frame, run)
    elif name in _MOVES:
        _write(one, operands[0], _operand_value(one, operands[1], frame, run.image), frame, run)
    elif name in ("movzx", "movsxd", "movsx", "cdqe"):
        value = _operand_value(one, operands[1], frame, run.image) if len(operands) > 1 else None
        small = value is not None and all(isinstance(v, int) and v < 128 for v in value)
        if operands:
            _write(one, operands[0], value if small or name == "movzx" else None, frame, run)
        else:
            frame.registers["rax"] = None
    elif name.startswith("rep"):
        _repeat(name, frame)
    elif name.startswith("cmov"):
        both = _union(
            _operand_value(one, operands[0], frame, run.image),
            _operand_value(one, operands[1], frame, run.image),
        )
        _write(one, operands[0], both, frame, run)
    elif name.startswith("set") and operands:
        whole = (
            _FULL.get(one.reg_name(operands[0].reg), ("", 0))[0] if operands[0].type == 1 else ""
        )
        if whole:
            frame.registers[whole] = frozenset([0, 1])
        else:
            _write(one, operands[0], frozenset([0, 1]), frame, run)
    elif name in _ONLY_READ or not operands:
        pass
    else:
        _compute(one, frame, run)


def _compute(one: Any, frame: _Frame, run: HostRun) -> None:
    name, operands = one.mnemonic, one.operands
    zeroing = ("xor", "pxor", "xorps", "xorpd", "vpxor", "vxorps", "vxorpd", "sub")
    if name in zeroing and operands[-1].type == _REGISTER:
        sources = {one.reg_name(o.reg) for o in operands[-2:] if o.type == _REGISTER}
        if len(sources) == 1 and operands[-2].type == _REGISTER:
            _write(one, operands[0], frozenset([0]), frame, run)
            return
    value: Value = None
    if len(operands) == 2 and operands[1].type == _IMMEDIATE:
        mine = _operand_value(one, operands[0], frame, run.image)
        number = operands[1].imm
        if name == "add":
            value = _map(mine, lambda v: v + number)
        elif name == "sub":
            value = _map(mine, lambda v: v - number)
        elif name == "and" and mine is not None:
            # An aligned stack: everything on it is addressed from there.
            value = mine if _places(mine) else _map(mine, lambda v: v & number)
        elif name == "or":
            value = None if _places(mine) else _map(mine, lambda v: v | number)
        elif name in ("shl", "sal"):
            value = None if _places(mine) else _map(mine, lambda v: v << (number & 63))
    elif name in ("inc", "dec"):
        step = 1 if name == "inc" else -1
        value = _map(_operand_value(one, operands[0], frame, run.image), lambda v: v + step)
    elif name in ("punpcklqdq", "movhps") and len(operands) == 2:
        low = _operand_value(one, operands[0], frame, run.image)
        high = _operand_value(one, operands[1], frame, run.image)
        if low and high and len(low) == len(high) == 1:
            (a,), (b,) = low, high
            if isinstance(a, int) and isinstance(b, int):
                value = frozenset([(a & ((1 << 64) - 1)) | (b & ((1 << 64) - 1)) << 64])
    if operands[0].type in (_REGISTER, _MEMORY):
        _write(one, operands[0], value, frame, run)


def _repeat(name: str, frame: _Frame) -> None:
    """``rep stos`` and ``rep movs``: a stretch of the stack is set or copied."""
    size = {"b": 1, "w": 2, "d": 4, "q": 8}.get(name[-1], 8)
    counts, to = frame.registers["rcx"], _places(frame.registers["rdi"])
    count = max((c for c in counts or () if isinstance(c, int)), default=None)
    if count is None or count > 1 << 16:
        count = 64
    for place in to:
        if "stos" in name:
            filled = frame.registers["rax"]
            zero = filled == frozenset([0])
            frame.forget(place, place + size * count)
            for at in range(place, place + size * count, 4):
                frame.stack[at] = (4, frozenset([0]) if zero else None)
        else:
            source = _places(frame.registers["rsi"])
            end = place + size * count
            moved = {}
            if len(source) == 1:
                for at, cell in frame.stack.items():
                    if source[0] <= at and at + cell[0] <= source[0] + size * count:
                        moved[at - source[0] + place] = cell
            frame.forget(place, end)
            frame.stack.update(moved)
    for register in ("rcx", "rsi", "rdi"):
        frame.registers[register] = None


def _fill(frame: _Frame, arguments: list[Value]) -> None:
    """memset of a stretch of the stack."""
    value, size = arguments[1], arguments[2]
    for place in _places(arguments[0]):
        length = next(iter(size)) if size and len(size) == 1 else 64
        if not isinstance(length, int) or length > 1 << 16:
            length = 64
        frame.forget(place, place + length)
        for at in range(place, place + length - length % 4, 4):
            frame.stack[at] = (4, frozenset([0]) if value == frozenset([0]) else None)
