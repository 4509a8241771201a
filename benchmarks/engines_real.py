"""Do engines of many releases, their real code, end at our choice? Needs no GPU.

Their wheels are downloaded and unpacked (not installed), virtual environments get the small
packages they import, and their own argument parsing, plugin loading, hook registry and kernel
selection run against what fp4tune emits for that very release, and against its plugins: for SM90,
SM100 and SM120, layers with FP4 activations and with 16-bit ones, and the case of 2026 (cutlass
unsafe, cudnn safe on SM120). FlashInfer's own tuner is held to a proven tactic. Only what asks a
GPU is stood in for: the platform's compute capability, compiled extensions, torchvision.

    python benchmarks/engines_real.py --out DIR [--work DIR] [--only WORD]
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
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASES = {
    # release -> the transformers it is run with: what it pins, or the nearest that imports
    "sglang": {
        "0.5.3": "4.57.1", "0.5.6": "4.57.1", "0.5.10.post1": "4.57.1", "0.5.18": "5.12.1",
        "0.5.23": "5.24.0",
    },
    "vllm": {"0.16.0": "4.57.1", "0.24.0": "5.12.1", "0.33.0": "5.24.0"},
    "flashinfer": dict.fromkeys(
        ("0.5.3", "0.6.4", "0.6.12", "0.7.0", "0.7.2.post1", "0.7.4"), ""
    ),
}  # fmt: skip
DISTRIBUTIONS = {"sglang": "sglang", "vllm": "vllm", "flashinfer": "flashinfer-python"}
# With what they need in turn, but never torch: that comes from the interpreter this runs in.
WHOLE = ("huggingface_hub", "openai", "fastapi", "opentelemetry-api", "mistral_common")
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

class Nothing:
    """What a compiled kernel, or a table of its types, is here."""
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self
    def __call__(self, *args, **named):
        return self
    def __or__(self, other):
        return self
    __ror__ = __or__

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing() if self.__name__.startswith("sgl_kernel") else None

def put(name, **content):
    made = Stub(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(content)
    sys.modules[name] = made
    return made

engine = os.environ.get("REAL_ENGINE")
if engine == "sglang":
    import importlib.abc

    class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Packages and every module in them: names that are there, and do nothing."""
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torchvision", "sgl_kernel"):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
        def create_module(self, spec):
            made = Stub(spec.name)
            mode = "NEAREST BILINEAR BICUBIC LANCZOS BOX HAMMING NEAREST_EXACT".split()
            made.InterpolationMode = types.SimpleNamespace(**{m: m for m in mode})
            made.__version__ = "0.0"
            return made
        def exec_module(self, module):
            pass

    sys.meta_path.insert(0, StandIns())
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

SGLANG = '''
import importlib.util, os, re, types
import sitecustomize
from sglang.srt import server_args
NAME = "sglang.srt.layers.quantization.fp4_utils"
PATH = os.path.join(os.path.dirname(server_args.__file__), "layers/quantization/fp4_utils.py")
HAS = os.path.exists(PATH)
if HAS:  # by itself: the package around it wants compiled kernels
    spec = importlib.util.spec_from_file_location(NAME, PATH)
    fp4_utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fp4_utils)

def start(case):
    plugins = os.path.join(os.path.dirname(server_args.__file__), "plugins")
    result = {"plugins": os.path.isdir(plugins)}
    if result["plugins"]:
        import sglang.srt.plugins
        sglang.srt.plugins._plugins_loaded = False
        sglang.srt.plugins.load_plugins()
    # Without a GPU's memory to size things by, and with a model of two small layers.
    args = server_args.prepare_server_args(
        ["--model-path", case["model"], "--device", "cuda", *case["args"]])
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    sm = case["sm"]
    if case["activation"] == "bf16" and sm >= 100:
        return {**result, **weight_only()}
    if not HAS:
        return {**result, **before_the_option()}
    kernel = types.SimpleNamespace(fp4_gemm_runner_backend=args.fp4_gemm_runner_backend)
    majors = {"is_sm90_supported": 9, "is_sm100_supported": 10, "is_sm120_supported": 12}
    for name, major in majors.items():
        setattr(fp4_utils, name, lambda major=major: sm // 10 == major)
    fp4_utils.get_exec = lambda: types.SimpleNamespace(kernel=kernel)
    fp4_utils.get_platform = lambda: types.SimpleNamespace(is_sm100=sm in (100, 103))
    fp4_utils.is_cuda = lambda: True
    fp4_utils.get_device_capability = lambda: divmod(sm, 10)
    takes = fp4_utils.initialize_fp4_gemm_config.__code__.co_argcount
    fp4_utils.initialize_fp4_gemm_config(*([args] if takes else []))
    chosen = fp4_utils.get_fp4_gemm_runner_backend()
    off = getattr(args, "disable_flashinfer_autotune", None)
    return {**result, "selected": chosen.value, "tuner_off": off}

# Once before the forks, so that what it imports is imported once.
try:
    server_args.prepare_server_args(["--model-path", os.environ["REAL_MODEL"], "--device", "cuda"])
except Exception:
    pass

class Anything:
    def __getattr__(self, name):
        return self

def weight_only():
    """What the method of W4A16 layers multiplies with."""
    from sglang.srt.layers.quantization import modelopt_quant
    called = []
    for name in dir(modelopt_quant):
        if re.search("fp4_(marlin_linear|gemm)$", name):
            setattr(modelopt_quant, name, lambda *a, name=name, **k: called.append(name))
    method = modelopt_quant.ModelOptNvFp4A16LinearMethod(Anything())
    method.apply(Anything(), Anything())
    return {"selected": "marlin" if called == ["apply_fp4_marlin_linear"] else str(called)}

def before_the_option():
    try:
        from sglang.srt.environ import envs
        word = envs.SGLANG_FLASHINFER_FP4_GEMM_BACKEND.get() or "cutlass"
    except (ImportError, AttributeError):
        from sglang.srt.utils import get_bool_env_var
        cutlass = get_bool_env_var("SGLANG_USE_CUTLASS_BACKEND_FOR_FP4_GEMM")
        word = "cutlass" if cutlass else "cudnn"  # FlashInfer's default of that time
    return {"selected": "flashinfer_" + word}

serve(start)
'''

VLLM = """
import os
import sitecustomize
library = sitecustomize.extension()
sitecustomize.simulate()
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
try:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4 import flashinfer as nvfp4
except ImportError:
    linear = nvfp4 = None
    from vllm.model_executor.layers.quantization.utils import nvfp4_utils
import vllm.plugins
from vllm.plugins import load_general_plugins
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser

# Once before the forks, so that what it imports is imported once.
try:
    EngineArgs(model=os.environ["REAL_MODEL"], load_format="dummy", skip_tokenizer_init=True,
               max_model_len=128).create_engine_config()
except Exception:
    pass

def mxfp4(case):
    init = linear.init_mxfp4_linear_kernel
    if "activation_quant_key" not in init.__code__.co_varnames:
        return type(init()).__name__
    from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic
    said = [kMxfp4Dynamic] + ([None] if case["activation"] == "bf16" else [])
    return " or ".join(sorted({type(init(activation_quant_key=x)).__name__ for x in said}))

def start(case):
    if nvfp4 is not None:  # FlashInfer's kernel class needs a CUDA library to be imported
        nvfp4.has_flashinfer_b12x_gemm = lambda: case["sm"] >= 120
    vllm.plugins.plugins_loaded = False  # they were, at level off, before the fork
    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    space = parser.parse_args(["--model", case["model"], "--load-format", "dummy",
                               "--skip-tokenizer-init", "--max-model-len", "128", *case["args"]])
    config = EngineArgs.from_cli_args(space).create_engine_config()
    result = {"plugins": True}
    kernels = getattr(config, "kernel_config", None)
    result["per_quant"] = getattr(kernels, "linear_backend_per_quant", None)
    result["tuner_off"] = getattr(kernels, "enable_flashinfer_autotune", None) is False
    a16 = case["activation"] == "bf16" and case["sm"] >= 100
    with set_current_vllm_config(config):
        if case["format"] == "mxfp4":
            result["selected"] = mxfp4(case)
        elif linear is None:
            result["selected"] = nvfp4_utils.select_nvfp4_linear_backend().value
            if a16:
                result["selected"] = "marlin"  # its scheme for W4A16 has that alone
        else:
            result["selected"] = type(linear.init_nvfp4_linear_kernel(use_a16=a16)).__name__
    return result

serve(start)
"""

FLASHINFER = """
import importlib, json, os, types
import torch

def start(case):
    import flashinfer.autotuner as tuning
    base = importlib.import_module("flashinfer.gemm.gemm_base")
    from fp4tune.engines import pinning, tactics
    result = {"loads_files": hasattr(tuning.AutoTuner, "load_configs")}
    result["asks"] = hasattr(base, "_MM_FP4_TUNING_CONFIG_128x4")
    if not result["asks"]:
        return {**result, "selected": None}
    module = types.SimpleNamespace(fp4_gemm=None, fp4_gemm_tactic_num=lambda: 20)
    make = base._create_cutlass_fp4_gemm_module
    try:
        runner = make(module, "op", "tuner").cutlass_fp4_gemm_runner()
    except TypeError:
        runner = make().cutlass_fp4_gemm_runner()
    def empty(*shape):
        return torch.empty(*shape, dtype=torch.uint8)
    def inputs(m, n=4096, k=2048):
        return [empty(m, k // 2), empty(n, k // 2).T, empty(-(-m // 128) * 128, k // 16),
                empty(n, k // 16).T, torch.ones(1), torch.bfloat16,
                torch.empty(m, n, dtype=torch.bfloat16), 16, True,
                empty(base.DEFAULT_WORKSPACE_SIZE)]
    config = base._MM_FP4_TUNING_CONFIG_128x4
    pins = pinning.PinnedTactics()
    decisions = [types.SimpleNamespace(tactic=t) for t in ("7", "5")]
    pins.add("flashinfer-cutlass", [(4096, 2048, 1, 16, decisions[0]),
                                    (4096, 2048, 17, 300, decisions[1])])
    plain = tuning.AutoTuner()
    found = {}
    if result["loads_files"]:
        made = tactics.files([tactics.Pin("flashinfer-cutlass", 4096, 2048, 16, "7", m_lo=1)])
        for name, content in made.items():
            with open(os.path.join(case["folder"], name), "w") as file:
                json.dump(content, file)
        path = os.path.join(case["folder"], tactics.CACHE)
        loaded = tuning.AutoTuner()
        found["loaded"] = bool(loaded.load_configs(path))
        found["by_file"] = [loaded.choose_one("fp4_gemm", [runner], config, inputs(m))[1]
                            for m in (1, 3, 16)]
    tuning.AutoTuner.choose_one = pinning.wrap(
        tuning.AutoTuner.choose_one, pins, "nvfp4", torch.bfloat16)
    found["by_plugin"] = [plain.choose_one("fp4_gemm", [runner], config, inputs(m))[1]
                          for m in (1, 3, 16, 17, 300, 301)]
    other = plain.choose_one("fp4_gemm", [runner], config, inputs(3, n=64))[1]
    return {**result, **found, "other_layer": other, "selected": found["by_plugin"]}

serve(start)
"""

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 1, "vocab_size": 128, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16", "head_dim": 16,
}  # fmt: skip


def python_for(work: Path, transformers: str) -> Path:
    """The Python of a virtual environment with what engines import; torch and FlashInfer are
    those of this interpreter."""
    home = work / f"venv-{transformers or 'plain'}"
    python = home / "bin" / "python"
    if (home / ".ready").exists():
        return python
    venv.create(home, with_pip=True)
    site = next((home / "lib").glob("python*/site-packages"))
    own = Path(metadata.distribution("torch").locate_file("")).resolve()
    (site / "base.pth").write_text(f"{own}\n")
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if transformers:
        subprocess.run([*pip, "install", "--no-deps", *ALONE], check=True)
        subprocess.run([*pip, "install", f"transformers=={transformers}", *WHOLE], check=True)
    (home / ".ready").touch()
    return python


def unpacked(work: Path, engine: str, release: str) -> Path:
    """A release's Python files, without what is compiled."""
    place = work / "trees" / f"{engine}-{release}"
    if place.exists():
        return place
    name = DISTRIBUTIONS[engine]
    wheels = work / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not list(wheels.glob(f"{name.replace('-', '_')}-{release}-*.whl")):
        subprocess.run(
            [*pip, "download", "--no-deps", f"{name}=={release}", "-d", str(wheels)], check=True
        )
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{release}-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = [n for n in file.namelist() if not re.search(r"\.(so|cubin|a|whl)(\.|$)", n)]
        file.extractall(place, names)
    return place


def beside(work: Path) -> Path:
    """A folder with fp4tune as it is installed, what stands in for GPUs, and the word that
    FlashInfer's kernels are there."""
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    info = site / "fp4tune-0.dist-info"
    info.mkdir(parents=True)
    (site / "fp4tune").symlink_to(ROOT)
    (site / "sitecustomize.py").write_text(STANDINS)
    (site / "flashinfer_cubin").mkdir()
    (site / "flashinfer_cubin" / "__init__.py").write_text(
        "import os\n__version__ = '0'\n\ndef get_cubin_dir():\n"
        "    return os.path.dirname(__file__)\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4tune\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points())
    (work / "model").mkdir(exist_ok=True)
    (work / "model" / "config.json").write_text(json.dumps(MODEL))
    return site


def entry_points() -> str:
    """The engines' groups of pyproject.toml, as an installed distribution has them."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'^\[project\.entry-points\."(.+?)"\]\n((?:\S.*\n)+)', text, re.M)
    return "\n".join(f"[{group}]\n{body.replace(chr(34), '')}" for group, body in found)


class Release:
    """A release's code in a process of its own, which makes a fork for each start."""

    def __init__(self, work: Path, engine: str, release: str) -> None:
        self.engine, self.release = engine, release
        self.tree = unpacked(work, engine, release)
        self.folder = work / "files"
        self.folder.mkdir(exist_ok=True)
        self.model = str(work / "model")
        python = python_for(work, RELEASES[engine][release])
        program = SERVE + {"sglang": SGLANG, "vllm": VLLM, "flashinfer": FLASHINFER}[engine]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FP4TUNE_", "VLLM_"))}
        self.log = (work / f"{engine}-{release}.log").open("w+")
        self.process = subprocess.Popen(
            [str(python), "-c", program],
            env=clean
            | {
                "PYTHONPATH": os.pathsep.join([str(work / "site"), str(self.tree)]),
                "PYTHONPYCACHEPREFIX": str(work / "pycache"),
                "REAL_ENGINE": engine,
                "REAL_SM": "90",
                "REAL_MODEL": self.model,
                "FP4TUNE_LEVEL": "off",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "FLASHINFER_WORKSPACE_BASE": str(work),
                "FLASHINFER_DISABLE_VERSION_CHECK": "1",
                "VLLM_CACHE_ROOT": str(work / "cache"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def start(self, case: dict[str, Any]) -> dict[str, Any]:
        """One start: what was selected, and what fp4tune logged."""
        assert self.process.stdin and self.process.stdout
        asked = {name: case[name] for name in ("args", "env", "sm", "activation")}
        asked["format"] = case.get("format", "nvfp4")
        asked |= {"model": self.model, "folder": str(self.folder)}
        begun = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return {**json.loads(line[7:]), "seconds": round(time.perf_counter() - begun, 1)}
        self.log.seek(0)
        return {"failed": self.log.read()[-3000:], "logged": []}


FIELDS = {
    ("sm90", "bf16"): {"marlin": 12.0, "vllm-marlin": 9.0, "humming": 14.0},
    ("sm100", "fp4"): {"flashinfer-cudnn": 8.0, "flashinfer-trtllm": 10.0,
                       "flashinfer-cutlass": None, "flashinfer-cute-dsl": 9.0},
    ("sm120", "fp4"): {"flashinfer-cudnn": 9.0, "flashinfer-cutlass": None},
    ("sm100", "bf16"): {"marlin": 12.0, "vllm-marlin": 9.0, "flashinfer-w4a16-cute-dsl": None},
    ("sm120", "bf16"): {"marlin": 12.0, "vllm-marlin": 9.0, "flashinfer-w4a16-cute-dsl": None},
}  # fmt: skip
"""What was probed, with the time in microseconds, None for what is unsafe. On SM120 the case of
2026."""


def cases(work: Path, engine: str, release: str, tree: Path) -> Iterator[dict[str, Any]]:
    """Each start of a release to make, and what must come out."""
    import engine_store

    from fp4tune.engines import applied, emit, installed, names, select
    from fp4tune.engines.asked import LayerKind, NotTaken, Unclear
    from fp4tune.engines.interpreter import Interpreter
    from fp4tune.engines.read_flashinfer import FlashInferSource
    from fp4tune.engines.read_sglang import SGLangSource
    from fp4tune.engines.read_vllm import VllmSource

    own = str(Path(metadata.distribution("torch").locate_file("")).resolve())
    old = [str(unpacked(work, "flashinfer", "0.5.3"))] if release in ("0.5.3", "0.5.6") else []
    paths = [str(tree), *old, str(work / "site"), own]
    groups = {group: ["fp4tune"] for group in installed.GROUPS.values()}
    python = Interpreter(f"{engine} {release}", paths, None, {engine: release}, groups)
    source = SGLangSource(python) if engine == "sglang" else VllmSource(python)
    home = installed.EngineHome(python, source, FlashInferSource(python))
    for arch, activation in FIELDS if engine == "vllm" else ():
        kind = LayerKind(names.sm_of(arch) or 0, "mxfp4", activation)
        common = {"engine": engine, "release": release, "arch": arch, "activation": activation,
                  "format": "mxfp4", "sm": kind.sm}  # fmt: skip
        try:
            yield {**common, "case": "mxfp4 default", "args": [], "env": {},
                   "expected": source.runs(kind, applied.Configured())}  # fmt: skip
        except (NotTaken, Unclear) as error:
            yield {**common, "case": "mxfp4, not served, or not known", "why": str(error)}
    for (arch, activation), field in FIELDS.items():
        place = work / "state" / f"{arch}-{activation}"
        shutil.rmtree(place, ignore_errors=True)
        gpu = engine_store.SCOPES[arch][0]
        engine_store.SCOPES[arch] = (gpu, activation)
        engine_store.fill(place, arch, field)
        begun = time.perf_counter()
        reader = select.open_for(engine, place, arch=arch)
        found = select.select(reader, engine, activation=activation, home=home)
        made = emit.emission(found)
        said = applied.assess(found, (), {})
        common = {
            "engine": engine, "release": release, "arch": arch, "activation": activation,
            "sm": names.sm_of(arch), "rejected": found.rejected, "comments": made.comments,
            "read_ms": round((time.perf_counter() - begun) * 1e3),
        }  # fmt: skip
        try:
            default = source.runs(found.kind, applied.Configured())
        except (NotTaken, Unclear) as error:
            default = None
            yield {**common, "case": "not served, or not known", "why": str(error)}
        if default is not None:
            yield {**common, "case": "default", "args": [], "env": {}, "expected": default,
                   "says": applied.line(said)}  # fmt: skip
        if found.backend is None:
            yield {**common, "case": "nothing emitted"}
            continue
        plain = {k: v for k, v in made.env.items() if not k.startswith("FP4TUNE_")}
        yield {**common, "case": "emission", "args": made.args, "env": plain,
               "expected": found.word}  # fmt: skip
        if not home.plugin:
            yield {**common, "case": "plugin absent", "why": home.no_plugin}
            continue
        if activation == "bf16" and arch != "sm90":
            continue  # the plugins are about what the engine computes by itself on that SM
        acting = {**emit.environment(found), "FP4TUNE_STATE": str(place)}
        yield {**common, "case": "plugin", "args": [], "env": acting, "expected": found.word}
        explicit = found.default if found.default != found.backend else "flashinfer-trtllm"
        word = names.named(engine, str(explicit), "nvfp4", common["sm"])
        if word is not None:
            asked = source.setting(word, found.kind)
            yield {**common, "case": "plugin, option given", "args": list(asked.args),
                   "env": {**acting, **asked.env}, "expected": word}  # fmt: skip


def judged(case: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a start ended where it should."""
    if "failed" in result:
        return False
    if case["engine"] == "flashinfer":
        pinned = result.get("by_plugin") == [7, 7, 7, 5, 5, -1] and result["other_layer"] == -1
        files = not result["loads_files"] or result.get("by_file") == [7, 7, 7]
        return (pinned and files) or not result["asks"]
    from fp4tune.engines.read_vllm import _CLASSES

    selected = result.get("selected")
    if case["engine"] == "vllm":  # of releases in which a backend is a word
        selected = _CLASSES.get(selected, selected)
    return selected == case["expected"]


def starts(work: Path, engine: str, release: str) -> Iterator[dict[str, Any]]:
    """Every start of a release, with what came out of it."""
    process = Release(work, engine, release)
    plan: Any = [
        {"engine": engine, "release": release, "case": "tactics", "args": [], "env": {}, "sm": 120,
         "activation": "fp4"}
    ]  # fmt: skip
    if engine != "flashinfer":
        plan = cases(work, engine, release, process.tree)
    for case in plan:
        row = {**case, "date": datetime.now(timezone.utc).date().isoformat()}
        if "args" in case:
            row |= process.start(case)
            row["ok"] = judged(case, row)
        keys = ("engine", "release", "arch", "activation", "case")
        name = " ".join(str(row.get(key, "")) for key in keys)
        mark = {True: "ok  ", False: "FAIL", None: "    "}[row.get("ok")]
        print(mark, name, row.get("selected", row.get("why", "")), flush=True)
        if row.get("ok") is False:
            print(row.get("failed") or row)
        yield row
    process.process.kill()


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result: what was run with what, how many starts ended where they should, and each."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.system()}, no GPU",
        "versions": {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in ("torch", "flashinfer-python")},
        },
        "transformers": RELEASES,
        "passed": sum(row.get("ok") is True for row in rows),
        "of": sum("ok" in row for row in rows),
        "starts": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="Kept from run to run; default: a new folder.")
    parser.add_argument("--only", default="", help="Words that a release's name must hold.")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="engines-real-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT / "tests"), str(beside(work))]
    target = options.out / "engines-real.json"
    kept = json.loads(target.read_text())["starts"] if target.exists() else []
    for engine, releases in RELEASES.items():
        for release in releases:
            if options.only and options.only not in f"{engine} {release}":
                continue
            rows = list(starts(work, engine, release))
            kept = [r for r in kept if (r["engine"], r["release"]) != (engine, release)] + rows
            document = summed(kept)
            options.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(document, indent=1)
            own = str(Path(metadata.distribution("torch").locate_file("")).resolve())
            for path, word in ((str(work), "WORK"), (str(ROOT), "REPO"), (own, "SITE")):
                text = text.replace(path, word)
            target.write_text(text + "\n")
    print(f"{document['passed']} of {document['of']} as expected; {target}")
    return 0 if document["passed"] == document["of"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
