"""The ground is under everything: it needs the standard library, and none of the other rooms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOM = Path(__file__).resolve().parents[1] / "machine"
CODE = """
import importlib, json, sys
import fp4tune
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(f"fp4tune.machine.{name}")
new = {name.partition(".")[0] for name in set(sys.modules) - before}
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("fp4tune.")}
print(json.dumps([sorted(new - sys.stdlib_module_names - {"fp4tune"}), sorted(rooms)]))
"""


def test_the_ground_imports_the_standard_library_and_no_other_room():
    """So an engine's reader, a worker in another interpreter and the daemon may all stand on it."""
    names = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")
    command = [sys.executable, "-c", CODE, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    others, rooms = json.loads(done.stdout)
    assert others == [] and set(rooms) <= {"machine", "errors"}
