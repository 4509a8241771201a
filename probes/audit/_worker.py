"""What a FlashInfer install would compile: run as a script by that install's own interpreter.

    python _worker.py PACKAGE SCRATCH ARCH...

Standard library and the install alone. Prints a line of JSON for each architecture, e.g. ``12.0f``:
the specs that its generators make without a GPU, and the file they were imported from. A package
whose import asks for a GPU is entered without its own ``__init__``: generators need none of it.
Generators that would download anything are not called.
"""

import ast
import contextlib
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

DOWNLOADS = re.compile(r"get_cubin|get_artifact|ArtifactPath|get_meta_hash|checksum|download", re.I)
FP4 = re.compile(r"fp4|e2m1|svdquant", re.I)
GEMM = re.compile(r"fp4|svdquant|moe", re.I)


def generators(package):
    """(module, function) of each generator without arguments whose spec may be a GEMM for FP4."""
    for file in sorted((package / "jit").rglob("*.py")):
        text = file.read_text(errors="replace")
        if not FP4.search(text):
            continue
        module = ".".join(["flashinfer", *file.relative_to(package).with_suffix("").parts])
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("gen_"):
                continue
            needed = len(node.args.args) - len(node.args.defaults) + len(node.args.posonlyargs)
            source = ast.get_source_segment(text, node) or ""
            if needed or DOWNLOADS.search(source) or "trtllm_gen" in node.name:
                continue
            if GEMM.search(node.name) and "cutlass" in source.lower():
                yield module.removesuffix(".__init__"), node.name


def entered(package):
    """The package `flashinfer`, without running its own module."""
    module = types.ModuleType("flashinfer")
    module.__path__ = [str(package)]
    module.__file__ = str(package / "__init__.py")
    sys.modules["flashinfer"] = module
    version = None
    with contextlib.suppress(Exception):
        version = importlib.import_module("flashinfer.version").__version__
    vars(module)["__version__"] = version
    return version


def specs(package, arch):
    """What is made for one architecture. Only a fork of this process runs it, once."""
    out = {"arch": arch, "version": entered(package), "from": None, "specs": [], "errors": []}
    try:
        core = importlib.import_module("flashinfer.jit.gemm.core")
    except Exception:
        for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
            del sys.modules[name]
        core = importlib.import_module("flashinfer.jit.gemm.core")
        out["version"] = sys.modules["flashinfer"].__version__
    out["from"] = core.__file__
    generation = arch.partition(".")[0]
    for module, name in generators(package):
        sms = re.findall(r"sm(\d+)", name)
        if sms and not any(sm[:-1] == generation for sm in sms):
            continue
        try:
            spec = getattr(importlib.import_module(module), name)()
            spec.write_ninja()
            out["specs"].append([spec.name, str(spec.ninja_path)])
        except Exception as error:
            out["errors"].append(f"{name}: {type(error).__name__}: {error}"[:300])
    return out


def main(package, scratch, archs):
    """One process for each architecture: the install reads it once, when it is imported."""
    sys.path[:0] = [str(package.parent)]
    import torch  # noqa: F401

    for arch in archs:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
            os.environ["FLASHINFER_WORKSPACE_BASE"] = str(scratch / arch)
            try:
                out = specs(package, arch)
            except BaseException as error:
                out = {"arch": arch, "error": f"{type(error).__name__}: {error}"[:300]}
            with os.fdopen(theirs, "w") as pipe:
                json.dump(out, pipe)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        died = {"arch": arch, "error": "it died"}
        print("\n" + json.dumps(json.loads(text) if text else died), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
