"""The FP4 weights of a checkpoint: which tensors each is made of, and tensors that lack a partner.

Told by names, dtypes and sizes, so that a quantisation config is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint import Checkpoint, Entry
from .stored import NO_KNOWN_NAME, fp4_sizes, of_no_known_name


@dataclass(frozen=True, slots=True)
class Naming:
    """What a weight's tensors are called: each is a prefix and one of these suffixes.

    `divides`: a value is code times block scale *over* the global scale, not times it.
    """

    name: str
    codes: str
    scales: str
    global_scale: str
    input_scale: str
    divides: bool = False


NAMINGS = (
    Naming("modelopt", ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    Naming(
        "compressed-tensors",
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
        ".input_global_scale",
        divides=True,
    ),
    Naming("deepseek", ".weight", ".scale", ".global_scale", ".input_scale"),
    Naming(
        "torchao",
        "._weight_qdata",
        "._weight_scale",
        "._weight_per_tensor_scale",
        "._weight_act_per_tensor_scale",
    ),
    Naming(
        "fp-quant", ".qweight", ".scales", ".weight_global_scale", ".act_global_scale", divides=True
    ),
    Naming("modelopt experts", "", "_weight_scale", "_weight_scale_2", "_input_scale"),
    Naming("blocks", "_blocks", "_scales", "_global_scale", "_input_scale"),
)
_CODES = ("U8", "I8", "F4")
_SCALES = ("U8", "F8_E4M3", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One FP4 weight: its format, and its tensors; None for those that are not there."""

    prefix: str
    format: str
    naming: Naming
    codes: Entry
    scales: Entry
    global_scale: Entry | None
    input_scale: Entry | None

    @property
    def parent(self) -> str:
        return self.prefix.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.prefix.rpartition(".")[2]

    @property
    def aligned(self) -> bool:
        """Whether the codes of one block lie together, in the order of the scales."""
        shape = self.scales.shape
        return shape[:-1] == self.codes.shape[:-1] or shape == self.codes.shape[:-1]


def weights(checkpoint: Checkpoint) -> tuple[list[StoredWeight], dict[str, str]]:
    """The FP4 weights, and what looks like one and cannot be told: tensor to reason."""
    found: list[StoredWeight] = []
    odd: dict[str, str] = {}
    entries = checkpoint.entries
    taken: set[str] = set()
    for naming in NAMINGS:
        for name, codes in entries.items():
            if not name.endswith(naming.codes) or codes.dtype not in _CODES or name in taken:
                continue
            prefix = name[: len(name) - len(naming.codes)]
            scales = entries.get(prefix + naming.scales)
            if scales is None or scales.name == name or scales.dtype not in _SCALES:
                continue
            if codes.dtype == "I8" and scales.dtype != "F8_E8M0":
                continue
            taken.update((name, scales.name))
            format_ = _format(codes, scales)
            if format_ is None:
                odd[name] = f"its block scales, {scales.dtype} {list(scales.shape)}, do not fit"
                continue
            found.append(
                StoredWeight(
                    prefix,
                    format_,
                    naming,
                    codes,
                    scales,
                    entries.get(prefix + naming.global_scale),
                    entries.get(prefix + naming.input_scale),
                )
            )
    for name, entry in entries.items():
        if name not in taken and of_no_known_name(name, entry.dtype, entry.shape):
            odd[name] = NO_KNOWN_NAME
    return sorted(found, key=lambda w: w.prefix), odd


def unpaired(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors of FP4 weights whose partner is missing: tensor to what is.

    Codes without block scales, and block scales without codes, by whichever naming.
    """
    entries = checkpoint.entries
    found: dict[str, str] = {}
    for name, entry in entries.items():
        if entry.dtype in ("U8", "F4") and len(entry.shape) > 1:
            missing = _scales_missing(name, checkpoint)
            if missing:
                found[name] = f"codes without block scales: there is no {missing}"
        elif entry.dtype in _SCALES and len(entry.shape) > 1:
            missing = _codes_missing(name, checkpoint)
            if missing:
                found[name] = f"block scales without codes: there is no {missing}"
    return found


def _scales_missing(name: str, checkpoint: Checkpoint) -> str:
    entries = checkpoint.entries
    ours = [n for n in NAMINGS if n.codes and name.endswith(n.codes)]
    if ".experts" in name and not ours:
        ours = [n for n in NAMINGS if n.name == "modelopt experts"]
        if name.endswith(("_scale", "_scales", "_scale_2", "scale_inv", "_bias")):
            return ""
    prefixes = [(n, name[: len(name) - len(n.codes)]) for n in ours]
    if not ours or any(prefix + n.scales in entries for n, prefix in prefixes):
        return ""
    naming, prefix = prefixes[0]
    # Other methods keep 8-bit words, too: those have tensors of their own beside them.
    others = (".absmax", "_scale_inv", ".weight_format", ".SCB", ".qzeros", ".weight.absmax")
    if any(prefix + other in entries or name + other in entries for other in others):
        return ""
    return prefix + naming.scales


def _codes_missing(name: str, checkpoint: Checkpoint) -> str:
    entries = checkpoint.entries
    ours = [n for n in NAMINGS if name.endswith(n.scales) and n.scales != ".scale"]
    if ".experts" not in name:  # other layers have their scales in tensors called just so
        ours = [n for n in ours if n.scales.startswith(".")]
    prefixes = [(n, name[: len(name) - len(n.scales)]) for n in ours]
    if not ours or any(prefix + n.codes in entries for n, prefix in prefixes):
        return ""
    if any(f"{prefix}.weight" in entries or prefix in entries for _, prefix in prefixes):
        return ""
    naming, prefix = prefixes[0]
    return prefix + naming.codes


def _format(codes: Entry, scales: Entry) -> str | None:
    if not scales.nbytes or (2 * codes.nbytes) % scales.nbytes:
        return None
    block = 2 * codes.nbytes // scales.nbytes
    packed = 1 if codes.dtype == "F4" else 2
    if len(codes.shape) < 2 or fp4_sizes(codes.shape, scales.shape, packed, block) is None:
        return None
    if block == 16 and scales.dtype in ("F8_E4M3", "U8"):
        return "nvfp4"
    return "mxfp4" if block == 32 and scales.dtype in ("F8_E8M0", "U8") else None


def by_parent(found: Sequence[StoredWeight]) -> dict[str, dict[str, StoredWeight]]:
    """The weights of each parent module by the last part of their names."""
    parents: dict[str, dict[str, StoredWeight]] = {}
    for weight in found:
        parents.setdefault(weight.parent, {})[weight.leaf] = weight
    return parents
