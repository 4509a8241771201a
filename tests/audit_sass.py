"""Machine code as nvdisasm prints it, made from a few instructions: for the audit's tests."""

from __future__ import annotations

from collections.abc import Iterable


def section(name: str, code: Iterable[str], entry: bool = True) -> str:
    """A section of text: instructions, and labels as ``NAME:``."""
    lines = [
        f"//--------------------- .text.{name}          --------------------------",
        f'\t.section\t.text.{name},"ax",@progbits',
        "\t.align\t128",
    ]
    if entry:
        lines.append(f'        .other          {name},@"STO_CUDA_ENTRY STV_DEFAULT"')
    lines += [f"{name}:", f".text.{name}:"]
    at = 0
    for each in code:
        if each.endswith(":"):
            lines.append(each)
            continue
        predicate, _, rest = each.rpartition("| ")
        lines.append(f"        /*{at:04x}*/              {predicate:>5} {rest} ;")
        at += 16
    return "\n".join([*lines, ""])


WAIT = "ACQBULK"
LOAD = "LDG.E R3, desc[UR4][R2.64]"
STORE = "STG.E desc[UR4][R4.64], R3"
PARAMETER = "LDC.64 R2, c[0x0][0x210]"
MMA = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R4, R8, R4, RZ, R0, R3, URZ"
EXIT = "EXIT"
