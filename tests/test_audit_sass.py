"""Reading machine code: what multiplies, what waits, and what comes before the wait."""

from __future__ import annotations

import io

import pytest
from audit_sass import EXIT, LOAD, MMA, PARAMETER, STORE, WAIT, section
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes.audit import flow, sass


def read(*sections: str, block: int = 1 << 20) -> list[sass.SassKernel]:
    return list(flow.kernels(sass.pieces(io.BytesIO("".join(sections).encode()).read, block)))


def wait_of(*code: str) -> str:
    (kernel,) = read(section("k", code))
    return kernel.wait


@pytest.mark.parametrize(
    ("code", "wait"),
    [
        ((PARAMETER, LOAD, MMA, STORE, EXIT), "no-wait"),
        ((PARAMETER, WAIT, LOAD, MMA, STORE, EXIT), "wait-present"),
        ((PARAMETER, LOAD, WAIT, MMA, STORE, EXIT), "access-before-wait"),
        # Only one side of a branch waits.
        (("@P0| BRA `(.L_1)", WAIT, ".L_1:", LOAD, EXIT), "access-before-wait"),
        (("@P0| BRA `(.L_1)", WAIT, LOAD, ".L_1:", EXIT), "wait-present"),
        # Both wait, each for itself.
        (
            ("@P0| BRA `(.L_1)", WAIT, "BRA `(.L_2)", ".L_1:", WAIT, ".L_2:", LOAD, EXIT),
            "wait-present",
        ),
        (("@P1| ACQBULK", LOAD, EXIT), "access-before-wait"),
        (("@!PT| ACQBULK", LOAD, EXIT), "no-wait"),
        ((LOAD, EXIT, WAIT), "no-wait"),
        # What never runs before the wait, and what is not global memory.
        (("BRA `(.L_2)", LOAD, ".L_2:", WAIT, STORE, EXIT), "wait-present"),
        (
            ("LDS R1, [R2]", "STS [R2], R1", "LDL R3, [R1]", "LDCU UR4, c[0x0][0x358]", WAIT, EXIT),
            "wait-present",
        ),
        (("UTMAPF.L2.2D [UR4], [UR8]", WAIT, LOAD, EXIT), "wait-present"),
        # A loop back to the start does not come before its own wait.
        ((".L_0:", WAIT, LOAD, "@P0| BRA `(.L_0)", EXIT), "wait-present"),
        (("@P0| BRA.U.ANY `(.L_1)", WAIT, LOAD, EXIT, ".L_1:", EXIT), "wait-present"),
        (
            (
                'BRX R2 -0x40 (*"BRANCH_TARGETS .L_1,.L_2"*)',
                ".L_1:",
                WAIT,
                EXIT,
                ".L_2:",
                LOAD,
                EXIT,
            ),
            "access-before-wait",
        ),
        (
            (
                "BSSY B0, `(.L_1)",
                "@P0| BRA `(.L_0)",
                WAIT,
                ".L_0:",
                "BSYNC B0",
                ".L_1:",
                LOAD,
                EXIT,
            ),
            "access-before-wait",
        ),
        (("BSSY B0, `(.L_1)", "BSYNC B0", LOAD, ".L_1:", WAIT, EXIT), "access-before-wait"),
    ],
)
def test_the_walk_finds_what_can_run_before_the_wait(code, wait):
    assert wait_of(*code) == wait


@pytest.mark.parametrize(
    "access",
    ["LD.E R8, desc[UR4][R4.64]", "ST.E [R2.64], R3", "LDGSTS.E [R1], desc[UR4][R2.64]",
     "UTMALDG.3D [UR32], [UR50], desc[UR14]", "UTMASTG.2D [UR4], [UR6]",
     "UBLKCP.S.G [UR4], [UR6], UR8", "ATOMG.E.ADD R1, desc[UR4][R2.64], R3",
     "REDG.E.ADD.F32 desc[UR4][R2.64], R3", "RED.E.ADD desc[UR4][R2.64], R3"],
)  # fmt: skip
def test_every_kind_of_global_access_counts(access):
    (kernel,) = read(section("k", (access, WAIT, MMA, EXIT)))
    assert kernel.wait == "access-before-wait"
    assert kernel.first_access == f"0x0000 {access}"


def test_called_functions_are_followed_wherever_they_stand():
    call = "CALL.REL.NOINC `(helper)"
    waits = section("helper", (WAIT, "RET.REL.NODEC R2 `(k)"), entry=False)
    loads = section("helper", (LOAD, "RET.REL.NODEC R2 `(k)"), entry=False)
    first = section("k", (call, LOAD, MMA, EXIT))
    then_waits = section("k", (call, WAIT, LOAD, EXIT))
    for order in (lambda *s: s, lambda *s: s[::-1]):
        assert [k.wait for k in read(*order(waits, first))] == ["wait-present"]
        assert [k.wait for k in read(*order(loads, then_waits))] == ["access-before-wait"]
        assert [k.wait for k in read(*order(loads, first))] == ["no-wait"]
    # A function in the kernel's own section.
    inside = ("CALL.REL.NOINC `($k$f)", LOAD, EXIT, "$k$f:", WAIT, "RET.REL.NODEC R2 `(k)")
    assert wait_of(*inside) == "wait-present"


def test_what_cannot_be_followed_is_said():
    (kernel,) = read(section("k", ("CALL.ABS.NOINC R2", "BRX R4", WAIT, EXIT)))
    assert kernel.unfollowed == ("0x0000 CALL indirect", "0x0010 BRX")
    assert kernel.wait == "wait-present", "there is a wait, and it may be reached"


@pytest.mark.parametrize(
    ("text", "kind", "scaled"),
    [
        (MMA, "OMMA.SF", True),
        ("QMMA.SF.16832.F32.E4M3.E4M3.E8 R4, R8, R12, R4, R0, R3, URZ", "QMMA.SF", True),
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R2, R4", "QMMA", False),
        ("HMMA.16816.F32.BF16 R8, R4, R10, RZ", "HMMA", False),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA", False),
        ("UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR10], tmem[UR4], idesc[UR5], UP0", "UTCHMMA",
         False),
        ("UTCQMMA gdesc[UR12], gdesc[UR14], tmem[UR10], tmem[UR4], idesc[UR5], UP0", "UTCQMMA",
         False),
        ("UTCQMMA gdesc[UR1], gdesc[UR2], tmem[UR3], tmem[UR4], idesc[UR5], tmem[UR8], UP0",
         "UTCQMMA block-scaled", True),
        ("UTCOMMA.4X gdesc[UR1], gdesc[UR2], tmem[UR3], tmem[UR4], idesc[UR5], tmem[UR8], UP0",
         "UTCOMMA", True),
    ],
)  # fmt: skip
def test_kinds_of_matrix_instructions(text, kind, scaled):
    (kernel,) = read(section("k", (text, text, EXIT)))
    assert kernel.mma == {kind: 2}
    assert kernel.block_scaled == (2 if scaled else 0)


@given(st.integers(min_value=1, max_value=400))
def test_how_the_text_is_cut_does_not_matter(block):
    text = (
        section("first", (PARAMETER, LOAD, WAIT, MMA, EXIT)),
        section("_Z6secondIN7cutlass", ("@P0| BRA `(.L_9)", MMA, WAIT, ".L_9:", EXIT)),
    )
    assert read(*text, block=block) == read(*text)


OPS = ("wait", "load", "nothing", "exit", "jump", "branch")
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(OPS), st.integers(min_value=0, max_value=11)), min_size=1, max_size=12
)


@given(PROGRAMS)
def test_the_walk_agrees_with_running_every_path(program):
    """The oracle lets the state (instruction, waited?) spread until nothing is new."""
    size = len(program)
    code, reached, todo = [], set(), [(0, False)]
    for at, (op, target) in enumerate(program):
        code += [f".L_{at}:", {"wait": WAIT, "load": LOAD, "nothing": MMA, "exit": EXIT,
                               "jump": f"BRA `(.L_{target % size})",
                               "branch": f"@P0| BRA `(.L_{target % size})"}[op]]  # fmt: skip
    while todo:
        state = todo.pop()
        at, waited = state
        if state in reached or at >= size:
            continue
        reached.add(state)
        op, target = program[at]
        if op in ("jump", "branch"):
            todo.append((target % size, waited))
        if op not in ("jump", "exit"):
            todo.append((at + 1, waited or op == "wait"))
    # A wait counts where it can be the first on some path.
    waits = any(program[at][0] == "wait" and not waited for at, waited in reached)
    early = any(program[at][0] == "load" and not waited for at, waited in reached)
    expected = ("access-before-wait" if early else "wait-present") if waits else "no-wait"
    assert wait_of(*code) == expected
