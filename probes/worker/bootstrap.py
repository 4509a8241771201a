"""Starts a worker by this file's path, in any interpreter that has torch.

The interpreter under test (an engine's own) need not have fp4tune installed, and the checkout need
not be called fp4tune: the package is made from the folder this file lies in.
"""

import importlib.util
import os
import sys


def _package() -> None:
    root = os.path.abspath(__file__)
    for _ in ("bootstrap.py", "worker", "probes"):
        root = os.path.dirname(root)
    own = os.path.join(root, "probes", "worker")
    # Running a file puts its own folder first on the path, where our names would hide others'.
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != own]
    spec = importlib.util.spec_from_file_location(
        "fp4tune", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["fp4tune"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _package()
    from fp4tune.probes.worker.server import main

    main(int(sys.argv[1]), int(sys.argv[2]))
