"""Starts a worker or a fork server by this file's path, in any interpreter.

The interpreter under test (an engine's own) need not have fp4tune installed, and the checkout need
not be called fp4tune: the package is made from the folder this file lies in. ``bootstrap.py serve
FD`` is a fork server; ``bootstrap.py work READ WRITE`` a worker.
"""

import importlib.util
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _package() -> None:
    # Running a file puts its own folder first on the path, where our names would hide others'.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    spec = importlib.util.spec_from_file_location(
        "fp4tune", os.path.join(_ROOT, "__init__.py"), submodule_search_locations=[_ROOT]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["fp4tune"] = package
    spec.loader.exec_module(package)


def _main(what: str, *fds: int) -> None:
    if what == "work":
        from fp4tune.probes.worker.server import main

        main(*fds)
        return
    from fp4tune.probes.worker.fork_server import serve

    role = serve(*fds)
    if role is not None:
        # A forked worker: what is below is this file's frame and no more, and it ends as a
        # program does.
        role()


if __name__ == "__main__":
    _package()
    words, sys.argv[1:] = sys.argv[1:], []
    _main(words[0], *map(int, words[1:]))
