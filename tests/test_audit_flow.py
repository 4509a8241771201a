"""What a wait covers: paths round it, stores before it, and waits with nothing left to do."""

from __future__ import annotations

import io

import pytest
from audit_sass import EXIT, LOAD, MMA, STORE, WAIT, section
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes.audit import flow, origins, sass

BY_THREAD = ("S2R R0, SR_TID.X", "ISETP.NE.AND P0, PT, R0, RZ, PT")
BY_BLOCK = ("S2R R0, SR_CTAID.X", "ISETP.NE.AND P0, PT, R0, RZ, PT")
SKIP, SYNC = "@P0| BRA `(.L_1)", "BAR.SYNC.DEFER_BLOCKING 0x0"


def kernel(*code: str) -> sass.SassKernel:
    text = section("k", code).encode()
    (found,) = flow.kernels(sass.pieces(io.BytesIO(text).read))
    return found


@pytest.mark.parametrize(
    ("code", "idle"),
    [
        ((LOAD, MMA, STORE, WAIT, EXIT), True),
        ((WAIT, LOAD, STORE, EXIT), False),
        ((LOAD, WAIT, STORE, EXIT), False),
        # It wakes another warp, which goes on.
        ((LOAD, WAIT, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ", EXIT), False),
        # A loop comes round to the accesses again.
        ((".L_0:", LOAD, STORE, WAIT, "@P0| BRA `(.L_0)", EXIT), False),
        ((WAIT, EXIT), False),
    ],
)
def test_a_wait_after_the_last_access_is_idle(code, idle):
    found = kernel(*code)
    assert found.idle == idle
    assert found.unwaited == idle


@pytest.mark.parametrize(
    ("code", "doubt"),
    [
        ((STORE, WAIT, LOAD, STORE, EXIT), "stores to global memory before it waits"),
        # Whole blocks go round the wait; barriers in a block do not help them.
        ((*BY_BLOCK, SKIP, WAIT, ".L_1:", LOAD, SYNC, STORE, EXIT), "a path round the wait"),
        (("@P0| ACQBULK", LOAD, STORE, EXIT), "a path round the wait"),
        # One thread waits, and the others do not wait for it.
        ((*BY_THREAD, SKIP, WAIT, ".L_1:", LOAD, STORE, EXIT), "threads store beside those"),
        ((*BY_THREAD, SKIP, WAIT, ".L_1:", SYNC, LOAD, STORE, EXIT), None),
        # Specialised warps: the consumer stores once the producer let it.
        (
            (*BY_THREAD, SKIP, WAIT, LOAD, EXIT, ".L_1:",
             "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3", MMA, STORE, EXIT),
            None,
        ),
        ((*BY_BLOCK, SKIP, WAIT, LOAD, STORE, EXIT, ".L_1:", EXIT), None),
        ((LOAD, WAIT, LOAD, STORE, EXIT), None),
        ((WAIT, LOAD, STORE, EXIT), None),
    ],
)  # fmt: skip
def test_what_may_run_without_the_wait_is_doubted(code, doubt):
    doubts = kernel(*code).doubts
    assert any(doubt in each for each in doubts) if doubt else not doubts


OPS = ("wait", "load", "store", "exit", "jump", "branch")


@given(
    st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 9)), min_size=1, max_size=10),
)
def test_an_early_store_is_never_missed_nor_invented(program):
    """Branches here part whole blocks, so a store on any path without a wait is doubted."""
    size = len(program)
    lines = {"wait": WAIT, "load": LOAD, "store": STORE, "exit": EXIT}
    code, reached, todo = [], set(), [(0, False)]
    for at, (op, target) in enumerate(program):
        jump = f"BRA `(.L_{target % size})"
        code += [f".L_{at}:", lines.get(op, jump if op == "jump" else f"@P0| {jump}")]
    while todo:
        at, waited = todo.pop()
        if (at, waited) in reached or at >= size:
            continue
        reached.add((at, waited))
        op, target = program[at]
        if op in ("jump", "branch"):
            todo.append((target % size, waited))
        if op not in ("jump", "exit"):
            todo.append((at + 1, waited or op == "wait"))
    waits = any(program[at][0] == "wait" for at, _ in reached)
    early = any(program[at][0] == "store" and not waited for at, waited in reached)
    found = kernel(*code)
    assert bool(found.doubts) == (waits and early and not found.idle)


WEIGHTS = """
        /*0000*/                   LDC.64 R2, c[0x0][0x380] ;
        /*0010*/                   LDC.64 R4, c[0x0][0x388] ;
        /*0020*/                   LDC.64 R6, c[0x0][0x390] ;
        /*0030*/                   LDG.E R10, desc[UR4][R4.64] ;
        /*0040*/                   LDG.E R11, desc[UR4][{second}.64] ;
        /*0050*/                   ACQBULK ;
        /*0060*/                   LDG.E R12, desc[UR4][{third}.64] ;
        /*0070*/                   FMUL R13, R10, {factor} ;
        /*0080*/                   HMMA.16816.F32 R16, R13, R12, RZ ;
        /*0090*/                   EXIT ;
"""
POINTERS = tuple((0x380 + 8 * i, 8) for i in range(3))


@pytest.mark.parametrize(
    ("second", "third", "factor", "doubtful"),
    [
        ("R6", "R2", "R11", False),  # codes and scales before, activations after
        ("R6", "R2", "R12", True),  # what belongs together is read on both sides of the wait
        ("R6", "R6", "R11", True),  # nothing is read after the wait that was not before
    ],
)
def test_operands_that_belong_together_are_read_on_one_side(second, third, factor, doubtful):
    text = WEIGHTS.format(second=second, third=third, factor=factor).encode()
    found = list(origins.early_operands(text, {0x30, 0x40}, POINTERS))
    assert bool(found) == doubtful
    assert not list(origins.early_operands(text, {0x30, 0x40}, None)), "nothing is known of them"


@pytest.mark.parametrize(
    ("code", "thread"),
    [
        ("S2R R0, SR_TID.X ;", True),
        ("S2UR UR4, SR_CTAID.X ;\n        /*0008*/ MOV R0, UR4 ;", False),
        ("LDC R0, c[0x0][0x380] ;", False),
        ("S2R R0, SR_LANEID ;", True),
    ],
)
def test_a_predicate_is_traced_to_thread_or_block(code, thread):
    text = (
        f"        /*0000*/                   {code}\n"
        "        /*0010*/                   ISETP.NE.AND P1, PT, R0, 0x1, PT ;\n"
        "        /*0020*/                   P2R R9, PR, RZ, 0x2 ;\n"
        "        /*0030*/                   ISETP.NE.AND P3, PT, R9, RZ, PT ;\n"
        "        /*0040*/               @P3 BRA `(.L_1) ;\n"
        "        /*0050*/                   ACQBULK ;\n.L_1:\n"
        "        /*0060*/                   EXIT ;\n"
    ).encode()
    found = origins.predicate_origins(text, {0x40: b"P3"})
    assert bool(found[0x40] & origins.THREAD) == thread
