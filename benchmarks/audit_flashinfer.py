"""Audit real compiled units of FlashInfer's SM120 FP4 GEMM, as shipped and with its flag changed.

    python benchmarks/audit_flashinfer.py build FOLDER --site 0.6.4=SITE --site 0.7.2.post1=SITE
    python benchmarks/audit_flashinfer.py audit FOLDER --site ... --out RESULT.json

SITE is a folder that holds the package `flashinfer`: an environment's site-packages or an unpacked
wheel. No GPU is needed. One unit takes one to four minutes and 6 GB, so they are built one by one.
CUTLASS includes cuRAND's headers: `pip install nvidia-curand` where the toolkit has none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from fp4tune.machine import codedigest
from fp4tune.probes import audit
from fp4tune.probes.audit import judge, sources

UNIT = "fp4_gemm_cutlass___nv_bfloat16_128_128_128"
MEMORY = 12 << 30
"""Address space one compiler may take, in bytes."""


def build(folder: Path, sites: dict[str, Path]) -> None:
    """Compile UNIT from each site with its own flags, and with the barrier's flag turned round."""
    folder.mkdir(parents=True, exist_ok=True)
    for version, site in sites.items():
        with sources.modules([site], 120) as found:
            spec = next(f for f in found if f.module.name == "fp4_gemm_cutlass_sm120")
            assert spec.build is not None and spec.module.version == version, spec
            unit = next(s for s in spec.build.sources if UNIT in s.name)
            stock = [f for f in spec.build.flags if not f.startswith("--generate-dependencies")]
            has = judge.FLAG in stock
            turned = [f for f in stock if f != judge.FLAG] if has else [*stock, judge.FLAG]
            for kind, flags in (("stock", stock), ("no-flag" if has else "flag", turned)):
                to = folder / f"flashinfer-{version}-{kind}.o"
                start = time.monotonic()
                subprocess.run(
                    ["nice", "-n", "15", shutil.which("nvcc") or "nvcc", *flags, *_curand()]
                    + ["-c", str(unit), "-o", str(to)],
                    check=True,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
                )
                print(f"{to.name}: {time.monotonic() - start:.0f} s")


def _curand() -> Iterator[str]:
    for base in sys.path:
        for header in Path(base).glob("nvidia/*/include/curand_kernel.h"):
            yield from ("-isystem", str(header.parent))


def audited(folder: Path) -> list[dict]:
    """One row per unit, judged by its machine code: beside it are neither flags nor sources."""
    rows = []
    for unit in sorted(folder.glob("*.o")):
        start = time.monotonic()
        (report,) = audit.audit([unit])
        kernels = [k for k in report.kernels if k["mma"]]
        rows.append(
            {
                "unit": unit.stem,
                "verdict": report.verdict,
                "authority": report.authority,
                "launched_with_pdl": report.pdl,
                "kernels": len(kernels),
                "block_scaled_mma": sum(k["block_scaled"] for k in kernels),
                "acqbulk": sum(k["waits"] for k in kernels),
                "preexit": sum(k["triggers"] for k in kernels),
                "waits": sorted(k["wait"] for k in kernels),
                "first_access": [k["first_access"] for k in kernels],
                "digest": report.digest,
                "seconds": round(time.monotonic() - start, 1),
                "evidence": list(report.evidence),
            }
        )
    return rows


def machine() -> dict:
    """What was used, without the machine's name."""
    tool = codedigest.disassembler("nvdisasm") or "nvdisasm"
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return {
        "date": os.environ.get("AUDIT_DATE") or date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU",
        "python": platform.python_version(),
        "nvdisasm": said.strip().splitlines()[-2].partition("release ")[2],
        "nvcc": nvcc.strip().splitlines()[-2].partition("release ")[2],
        "unit": UNIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build")
    one.add_argument("folder", type=Path)
    one.add_argument("--site", action="append", required=True, metavar="VERSION=FOLDER")
    two = commands.add_parser("audit")
    two.add_argument("folder", type=Path)
    two.add_argument("--site", action="append", default=[], metavar="VERSION=FOLDER")
    two.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sites = {v: Path(f) for v, _, f in (pair.partition("=") for pair in asked.site)}
    if asked.command == "build":
        build(asked.folder, sites)
        return
    installs = [
        {key: report.json()[key] for key in ("verdict", "authority", "pdl", "evidence", "remedy")}
        | {"version": version, "module": report.module.name, "sm": report.sm}
        for version, site in sites.items()
        for sm in sources.DEFAULT_SMS
        for report in audit.audit([site], sm)
    ]
    _keep(asked.out, {"machine": machine(), "units": audited(asked.folder), "installs": installs})


def _keep(out: Path | None, result: dict) -> None:
    """Print, and put into `out` beside what is there."""
    print(json.dumps(result, indent=1))
    if out:
        there = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(there | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
