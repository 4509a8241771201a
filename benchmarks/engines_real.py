"""Do SGLang and vLLM themselves, their real code, end at our choice? Needs no GPU.

Their wheels are downloaded and unpacked (not installed), a virtual environment gets the small
packages they import, and their own argument parsing, plugin loading, hook registry and kernel
selection run against what fp4tune emits and against its plugins. Only what asks a GPU is stood in
for: the platform's compute capability, compiled extensions, torchvision.

    python benchmarks/engines_real.py --out DIR [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = {"sglang": "0.5.23", "vllm": "0.33.0"}
# With what they need in turn, but never torch: that comes from the interpreter this runs in.
WHOLE = ("transformers", "huggingface_hub", "fastapi", "opentelemetry-api", "mistral_common")
ALONE = (
    "msgspec", "pyzmq", "orjson", "uvloop", "aiohttp", "aiosignal", "aiohappyeyeballs",
    "frozenlist",
    "multidict", "propcache", "yarl", "psutil", "setproctitle", "uvicorn", "partial_json_parser",
    "prometheus_client", "pillow", "interegular", "cloudpickle", "cachetools", "blake3",
    "py-cpuinfo", "sentencepiece", "einops", "gguf", "compressed-tensors", "openai", "distro",
    "jiter", "sniffio", "pybase64", "cbor2", "python-json-logger", "watchfiles", "six", "dill",
    "scipy", "python-multipart", "IPython", "traitlets", "lark", "diskcache", "ijson", "xgrammar",
    "model-hosting-container-standards", "modelscope", "openai-harmony", "tiktoken", "llguidance",
    "jmespath", "loguru",
)  # fmt: skip

STANDINS = '''
"""What asks a GPU or a compiled extension, and nothing else; comes in through sitecustomize."""
import importlib.machinery
import os
import sys
import types

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

def put(name, **content):
    made = Stub(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(content)
    sys.modules[name] = made
    return made

engine = os.environ.get("REAL_ENGINE")
if engine == "sglang":
    import importlib.abc

    class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """torchvision and every module in it: names that are there, and do nothing."""
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torchvision":
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
        def create_module(self, spec):
            made = Stub(spec.name)
            mode = "NEAREST BILINEAR BICUBIC LANCZOS BOX HAMMING NEAREST_EXACT".split()
            made.InterpolationMode = types.SimpleNamespace(**{m: m for m in mode})
            made.__version__ = "0.0"
            return made
        def exec_module(self, module):
            pass

    sys.meta_path.insert(0, Torchvision())
if engine == "vllm":
    extensions = ("_C", "_C_stable_libtorch", "_moe_C", "_flashmla_C", "cumem_allocator")
    for name in (*extensions, "vllm_flash_attn"):
        put(f"vllm.{name}")

def extension():
    """Ask-only operators of vLLM's extension, answering as its CUDA 13 build does for that SM."""
    import torch
    library = torch.library.Library("_C", "FRAGMENT")
    for name, least in (("fp8", 89), ("block_fp8", 90), ("group_gemm", 90), ("fp4", 100)):
        op = f"cutlass_scaled_mm_supports_{name}"
        library.define(f"{op}(int capability) -> bool")
        library.impl(op, lambda cc, least=least: cc >= least, "CompositeExplicitAutograd")
    return library

def simulate():
    """vLLM's CUDA platform, with the compute capability asked for."""
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability
    class Simulated(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(*divmod(int(os.environ["REAL_SM"]), 10))
        @classmethod
        def get_device_name(cls, device_id=0): return "simulated"
        @classmethod
        def get_device_uuid(cls, device_id=0): return "GPU-0"
        @classmethod
        def get_device_total_memory(cls, device_id=0): return 141 << 30
        @classmethod
        def is_fully_connected(cls, physical_device_ids): return True
        @classmethod
        def num_compute_units(cls, device_id=0): return 132
    vllm.platforms._current_platform = Simulated()

if engine == "vllm" and "vllm.model_executor.models.registry" in sys.orig_argv:
    keep = extension()  # the process in which vLLM looks at a model's class
    simulate()
'''

SERVE = '''
import json, logging, os, sys, traceback

def serve(start):
    """Make each start that stdin asks for in a fork of its own: the imports are made once."""
    for line in sys.stdin:
        case = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.environ.update(case["env"], REAL_SM=str(case["sm"]))
            logged = []
            class Keep(logging.Handler):
                def emit(self, record):
                    logged.append(record.getMessage())
            logging.getLogger("fp4tune").addHandler(Keep())
            logging.getLogger("fp4tune").setLevel(logging.INFO)
            try:
                result = start(case)
            except BaseException:
                result = {"failed": traceback.format_exc()}
            with os.fdopen(writing, "w") as file:
                json.dump({**result, "logged": logged}, file)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            text = file.read()
        os.waitpid(child, 0)
        print("RESULT " + (text or json.dumps({"failed": "it died"})), flush=True)
'''

SGLANG = """
import types
import sitecustomize
from sglang.srt import server_args
from sglang.srt.layers.quantization import fp4_utils, modelopt_quant

def start(case):
    from sglang.srt.plugins import load_plugins
    load_plugins()
    # Without a model, so that the rest of the resolution asks nothing of a GPU.
    args = server_args.prepare_server_args(
        ["--model-path", "dummy", "--device", "cuda", *case["args"]])
    args.resolve_once()
    sm = case["sm"]
    kernel = types.SimpleNamespace(fp4_gemm_runner_backend=args.fp4_gemm_runner_backend)
    fp4_utils.get_exec = lambda: types.SimpleNamespace(kernel=kernel)
    fp4_utils.get_platform = lambda: types.SimpleNamespace(is_sm100=sm in (100, 103))
    fp4_utils.is_cuda = lambda: True
    fp4_utils.get_device_capability = lambda: divmod(sm, 10)
    fp4_utils.initialize_fp4_gemm_config()
    chosen = fp4_utils.get_fp4_gemm_runner_backend()
    return {"option": args.fp4_gemm_runner_backend, "selected": chosen.value,
            "mm_fp4": chosen.get_flashinfer_backend(),
            "wrapped": hasattr(modelopt_quant.flashinfer_fp4_gemm, "_fp4tune_original")}

serve(start)
"""

VLLM = """
import sitecustomize
library = sitecustomize.extension()
sitecustomize.simulate()
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel
from vllm.model_executor.kernels.linear.nvfp4 import flashinfer as nvfp4
from vllm.utils.argparse_utils import FlexibleArgumentParser

def start(case):
    if case["b12x"]:  # FlashInfer's kernel class needs a CUDA library to be imported
        nvfp4.has_flashinfer_b12x_gemm = lambda: case["sm"] >= 120
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    space = parser.parse_args(["--model", case["model"], "--load-format", "dummy",
                               "--skip-tokenizer-init", "--max-model-len", "128", *case["args"]])
    config = EngineArgs.from_cli_args(space).create_engine_config()
    result = {"per_quant": config.kernel_config.linear_backend_per_quant}
    import flashinfer
    result["wrapped"] = hasattr(flashinfer.mm_fp4, "_fp4tune_original")
    with set_current_vllm_config(config):
        for name, a16 in (("selected", False), ("w4a16", True)):
            try:
                result[name] = type(init_nvfp4_linear_kernel(use_a16=a16)).__name__
            except Exception as error:
                result[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result

serve(start)
"""

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 1, "vocab_size": 128, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16", "head_dim": 16,
}  # fmt: skip


def prepare(work: Path) -> tuple[Path, dict[str, Path], dict[str, str]]:
    """(python, engine -> unpacked wheel, versions) under `work`, made where it is missing."""
    python = work / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (work / "venv" / ".ready").exists():
        venv.create(work / "venv", with_pip=True)
        site = next((work / "venv" / "lib").glob("python*/site-packages"))
        # torch and FlashInfer: those of this interpreter.
        own = Path(metadata.distribution("torch").locate_file("")).resolve()
        (site / "base.pth").write_text(f"{own}\n")
        subprocess.run([*pip, "install", "--no-deps", *ALONE], check=True)
        subprocess.run([*pip, "install", *WHOLE], check=True)
        (work / "venv" / ".ready").touch()
    unpacked = {}
    for name, version in WHEELS.items():
        place = work / name
        if not place.exists():
            subprocess.run(
                [*pip, "download", "--no-deps", f"{name}=={version}", "-d", str(work / "wheels")],
                check=True,
            )
            (wheel,) = (work / "wheels").glob(f"{name}-{version}*.whl")
            with zipfile.ZipFile(wheel) as file:
                names = [n for n in file.namelist() if not re.search(r"\.(so|cubin|a)(\.|$)", n)]
                file.extractall(place, names)
        unpacked[name] = place
    shutil.rmtree(work / "site", ignore_errors=True)
    info = work / "site" / "fp4tune-0.dist-info"
    info.mkdir(parents=True)
    (work / "site" / "fp4tune").symlink_to(ROOT)
    (work / "site" / "sitecustomize.py").write_text(STANDINS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4tune\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points())
    (work / "model").mkdir(exist_ok=True)
    (work / "model" / "config.json").write_text(json.dumps(MODEL))
    return python, unpacked, dict(WHEELS)


def entry_points() -> str:
    """The engines' groups of pyproject.toml, as an installed distribution has them."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'^\[project\.entry-points\."(.+?)"\]\n((?:\S.*\n)+)', text, re.M)
    return "\n".join(f"[{group}]\n{body.replace(chr(34), '')}" for group, body in found)


class Engine:
    """An engine's code in a process of its own, which makes a fork for each start."""

    def __init__(self, python: Path, work: Path, engine: str) -> None:
        program = SERVE + {"sglang": SGLANG, "vllm": VLLM}[engine]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FP4TUNE_", "VLLM_"))}
        self.model = str(work / "model")
        self.log = (work / f"{engine}.log").open("w+")
        self.process = subprocess.Popen(
            [str(python), "-c", program],
            env=clean
            | {
                "PYTHONPATH": os.pathsep.join([str(work / "site"), str(work / engine)]),
                "PYTHONDONTWRITEBYTECODE": "",
                "PYTHONPYCACHEPREFIX": str(work / "pycache"),
                "REAL_ENGINE": engine,
                "REAL_SM": "90",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "FLASHINFER_WORKSPACE_BASE": str(work),
                "VLLM_CACHE_ROOT": str(work / "cache"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def start(self, case: dict) -> dict:
        """One start: what was selected, and what fp4tune logged."""
        assert self.process.stdin and self.process.stdout
        asked = {name: case[name] for name in ("args", "env", "sm", "b12x")}
        begun = time.perf_counter()
        self.process.stdin.write(json.dumps({**asked, "model": self.model}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return {**json.loads(line[7:]), "seconds": round(time.perf_counter() - begun, 1)}
        self.log.seek(0)
        return {"failed": self.log.read()[-3000:], "logged": []}


def cases(work: Path) -> list[dict]:
    """Each start to make: engine, SM, arguments, environment, and what must come out."""
    sys.path[:0] = [str(ROOT / "tests"), str(work / "site")]
    from engine_store import SCOPES, fill

    from fp4tune.engines import emit, names, select

    found = []
    for arch in SCOPES:
        place = work / "state" / arch
        shutil.rmtree(place, ignore_errors=True)
        fill(place, arch)
        sm = names.sm_of(arch)
        for engine in names.ENGINES:
            chosen = select.select(select.open_for(engine, place, arch=arch), engine)
            made = emit.emission(chosen)
            plugged = {"FP4TUNE_STATE": str(place)}
            default = next(iter(names.defaults(engine, sm)))
            other = names.named(engine, default, "nvfp4", sm)
            explicit = (
                ["--fp4-gemm-backend", other]
                if engine == "sglang"
                else ["--linear-backend", names.NAMES[default].linear]
            )
            common = {
                "engine": engine,
                "arch": arch,
                "sm": sm,
                "backend": chosen.backend,
                "b12x": True,
            }
            found += [
                {**common, "case": "by itself", "args": [], "env": {}, "expected": other},
                {
                    **common, "case": "emission", "args": made.args, "env": made.env,
                    "expected": chosen.word,
                },
                {
                    **common, "case": "plugin emit", "args": [], "env": plugged, "expected": other,
                },
                {
                    **common, "case": "plugin process", "args": [],
                    "env": {**plugged, "FP4TUNE_LEVEL": "process"}, "expected": chosen.word,
                },
                {
                    **common, "case": "plugin call", "args": [],
                    "env": {**plugged, "FP4TUNE_LEVEL": "call"}, "expected": chosen.word,
                },
                {
                    **common, "case": "user's own option", "args": explicit,
                    "env": {**plugged, "FP4TUNE_LEVEL": "process"}, "expected": other,
                },
                {
                    **common, "case": "plugin without a state", "args": [],
                    "env": {"FP4TUNE_STATE": str(work / "nothing"), "FP4TUNE_LEVEL": "process"},
                    "expected": other,
                },
            ]  # fmt: skip
            if engine == "vllm":
                found.append(
                    {
                        **common, "case": "emission, environment alone", "args": [],
                        "env": made.env, "expected": chosen.word,
                    }
                )  # fmt: skip
                if chosen.backend == "flashinfer-b12x":
                    found.append(
                        {
                            **common, "case": "plugin process, kernel not installed", "args": [],
                            "env": {**plugged, "FP4TUNE_LEVEL": "process"}, "b12x": False,
                            "expected": other,
                        }
                    )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="Kept from run to run; default: a new folder.")
    parser.add_argument("--only", default="", help="Words that a start's name must hold.")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="engines-real-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    python, _, versions = prepare(work)
    rows = []
    engines: dict[str, Engine] = {}
    for case in cases(work):
        name = f"{case['engine']} {case['arch']} {case['case']}"
        if options.only and options.only not in name:
            continue
        if case["engine"] not in engines:
            engines[case["engine"]] = Engine(python, work, case["engine"])
        result = engines[case["engine"]].start(case)
        selected = result.get("selected")
        ok = selected == case["expected"]
        ok = ok and result.get("wrapped") == (case["case"] == "plugin call")
        text = json.dumps({**case, **result, "selected": selected, "ok": ok})
        rows.append(json.loads(text.replace(str(work), "WORK").replace(str(ROOT), "REPO")))
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {selected} (expected {case['expected']})")
        for line in result["logged"]:
            print(f"       {line}")
        if "failed" in result:
            print(result["failed"])
    for engine in engines.values():
        engine.process.kill()
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.system()}, no GPU",
        "versions": {
            **versions,
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in ("torch", "flashinfer-python")},
        },
        "passed": sum(row["ok"] for row in rows),
        "of": len(rows),
        "starts": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "engines-real.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['passed']} of {document['of']} as expected; {target}")
    return 0 if document["passed"] == document["of"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
