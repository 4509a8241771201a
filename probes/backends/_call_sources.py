"""How libraries are called from raw tensors: the text of a bundle's ``call.py``, by library.

Each is plain Python that imports torch and the library and nothing of ours, in the way an engine
calls it. ``prepare(weight, problem)`` gets a dictionary of ``codes``, ``scales`` and
``global_scale``, and one of ``format``, ``n``, ``k``, ``rows``, ``block`` and ``dtype`` (torch's);
``prepare_activation(a)``, where it is there, the activation; ``run(state, a, out, tactic)``
enqueues.
"""

from __future__ import annotations

MARLIN = '''"""SGLang's Marlin, W4A16 with NVFP4 weights, as its linear layer calls it."""

import torch
from sglang.srt.layers.quantization import marlin_utils_fp4 as marlin

_prepare = getattr(marlin, "prepare_nvfp4_layer_for_marlin", None)
_prepare = _prepare or marlin.prepare_fp4_layer_for_marlin


def _parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


def prepare(weight, problem):
    layer = torch.nn.Module()
    layer.output_size_per_partition = problem["n"]
    layer.input_size_per_partition = problem["k"]
    layer.params_dtype = problem["dtype"]
    layer.weight = _parameter(weight["codes"])
    layer.weight_scale = _parameter(weight["scales"].view(torch.float8_e4m3fn))
    layer.weight_global_scale = _parameter(weight["global_scale"].to(problem["dtype"]))
    _prepare(layer)
    return layer, problem


def run(state, a, out, tactic):
    layer, problem = state
    if not a.shape[0]:
        return
    workspace = getattr(layer, "workspace", None)
    out.copy_(
        marlin.apply_fp4_marlin_linear(
            input=a,
            weight=layer.weight,
            weight_scale=layer.weight_scale,
            weight_global_scale=layer.weight_global_scale,
            workspace=layer.marlin_workspace if workspace is None else workspace,
            size_n=problem["n"],
            size_k=problem["k"],
        )
    )
'''

HUMMING = '''"""humming-kernels, W4A16 with FP4 weights, as vLLM's linear layer calls it."""

import inspect
import json
import os
import re

import torch

os.environ.setdefault("HUMMING_COMPILER", "nvcc")

from humming import forward, schema, transform, tune  # noqa: E402

SCHEMAS = {
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "nvfp4"},
    "mxfp4": {"quant_method": "mxfp4"},
}
COMPUTE = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}
PAD_N, PAD_K, LOCKS = 256, 128, 2048


def _on(function, device):
    """The device, for versions whose functions take it."""
    return {"device": device} if "device" in inspect.signature(function).parameters else {}


def prepare(weight, problem):
    device = weight["codes"].device
    n, k, dtype = problem["n"], problem["k"], problem["dtype"]
    tensors = {"weight": weight["codes"], "weight_scale": weight["scales"]}
    if problem["format"] == "nvfp4":
        tensors["weight_scale_2"] = weight["global_scale"].reshape(1)
    loaded = schema.BaseWeightSchema.from_config(SCHEMAS[problem["format"]])
    weight_schema, standard = loaded.convert_humming(
        tensors=tensors,
        shape_n_stacks=[n],
        shape_k_stacks=[k],
        param_dtype=dtype,
        **_on(loaded.convert_humming, device),
    )
    config = transform.prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=weight_schema,
        input_schema=schema.HummingInputSchema(),
        pad_n_to_multiple=PAD_N,
        pad_k_to_multiple=PAD_K,
        torch_dtype=dtype,
        **_on(transform.prepare_layer_config, device),
    )
    ready = transform.transform_humming_tensors(config, standard)
    ready = {name: tensor.clone() for name, tensor in ready.items()}
    # One lock buffer a layer, which all its streams share.
    return config, ready, torch.zeros(LOCKS, dtype=torch.int32, device=device)


def _value(text):
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    if re.fullmatch(r"[0-9]+(x[0-9]+)+", text):
        return [int(part) for part in text.split("x")]
    return int(text) if text.isdecimal() else text


def _tuning(config, m, tactic, device):
    if tactic != "default":
        return json.dumps({key: _value(v) for key, v in (p.split("=") for p in tactic.split(","))})
    ask = tune.get_heuristics_config
    found = ask(config, **COMPUTE, **_on(ask, device))
    return json.dumps(next(tuning for low, high, tuning in found if low < m <= high))


def run(state, a, out, tactic):
    config, tensors, locks = state
    forward.humming_forward(
        config,
        inputs=a,
        **tensors,
        outputs=out if a.shape[0] else None,
        locks=locks,
        compute_config=json.dumps(COMPUTE),
        tuning_config=_tuning(config, a.shape[0], tactic, a.device),
    )
'''

_FLASHINFER = '''"""flashinfer.mm_fp4 with backend={api!r}: FP4 activations and weights."""

import json

import flashinfer
import torch
from flashinfer.autotuner import AutoTuner

BACKEND = {api!r}
SHUFFLED = {shuffled}  # rows of the weight in the order of TensorRT-LLM's kernels
PER_TOKEN = {per_token}  # one alpha for each row
SMALL = "8x4"  # in front of a tactic: the activation's scales in that layout


def _swizzled(scales, tile):
    """Block scales (rows, columns) in the 128x4 or 8x4 layout, padded with zeros."""
    rows, cols = scales.shape
    pad = (0, -cols % 4, 0, -rows % tile)
    whole = torch.nn.functional.pad(scales, pad)
    rows, cols = whole.shape
    if tile == 8:
        return whole.view(-1, 8, cols // 4, 4).transpose(1, 2).reshape(rows, cols)
    return whole.view(-1, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, cols)


def prepare(weight, problem):
    codes, scales = weight["codes"], weight["scales"]
    if SHUFFLED:
        order = flashinfer.utils.get_shuffle_matrix_a_row_indices(codes, 128).to(codes.device)
        codes, scales = codes[order], scales[order]
    return codes, _swizzled(scales, 128), weight["global_scale"], problem, {{}}


def prepare_activation(a):
    return a["codes"], _swizzled(a["scales"], 128), _swizzled(a["scales"], 8), a["global_scale"]


def _alpha(state, a):
    """Computed once a pair, as when a model loads: no kernel of its own before the GEMM."""
    kept = state[4]
    if id(a) not in kept:
        alpha = (a[3] * state[2]).reshape(1)
        if PER_TOKEN:
            alpha = alpha.expand(a[0].shape[0]).contiguous()
        torch.cuda.current_stream().synchronize()
        kept[id(a)] = alpha
    return kept[id(a)]


def run(state, a, out, tactic):
    codes, scales, _, problem, _ = state
    small = tactic.startswith(SMALL)
    pinned = tactic.removeprefix(SMALL)
    nvfp4 = problem["format"] == "nvfp4"

    def call():
        flashinfer.mm_fp4(
            a[0],
            codes.t(),
            a[2] if small else a[1],
            scales.t(),
            _alpha(state, a) if nvfp4 else None,
            out.dtype,
            out=out,
            block_size=problem["block"],
            use_8x4_sf_layout=small,
            backend=BACKEND,
            use_nvfp4=nvfp4,
        )

    if pinned in ("", "default"):
        call()
        return
    chosen = _tuples(json.loads(pinned))
    tuner = AutoTuner.get()
    # The tactic that failed, whatever this process has tuned.
    tuner.choose_one = lambda op, runners, config, inputs, **rest: (runners[0], chosen)
    try:
        call()
    finally:
        del tuner.choose_one


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
'''


def flashinfer(api: str, shuffled: bool, per_token: bool) -> str:
    """The call of `mm_fp4` with this backend, weight layout and kind of alpha."""
    return _FLASHINFER.format(api=api, shuffled=shuffled, per_token=per_token)
