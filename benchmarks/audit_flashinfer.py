"""Audit FlashInfer's FP4 modules as installed, as compiled units, and linked together; no GPU.

    python benchmarks/audit_flashinfer.py build FOLDER --site 0.6.6=SITE --site 0.6.7=SITE
    python benchmarks/audit_flashinfer.py installs --site 0.6.6=SITE ... --out RESULT.json
    python benchmarks/audit_flashinfer.py units FOLDER --out RESULT.json

SITE is a folder that holds the package `flashinfer`: an environment's site-packages or an unpacked
wheel. One unit takes one to ten minutes and 6 GB, so they are built one by one. CUTLASS includes
cuRAND's headers: `pip install nvidia-curand` where the toolkit has none.

`installs` judges each version three times: by its absolute path, by a relative one, and inside a
virtual environment that can also see the FlashInfer of the interpreter that runs this. CPU seconds
are those of the audit and of the install's own interpreter; what nvcc took stands beside them.
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
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from fp4tune.machine import codedigest
from fp4tune.probes import audit
from fp4tune.probes.audit import barrier, judge, sources

VULNERABLE = ("0.5.3", "0.6.4", "0.6.5", "0.6.6")
"""Versions whose SM120 FP4 GEMM was built without the wait (FlashInfer issues 2708 and 2716)."""
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


def installs(sites: dict[str, Path], sm: int, forms: list[str]) -> Iterator[dict]:
    """One row a version and form, for the FP4 GEMM, and what else was found in it."""
    for version, site in sites.items():
        for form in forms:
            with tempfile.TemporaryDirectory() as scratch:
                yield {"version": version, "form": form} | _install(form, site, Path(scratch), sm)


def _install(form: str, site: Path, scratch: Path, sm: int) -> dict:
    path = site.resolve()
    if form == "relative":
        os.chdir(site.parent)
        path = Path(site.name)
    elif form == "venv":
        venv.create(scratch / "env", with_pip=False, symlinks=True)
        (packages,) = (scratch / "env").glob("lib/python3*/site-packages")
        for each in site.iterdir():
            (packages / each.name).symlink_to(each.resolve())
        seen = [sysconfig.get_path("purelib"), *(p for p in sys.path if "site-packages" in p)]
        (packages / "others.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n")
        path = scratch / "env"
    barrier._tried.cache_clear()
    compiled = _Timed()
    barrier._compiled, kept = compiled.around(barrier._compiled), barrier._compiled
    before, start = _cpu(), time.monotonic()
    try:
        reports = list(audit.audits([path], audit.AuditOptions(sm, jobs=1)))
    finally:
        barrier._compiled = kept
    own = _cpu() - before - compiled.seconds
    gemm = [r for r in reports if r.module.name.startswith("fp4_gemm_cutlass")]
    return {
        "verdict": "/".join(sorted({r.verdict for r in gemm})),
        "authority": "/".join(sorted({r.authority for r in gemm})),
        "evidence": [line for r in gemm for line in r.evidence],
        "others": {r.module.name: r.verdict for r in reports if r not in gemm},
        "cpu_seconds_beside_nvcc": round(own, 1),
        "cpu_seconds_of_nvcc": round(compiled.seconds, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


class _Timed:
    """CPU seconds of the processes that a function starts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function):
        def timed(*arguments):
            before = _cpu()
            try:
                return function(*arguments)
            finally:
                self.seconds += _cpu() - before

        return timed


def _cpu() -> float:
    """Of this process and its children that ended, in seconds."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def units(folder: Path) -> Iterator[dict]:
    """One row a form of the compiled units: alone, stripped, linked together in either order."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        objects = sorted(folder.glob("*-stock.o"))
        forms = {each.stem: each for each in objects}
        for each in objects:
            forms[f"{each.stem}, stripped"] = _made(["strip", "-o"], place / f"s-{each.name}", each)
        for number, order in enumerate((objects, objects[::-1])):
            linked = place / f"linked-{number}.so"
            more = ["-cudart", "shared", "-Xlinker", "--allow-multiple-definition"]
            _made(["nvcc", "-shared", *more, "-o"], linked, *order)
            name = " + ".join(each.stem for each in order)
            forms[f"{name}, linked"] = linked
            forms[f"{name}, linked and stripped"] = _made(
                ["strip", "-o"], place / f"stripped-{number}.so", linked
            )
        for name, file in forms.items():
            yield {"unit": name} | _unit(file)


def _made(command: list[str], to: Path, *sources_: Path) -> Path:
    subprocess.run([*command, str(to), *map(str, sources_)], check=True, capture_output=True)
    return to


def _unit(file: Path) -> dict:
    before, start = _cpu(), time.monotonic()
    (report,) = audit.audit([file])
    kernels = [k for k in report.kernels if k["mma"]]
    return {
        "verdict": report.verdict,
        "authority": report.authority,
        "launched_with_pdl": report.pdl,
        "kernels": len(kernels),
        "block_scaled_mma": sum(k["block_scaled"] for k in kernels),
        "acqbulk": sum(k["waits"] for k in kernels),
        "waits": sorted(k["wait"] for k in kernels),
        "kernel_verdicts": sorted(k["verdict"] for k in kernels),
        "digest": report.digest,
        "cpu_seconds": round(_cpu() - before, 1),
        "seconds": round(time.monotonic() - start, 1),
        "evidence": list(report.evidence),
    }


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
    parser.add_argument("command", choices=("build", "installs", "units"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--site", action="append", default=[], metavar="VERSION=FOLDER")
    parser.add_argument("--form", action="append", choices=("absolute", "relative", "venv"))
    parser.add_argument("--arch", type=int, default=120)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sites = {v: Path(f).resolve() for v, _, f in (pair.partition("=") for pair in asked.site)}
    out = asked.out.resolve() if asked.out else None
    if asked.command == "build":
        build(asked.folder, sites)
        return
    rows = []
    forms = asked.form or ["absolute", "relative", "venv"]
    for row in (
        installs(sites, asked.arch, forms) if asked.command == "installs" else units(asked.folder)
    ):
        print(json.dumps({k: v for k, v in row.items() if k != "evidence"}), flush=True)
        if asked.command == "installs":
            row["known"] = "vulnerable" if row["version"] in VULNERABLE else "fixed"
        rows.append(row)
    _keep(out, {"machine": machine(), asked.command: rows})


def _keep(out: Path | None, result: dict) -> None:
    """Put into `out` beside what is there."""
    if out:
        there = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(there | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
