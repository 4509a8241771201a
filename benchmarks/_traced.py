"""``fp4tune``, which also writes down what each worker runs: ``_traced.py FILE ARGUMENTS``.

FILE gets a line of JSON for each worker that has loaded its backend: ``backend``, the device's
``uuid`` (empty for the CPU) and ``pid``. A worker's environment does not say what it runs.
"""

from __future__ import annotations

import json
import sys

from fp4tune.autotune.runner import Runner
from fp4tune.cli import main


def trace(file: str) -> None:
    """Have every greeting of a worker written to `file`."""
    greet = Runner.greet

    def greeted(runner: Runner) -> None:
        greet(runner)
        row = {"backend": runner.spec, "uuid": runner.target.uuid or "", "pid": runner.hello["pid"]}
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    Runner.greet = greeted  # type: ignore[method-assign]


if __name__ == "__main__":
    trace(sys.argv.pop(1))
    main()
