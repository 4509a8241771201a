"""Runs the tests of state, reader and commands as a user without rights, in a copy.

``ordinary.py WORK``: WORK holds ``checkout`` (the copy), ``path`` (a folder to find ``fp4tune`` in,
which is that copy), ``home`` (the user's) and ``kept``. The interpreter and its packages may lie
where only root may look, as below /root: then they are mounted where they are once more, in a
namespace of this process, with folders above them that everyone may pass. Ends with the tests' exit
code, and with 0 and a sentence where they cannot be run so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

USER = 65534
TESTS = ("test_state.py", "test_reader.py", "test_cli.py", "test_doctor.py")


def main(work: Path) -> int:
    if "--inside" not in sys.argv:
        again = ["unshare", "--mount", sys.executable, __file__, str(work), "--inside"]
        try:
            if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:
                return subprocess.call(again)
        except FileNotFoundError:
            pass
        return skipped("nothing can be mounted here")
    needed = {Path(sys.base_prefix), Path(sys.prefix), *map(Path, sys.path)}
    if why := opened({path.resolve() for path in needed if path.is_dir()}, work / "kept"):
        return skipped(why)
    environ = {
        **os.environ,
        "HOME": str(work / "home"),
        "TMPDIR": str(work / "home"),
        "PYTHONPATH": str(work / "path"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    as_user = {"user": USER, "group": USER, "extra_groups": [], "env": environ}
    as_user["cwd"] = str(work / "checkout")
    probe = (
        "import subprocess, sys, pytest, torch; subprocess.run([sys.executable, '-V'], check=True)"
    )
    if subprocess.run([sys.executable, "-c", probe], capture_output=True, **as_user).returncode:
        return skipped(f"such a user cannot run {sys.executable}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu and not slow",
        "--numprocesses",
        "2",
        "--dist",
        "loadfile",
    ]
    return subprocess.call([*command, *(f"tests/{name}" for name in TESTS)], **as_user)


def opened(needed: set[Path], kept: Path) -> str | None:
    """Let everyone reach these folders; None, or why that cannot be."""
    shut: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        above = [*reversed(path.parents), path]
        closed = next((a for a in above if not a.stat().st_mode & 0o001), None)
        if closed is not None:
            shut.setdefault(closed, []).append(path)
    for closed, paths in shut.items():
        places = []
        for number, path in enumerate(paths):
            place = kept / f"{closed.name}-{number}"
            place.mkdir()
            places.append(place)
            if not mounted("--bind", str(path), str(place)):
                return f"{path} cannot be mounted elsewhere"
        if not mounted("-t", "tmpfs", "-o", "mode=755", "none", str(closed)):
            return f"{closed} is not open to all, and nothing can be mounted over it"
        for place, path in zip(places, paths, strict=True):
            path.mkdir(parents=True, exist_ok=True)
            if not mounted("--bind", str(place), str(path)):
                return f"{path} cannot be mounted again"
    return None


def mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def skipped(why: str) -> int:
    print(f"not run once more as an ordinary user: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
