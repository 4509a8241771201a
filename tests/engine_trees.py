"""Stand-ins for installed engines: packages with as much of a source tree as is read of one.

Written for these tests, in the shape that SGLang and vLLM have: the selection is code that asks the
platform and the options. `benchmarks/engines_real.py` does the same with the real wheels.
"""

from __future__ import annotations

from pathlib import Path

NVFP4 = (
    "FlashInferCuteDsl", "FlashInferCutlass", "FlashInferB12x", "Cutlass", "FlashInferCuteDslW4A16",
    "Marlin", "FlashInferTrtllm", "FlashInferCudnn", "Fbgemm", "B12x", "B12xW4A16", "Torch",
    "Humming",
)  # fmt: skip
WORDS = {
    "cutlass": ("Cutlass",),
    "flashinfer_cutlass": ("FlashInferCutlass",),
    "flashinfer_cutedsl": ("FlashInferCuteDsl", "FlashInferCuteDslW4A16"),
    "flashinfer_trtllm": ("FlashInferTrtllm",),
    "flashinfer_cudnn": ("FlashInferCudnn",),
    "flashinfer_b12x": ("FlashInferB12x",),
    "marlin": ("Marlin",),
    "humming": ("Humming", "HummingMx"),
}


def kernel(name: str) -> str:
    """The class of a kernel of vLLM's."""
    if name.endswith("Mx"):
        return f"{name}Fp4LinearKernel"
    stem, weight_only, _ = name.partition("W4A16")
    return f"{stem}NvFp4{weight_only}LinearKernel"


KERNELS = tuple(map(kernel, NVFP4))


def write(root: Path, files: dict[str, str]) -> None:
    """Put modules under `root`, with the packages they need."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.parents:
            if parent == root:
                break
            if not (parent / "__init__.py").exists():
                (parent / "__init__.py").write_text("")
        path.write_text(text)


def distribution(root: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    info = root / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


SGLANG_CHOICE = """
from enum import Enum
from sglang.srt.runtime_context import get_exec, get_platform
from sglang.srt.utils.common import get_device_capability, is_cuda

class Runner(Enum):
    AUTO = "auto"
    CUDNN = "flashinfer_cudnn"
    CUTEDSL = "flashinfer_cutedsl"
    CUTLASS = "flashinfer_cutlass"
    TRTLLM = "flashinfer_trtllm"
    MARLIN = "marlin"

FP4_GEMM_RUNNER_BACKEND = None

def initialize_fp4_gemm_config():
    global FP4_GEMM_RUNNER_BACKEND
    word = get_exec().kernel.fp4_gemm_runner_backend
    if word == "auto":
        if get_platform().is_sm100:
            word = "flashinfer_cutedsl"
        elif is_cuda() and (8, 0) <= get_device_capability() < (10, 0):
            word = "marlin"
        else:
            word = "flashinfer_cutlass"
    FP4_GEMM_RUNNER_BACKEND = Runner(word)
"""

SGLANG_LAYERS = """
class ModelOptFp4Config:
    @classmethod
    def get_min_capability(cls):
        return 80

class ModelOptNvFp4A16LinearMethod:
    def apply(self, layer, x, bias=None):
        return apply_fp4_marlin_linear(x, layer.weight)
"""

SGLANG_COMMON = """
from functools import lru_cache, partial
import torch

def _of(majors, cuda):
    found = torch.cuda.get_device_capability()[0] in majors
    return found and tuple(map(int, torch.version.cuda.split(".")[:2])) >= cuda

is_sm100_supported = lru_cache(maxsize=1)(partial(_of, majors=[10], cuda=(12, 8)))
"""


SGLANG_MOE = """
from enum import Enum

class MoeRunnerBackend(Enum):
    AUTO = "auto"
    MARLIN = "marlin"
    HUMMING = "humming"
    TRITON = "triton"
    TRITON_KERNELS = "triton_kernel"
    FLASHINFER_MXFP4 = "flashinfer_mxfp4"
    FLASHINFER_TRTLLM = "flashinfer_trtllm"

    def is_auto(self):
        return self == MoeRunnerBackend.AUTO

    def is_marlin(self):
        return self == MoeRunnerBackend.MARLIN

class MoeA2ABackend(Enum):
    NONE = "none"
"""

SGLANG_NVFP4_EXPERTS = """
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend
from sglang.srt.utils.common import get_device_capability

class ModelOptNvFp4FusedMoEMethod:
    def __init__(self, config):
        backend = get_moe_runner_backend()
        if get_device_capability() < (10, 0) and not (backend.is_auto() or backend.is_marlin()):
            raise ValueError("NVFP4 experts need Blackwell, or marlin")

    def create_moe_runner(self, layer, config):
        backend = get_moe_runner_backend()
        if backend.is_auto():
            if get_device_capability() < (10, 0):
                backend = MoeRunnerBackend.MARLIN
            else:
                backend = MoeRunnerBackend.FLASHINFER_TRTLLM
        self.runner = MoeRunner(backend, config)
"""

SGLANG_MXFP4_EXPERTS = """
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend

class Mxfp4MoEMethod:
    def __init__(self, prefix):
        self.prefix = prefix

    def create_moe_runner(self, layer, config):
        backend = get_moe_runner_backend()
        self.runner = MoeRunner(MoeRunnerBackend.TRITON if backend.is_auto() else backend, config)
"""

SGLANG_GPT_OSS = """
import importlib.util
from sglang.srt.arg_groups.model_override_base import _register_for, resolving_view

@_register_for("GptOssForCausalLM")
def _gpt_oss_overrides(server_args, hf_config):
    cfg = resolving_view(server_args)
    overrides = {}
    if cfg.moe_runner_backend == "auto":
        if importlib.util.find_spec("triton_kernels") is not None:
            overrides["moe_runner_backend"] = "triton_kernel"
    return overrides
"""

SGLANG_HUMMING = """
from sglang.srt.environ import envs

def get_standard_humming_moe_gemm_type():
    asked = envs.SGLANG_HUMMING_MOE_GEMM_TYPE.get().lower()
    if asked == "grouped":
        return HummingGemmType.GROUPED_CONTIGUOUS
    return HummingGemmType.INDEXED
"""

SGLANG_OVERRIDES = """
def _moe_runner_backend_quant_constraints(view):
    return {}
"""


def sglang_experts() -> dict[str, str]:
    """What an SGLang has of routed experts, as modules."""
    srt = "sglang/srt"
    return {
        f"{srt}/arg_groups/overrides.py": SGLANG_OVERRIDES,
        f"{srt}/arg_groups/model_overrides/gpt_oss.py": SGLANG_GPT_OSS,
        f"{srt}/layers/moe/utils.py": SGLANG_MOE,
        f"{srt}/layers/moe/moe_runner/humming.py": SGLANG_HUMMING,
        f"{srt}/layers/quantization/mxfp4.py": SGLANG_MXFP4_EXPERTS,
        f"{srt}/environ.py": 'class Envs:\n    SGLANG_HUMMING_MOE_GEMM_TYPE = EnvStr("")\n',
    }


def sglang(
    root: Path,
    version: str = "0.5.23",
    *,
    plugins: bool = True,
    tuner: bool = False,
    experts: bool = False,
) -> None:
    """An SGLang with the option, and with or without plugins, FlashInfer's tuner, and the option of
    routed experts."""
    words = '["auto", "flashinfer_cudnn", "flashinfer_cutedsl", "flashinfer_cutlass", \
"flashinfer_trtllm", "marlin"]'
    arguments = 'OPTION = "--fp4-gemm-backend"\n'
    if tuner:
        arguments += 'TUNER = "disable_flashinfer_autotune"\n'
    files = {
        "sglang/srt/server_args.py": arguments,
        "sglang/srt/arg_groups/choices.py": f"FP4_GEMM_RUNNER_BACKEND_CHOICES = {words}\n",
        "sglang/srt/layers/quantization/fp4_utils.py": SGLANG_CHOICE,
        "sglang/srt/layers/quantization/modelopt_quant.py": SGLANG_LAYERS,
        "sglang/srt/utils/common.py": SGLANG_COMMON,
    }
    if experts:
        words = ("auto", "marlin", "humming", "triton", "triton_kernel", "flashinfer_mxfp4")
        files["sglang/srt/arg_groups/choices.py"] += f"MOE_RUNNER_BACKEND_CHOICES = {list(words)}\n"
        files["sglang/srt/layers/quantization/modelopt_quant.py"] += SGLANG_NVFP4_EXPERTS
        files |= sglang_experts()
    if plugins:
        files["sglang/srt/plugins/__init__.py"] = 'GROUP = "sglang.srt.plugins"\n'
    write(root, files)
    distribution(root, "sglang", version)


def _class(name: str) -> str:
    needs = {
        "FlashInferCuteDsl": "current_platform.is_device_capability_family(100)",
        "FlashInferCuteDslW4A16": "current_platform.has_device_capability(100)",
        "FlashInferB12x": "current_platform.has_device_capability(120)",
        "Marlin": "current_platform.has_device_capability(75)",
        "Humming": "current_platform.has_device_capability(75)",
        "FlashInferTrtllm": "True",
        "FlashInferCudnn": "True",
    }.get(name, "current_platform.has_device_capability(100)")
    if name in ("Fbgemm", "B12x", "B12xW4A16", "Torch"):
        needs = "False"
    return f"""
class {kernel(name)}:
    @classmethod
    def is_supported(cls, compute_capability=None):
        return ({needs}), "not here"
"""


MXFP4_KERNELS = """
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic

class MxFp4LinearLayerConfig:
    activation_quant_key = None

class MarlinMxFp4LinearKernel:
    @classmethod
    def fits(cls, key):
        return key in (None, kMxfp4Dynamic)

class FlashInferMxFp4LinearKernel:
    @classmethod
    def fits(cls, key):
        return current_platform.has_device_capability(100) and key == kMxfp4Dynamic

class HummingMxFp4LinearKernel(MarlinMxFp4LinearKernel):
    pass
"""
MXFP4 = """
_POSSIBLE_MXFP4_KERNELS = {PlatformEnum.CUDA: [
    FlashInferMxFp4LinearKernel, MarlinMxFp4LinearKernel, HummingMxFp4LinearKernel,
]}

def _activation(said):
    from vllm.config.quantization import QuantizationConfigArgs

    config = get_current_vllm_config_or_none()
    if config.model_config is None:
        return said
    args = config.model_config.quantization_config
    if not isinstance(args, QuantizationConfigArgs) or args.linear is None:
        return said
    return args.linear.activation

def init_mxfp4_linear_kernel(activation_quant_key=None):
    key = _activation(activation_quant_key)
    word = _asked("mxfp4")
    for each in _POSSIBLE_MXFP4_KERNELS[PlatformEnum.CUDA]:
        if word != "auto" and each not in _LINEAR_BACKEND_KERNEL_MAP[word]:
            continue
        if each.__name__ not in envs.VLLM_DISABLED_KERNELS and each.fits(key):
            return each(MxFp4LinearLayerConfig(activation_quant_key=key))
    raise ValueError("no kernel is left")
"""


_ORACLE = """
from enum import Enum
import vllm.envs as envs
from vllm.platforms import current_platform

class Backend(Enum):
    TRITON = "TRITON"
    HUMMING = "HUMMING"
    MARLIN = "MARLIN"

def map_{format}_backend(word):
    mapping = {{"triton": Backend.TRITON, "humming": Backend.HUMMING, "marlin": Backend.MARLIN}}
    if backend := mapping.get(word):
        return backend
    raise ValueError(f"{{word}} is no backend of {format} experts")

class Experts:
    @staticmethod
    def humming_gemm_type():
        grouped = envs.VLLM_HUMMING_MOE_GEMM_TYPE == "grouped"
        return GemmType.GROUPED_CONTIGUOUS if grouped else GemmType.INDEXED

def {function}(config, *keys):
    if config.moe_backend != "auto":
        return map_{format}_backend(config.moe_backend), Experts
    for backend in {order}:
        if backend != Backend.TRITON or current_platform.has_device_capability(90):
            return backend, Experts
"""


def vllm_experts() -> dict[str, str]:
    """What a vLLM has of routed experts, as modules."""
    fused = "vllm/model_executor/layers/fused_moe"
    orders = {"nvfp4": "[Backend.HUMMING, Backend.MARLIN]", "mxfp4": "[Backend.TRITON]"}
    oracles = {
        f"{fused}/oracle/{fmt}.py": _ORACLE.format(
            format=fmt, function=f"select_{fmt}_moe_backend", order=order
        )
        for fmt, order in orders.items()
    }
    activations = "".join(f"    {n} = {n!r}\n" for n in ("SILU", "SWIGLUOAI", "RELU2_NO_MUL"))
    return {
        **oracles,
        f"{fused}/activation.py": (
            f"from enum import Enum\n\nclass MoEActivation(Enum):\n{activations}"
        ),
        f"{fused}/config.py": (
            "from enum import Enum\n\nclass RoutingMethodType(Enum):\n    Renormalize = 1\n"
        ),
    }


def vllm(
    root: Path, version: str = "0.33.0", *, tuner: bool = False, experts: bool = False
) -> None:
    """A vLLM whose linear backend may be named for each quantisation, and that of routed experts
    with `experts`."""
    classes = "".join(map(_class, NVFP4))
    words = ",\n".join(
        f'    "{word}": {{{", ".join(map(kernel, names))}}}' for word, names in WORDS.items()
    )
    source = f"""
import vllm.envs as envs
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import PlatformEnum, current_platform
{classes}{MXFP4_KERNELS}
_LINEAR_BACKEND_KERNEL_MAP = {{
{words},
}}
_POSSIBLE_NVFP4_KERNELS = {{PlatformEnum.CUDA: [{", ".join(KERNELS)}]}}

def _asked(quantization):
    config = get_current_vllm_config_or_none().kernel_config
    own = (config.linear_backend_per_quant or {{}}).get(quantization)
    return own or config.linear_backend

def init_nvfp4_linear_kernel(use_a16=False):
    word = _asked("nvfp4_w4a16" if use_a16 else "nvfp4_w4a4")
    weight_only = ({kernel("Marlin")}, {kernel("Humming")}, {kernel("FlashInferCuteDslW4A16")})
    kernels = _POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
    if use_a16:
        kernels = [each for each in kernels if each in weight_only]
    if word != "auto":
        kernels = [each for each in kernels if each in _LINEAR_BACKEND_KERNEL_MAP[word]]
    elif current_platform.get_device_capability().to_int() == 90:
        kernels = [{kernel("Humming")}, *kernels]
    for each in kernels:
        if each.__name__ in envs.VLLM_DISABLED_KERNELS:
            continue
        fits, why = each.is_supported()
        if fits:
            return each()
    raise ValueError("no kernel is left")
{MXFP4}"""
    kernel_config = "class KernelConfig:\n    linear_backend_per_quant = None\n"
    arguments = 'LINEAR, CONFIG = "--linear-backend", "--kernel-config"\n'
    if tuner:
        kernel_config += "    enable_flashinfer_autotune = None\n"
        arguments += 'TUNER = "--enable-flashinfer-autotune"\n'
    variables = ""
    if experts:
        kernel_config = (
            'MoEBackend = Literal["auto", "triton", "humming", "marlin", "cutlass"]\n\n'
            + kernel_config
        )
        arguments += 'EXPERTS = "--moe-backend"\n'
        name = "VLLM_HUMMING_MOE_GEMM_TYPE"
        variables = f'    "{name}": lambda: os.environ.get("{name}", None),\n'
        write(root, vllm_experts())
    write(
        root,
        {
            "vllm/model_executor/kernels/linear/__init__.py": source,
            "vllm/config/kernel.py": kernel_config,
            "vllm/engine/arg_utils.py": arguments,
            "vllm/plugins/__init__.py": 'GROUP = "vllm.general_plugins"\n',
            "vllm/platforms/interface.py": (
                "import enum\n\nclass PlatformEnum(enum.Enum):\n    CUDA = enum.auto()\n"
            ),
            "vllm/platforms/__init__.py": "from .interface import PlatformEnum\n",
            "vllm/config/quantization.py": "class QuantizationConfigArgs:\n    linear = None\n",
            "vllm/model_executor/layers/quantization/utils/quant_utils.py": (
                "class QuantKey:\n    dtype = None\n\nkMxfp4Dynamic = QuantKey(dtype='fp4')\n"
            ),
            "vllm/envs.py": (
                "import os\n\nenvironment_variables = {\n"
                '    "VLLM_DISABLED_KERNELS": lambda: (\n'
                '        os.environ.get("VLLM_DISABLED_KERNELS", "").split(",")\n    ),\n'
                + variables
                + "}\n"
            ),
        },
    )
    distribution(root, "vllm", version)


def both(root: Path) -> Path:
    """Both engines beside one another, without a tuner."""
    sglang(root)
    vllm(root)
    return root
