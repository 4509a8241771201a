"""What the first owner of a new GPU runs: everything this program can say about that node.

    python benchmarks/verify_hardware.py --out FOLDER [--level quick] [--shape N,K ...] [--no-old]
    make verify-hardware

Every backend and tactic in both formats and both activations, the self-test, the audit, and
FlashInfer 0.6.4 beside the installed one in an environment of its own. FOLDER then holds what each
step printed, the state directory, ``rows.json`` for docs/verification.md, and all of it as
``bundle.zip`` to send. A step that fails or has no GPU to run on is said, and the rest goes on.
Nothing in FOLDER names the machine: GPU identifiers and host names are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OLD = "0.6.4"
"""The FlashInfer whose SM120 FP4 GEMM lacked the wait."""
SHAPES = ("4096,4096", "14336,4096", "4096,14336")
SECONDS = {"probe": 4 * 3600.0, "selftest": 1800.0, "audit": 3600.0, "install": 1800.0}
_UUID = re.compile(r"(GPU|MIG)-[0-9a-fA-F-]{8,}")


@dataclass(slots=True)
class Step:
    """One command: `status` is ``done``, ``failed`` or ``not run``, with the reason in `why`.

    Exit code 1 is an answer here (something is unsafe), and so ``done``.
    """

    name: str
    status: str
    seconds: float = 0.0
    exit_code: int | None = None
    why: str | None = None
    output: Any = None


def fp4tune(name: str, arguments: Sequence[str], seconds: float, out: Path) -> Step:
    """Run one command of this program; what it printed goes to FOLDER/NAME.json and .err."""
    start = time.monotonic()
    command = [sys.executable, "-m", "fp4tune.cli", *arguments, "--json"]
    print(f"{name}: fp4tune {' '.join(arguments)}", flush=True)
    with open(out / f"{name}.err", "w") as err:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=err, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return Step(name, "failed", seconds, None, f"it took longer than {seconds:g} s")
    took = round(time.monotonic() - start, 1)
    try:
        output = json.loads(_UUID.sub("GPU", done.stdout))
    except ValueError:
        said = (out / f"{name}.err").read_text().strip().splitlines()
        return Step(name, "failed", took, done.returncode, said[-1] if said else "it said nothing")
    (out / f"{name}.json").write_text(json.dumps(output, indent=1) + "\n")
    return Step(name, "done", took, done.returncode, None, output)


def sm_here() -> int | None:
    """The SM of GPU 0; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return int(10 * major + minor)


def old_flashinfer(folder: Path) -> Path:
    """An environment with FlashInfer `OLD`, and everything else from this one; its interpreter.

    Raises subprocess.CalledProcessError and TimeoutExpired.
    """
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    # After its own folder on the path: its FlashInfer is found first.
    (site / "beside.pth").write_text("\n".join(p for p in sys.path if p.endswith("packages")))
    wanted = [f"flashinfer-python=={OLD}", "--no-deps", "--quiet"]
    subprocess.run(
        [python, "-m", "pip", "install", *wanted], check=True, timeout=SECONDS["install"]
    )
    return python


def ran(report: dict[str, Any]) -> dict[str, list[str]]:
    """Backend to the verdicts of what was launched and checked at all."""
    found: dict[str, list[str]] = {}
    for candidate in report.get("candidates", ()):
        if candidate["launches"] > 0:
            found.setdefault(candidate["backend"], []).append(candidate["verdict"])
    return found


def rows(report: dict[str, Any], sm: int, level: str) -> list[dict[str, Any]]:
    """Rows for docs/verification.json: only what this probe launched and checked."""
    name = report["device"]["name"]
    made = []
    for backend, verdicts in sorted(ran(report).items()):
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
        ground = f"probe on {name}, level {level}: {counts}"
        made.append({"backend": backend, "sm": sm, "level": "run", "ground": ground})
    return made


def bundle(out: Path) -> Path:
    """Everything in FOLDER, in one file."""
    path = out / "bundle.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(out.rglob("*")):
            inside = file.relative_to(out)
            if file.is_file() and file != path and inside.parts[0] != "old-flashinfer":
                archive.write(file, inside)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--level", default="standard")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--no-old", action="store_true", help=f"leave FlashInfer {OLD} out")
    asked = parser.parse_args()
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ["FP4TUNE_STATE"] = str(out / "state")
    sm = sm_here()
    steps = [fp4tune("backends", ["backends"], 600.0, out)]
    steps.append(fp4tune("audit", ["audit"], SECONDS["audit"], out))
    found: list[dict[str, Any]] = []
    shapes = [part for shape in asked.shape or SHAPES for part in ("--shape", shape)]
    common = ["--format", "nvfp4", "--format", "mxfp4", "--level", asked.level, "--seed", "1"]
    if sm is None:
        why = "there is no GPU here"
        names = ("selftest", "probe", f"probe-flashinfer-{OLD}")
        steps += [Step(name, "not run", why=why) for name in names]
    else:
        steps.append(fp4tune("selftest", ["selftest"], SECONDS["selftest"], out))
        probe = fp4tune("probe", ["probe", *shapes, *common], SECONDS["probe"], out)
        steps.append(probe)
        if probe.output:
            report = probe.output[0] if isinstance(probe.output, list) else probe.output
            found = rows(report, sm, asked.level)
    if asked.no_old:
        steps.append(Step(f"flashinfer-{OLD}", "not run", why="--no-old"))
    else:
        steps += old(out, sm, [*shapes, *common])
    (out / "rows.json").write_text(json.dumps(found, indent=1) + "\n")
    told = [{k: v for k, v in asdict(step).items() if k != "output"} for step in steps]
    (out / "steps.json").write_text(json.dumps(told, indent=1) + "\n")
    for step in steps:
        print(f"{step.status:8} {step.name}" + (f": {step.why}" if step.why else ""))
    print(f"{len(found)} rows for docs/verification.md; send {bundle(out)}")


def old(out: Path, sm: int | None, arguments: Sequence[str]) -> list[Step]:
    """FlashInfer `OLD`: audited from its own environment, and probed where there is a GPU."""
    name, folder = f"flashinfer-{OLD}", out / "old-flashinfer"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        python = old_flashinfer(folder)
    except (subprocess.SubprocessError, OSError) as error:
        return [Step(name, "failed", why=f"it could not be installed: {error}")]
    (site,) = folder.glob("lib/python3*/site-packages")
    arch = [] if sm is None else ["--arch", str(sm)]
    steps = [fp4tune(f"audit-{name}", ["audit", str(site), *arch], SECONDS["audit"], out)]
    if sm is not None:
        # Its verdicts must not stand beside those of the installed one.
        place = ["--state", str(out / "state-old")]
        only = ["--backend", "flashinfer-cutlass", "--backend", "torch-dequant-w4a4"]
        steps.append(
            fp4tune(
                f"probe-{name}",
                ["probe", *arguments, *only, *place, "--python", str(python)],
                SECONDS["probe"],
                out,
            )
        )
    return steps


if __name__ == "__main__":
    main()
