"""What is read of checkpoints: real configurations, cases that went wrong, and what reading costs.

    python benchmarks/checkpoints.py --out DIR [--corpus DIR] [--cases DIR] [--gigabytes 20]

`--corpus` is a folder of folders called OWNER--MODEL, each with a config.json: the tables of all of
them at TP 1, 2, 4 and 8 go into layers.txt and layers.json. `--cases` is a folder of folders, each
with a checkpoint or configuration and a README: what the commands say of them now goes into
cases.json. Into cost.json go the seconds of `fp4tune layers` over a made-up checkpoint of
160 files (headers without data, 180,000 tensors) and of `fp4tune check-weights` over one of so many
gigabytes (codes are holes in the files, scales are written), with its peak memory; both are made in
a temporary folder and deleted. Seconds of the clock and of the processor are kept apart: on a
machine that does something else besides, the first say little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _machine import versions

TPS = (1, 2, 4, 8)
LLAMA = {"model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8}


def fp4tune(*arguments: str, seconds: float = 900.0, **environment: str) -> dict[str, Any]:
    """Run the command in this interpreter: exit code, output, seconds and peak memory."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "fp4tune.cli", *arguments],
            env={**os.environ, "COLUMNS": "200", **environment},
            stdout=out,
            stderr=err,
        )
        limit = threading.Timer(seconds, child.kill)
        limit.start()
        # Of this child alone: what is asked of all children is the largest of any before it.
        _, status, used = os.wait4(child.pid, 0)
        limit.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        taken = time.monotonic() - begun
        out.seek(0)
        err.seek(0)
        return {
            "exit_code": child.returncode,
            "stdout": out.read(),
            "stderr": err.read(),
            "seconds": round(taken, 3),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
            "peak_mib": round(used.ru_maxrss / 1024),
        }


def tables(corpus: Path, out: Path) -> None:
    """The layers of every configuration, on one of 1, 2, 4 and 8 ranks."""
    from fp4tune.probes.models.layers import read_layers
    from fp4tune.report.terminal.layers import layer_table

    text: list[str] = []
    documents: dict[str, Any] = {}
    for place in sorted(p.parent for p in corpus.glob("*/config.json")):
        model = place.name.replace("--", "/")
        for tp in TPS:
            found = replace(read_layers(place, tp), checkpoint=model)
            documents.setdefault(model, {})[tp] = found.json()
            text += [*layer_table(found), *([] if found.probed else ["", found.nothing()]), "", ""]
    (out / "layers.txt").write_text("\n".join(text), encoding="utf-8")
    (out / "layers.json").write_text(json.dumps(documents, indent=1) + "\n", encoding="utf-8")


def cases(folder: Path, out: Path) -> None:
    """What the commands say of each case: layers at TP 1 and 8, weights, a driver that hangs."""
    from fp4tune.probes.models.config import read_config
    from fp4tune.probes.models.experts import experts_on_rank
    from fp4tune.probes.models.layers import read_layers
    from fp4tune.probes.models.place import find_files

    found: dict[str, Any] = {}
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        if (place / "f.c").is_file():
            said = _hung(place)
        elif any(place.glob("*.safetensors")):
            with tempfile.TemporaryDirectory() as state:
                said = {"check-weights": fp4tune("check-weights", str(place), "--state", state)}
        else:
            said = {
                f"layers --tp {tp}": fp4tune("layers", str(place), "--tp", str(tp)) for tp in (1, 8)
            }
            layers = read_layers(place)
            known = layers.probed or experts_on_rank(layers)
            if not known and read_config(find_files(place)).quantisation:
                # Nothing is measured: it says why there is nothing to.
                with tempfile.TemporaryDirectory() as state:
                    said["probe --model-config"] = fp4tune(
                        "probe", "--gpu", "none", "--model-config", str(place), "--state", state
                    )
        found[place.name] = {
            command: {
                "exit_code": each["exit_code"],
                **{key: each[key] for key in _TIMES if "load" in each},
                "says": (each["stdout"] + each["stderr"]).replace(str(place), ".").splitlines(),
            }
            for command, each in said.items()
        }
    (out / "cases.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


_TIMES = ("seconds", "cpu_seconds", "load")
ASKING = (
    "doctor", "probe", "probe --gpu 0 --engine vllm", "facts --check", "daemon",
)  # fmt: skip
"""Commands that ask the driver."""


def _hung(place: Path) -> dict[str, dict[str, Any]]:
    """What those commands say where the driver never answers, and after how many seconds."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libnvidia-ml.so.1"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-o", str(library), str(place / "f.c")], check=True
        )
        (Path(folder) / "daemon.toml").write_text('[http]\nlisten = "none"\n')
        for command in ASKING:
            words = [*command.split(), "--state", folder]
            if command == "daemon":
                words += ["--config", f"{folder}/daemon.toml"]
            try:
                said = fp4tune(*words, seconds=120, LD_LIBRARY_PATH=folder)
            except subprocess.TimeoutExpired:
                said = {"exit_code": None, "stdout": "nothing in 120 s", "stderr": ""}
                said |= {"seconds": 120, "cpu_seconds": None}
            # What is installed is this machine's own: what is said of the driver counts.
            kept = [line for line in (said["stdout"] + said["stderr"]).splitlines()
                    if "driver" in line or command != "doctor"]  # fmt: skip
            found[command] = {**said, "stdout": "\n".join(kept), "stderr": ""}
            found[command]["load"] = round(os.getloadavg()[0], 1)
    return found


def save(path: Path, tensors: dict[str, tuple[str, list[int], int]], data: bool) -> dict[str, int]:
    """A safetensors file whose data is a hole, or is not there; where each tensor begins."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if data:
            file.truncate(8 + len(text) + at)
    return {name: 8 + len(text) + each["data_offsets"][0] for name, each in header.items()}


def nvfp4(name: str, n: int, k: int) -> dict[str, tuple[str, list[int], int]]:
    return {
        f"{name}.weight": ("U8", [n, k // 2], n * k // 2),
        f"{name}.weight_scale": ("F8_E4M3", [n, k // 16], n * k // 16),
        f"{name}.weight_scale_2": ("F32", [], 4),
        f"{name}.input_scale": ("F32", [], 4),
    }


def many_files(place: Path, files: int = 160) -> int:
    """Headers of a model of DeepSeek-V3's size over so many files; returns how many tensors."""
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for i in range(61):
        at = f"model.layers.{i}"
        for leaf, n, k in (("q_a", 1536, 7168), ("q_b", 24576, 1536), ("kv_b", 32768, 512)):
            tensors[f"{at}.self_attn.{leaf}_proj.weight"] = ("BF16", [n, k], 2 * n * k)
        kv_a = f"{at}.self_attn.kv_a_proj_with_mqa.weight"
        tensors[kv_a] = ("BF16", [576, 7168], 2 * 576 * 7168)
        tensors |= nvfp4(f"{at}.self_attn.o_proj", 7168, 16384)
        size, owners = 2048, ["shared_experts", *(f"experts.{e}" for e in range(256))]
        if i < 3:
            size, owners = 18432, [""]
        for owner in owners:
            inner = f"{at}.mlp.{owner}".rstrip(".")
            for leaf, n, k in (("gate", size, 7168), ("up", size, 7168), ("down", 7168, size)):
                tensors |= nvfp4(f"{inner}.{leaf}_proj", n, k)
    names = list(tensors)
    share = -(-len(names) // files)
    where: dict[str, str] = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = {name: tensors[name] for name in names[i * share : (i + 1) * share]}
        save(place / file, mine, data=False)
        where |= dict.fromkeys(mine, file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
        "num_hidden_layers": 61, "num_experts_per_tok": 8, "n_routed_experts": 256,
        "q_lora_rank": 1536, "kv_lora_rank": 512,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    return len(tensors)


def large(place: Path, gigabytes: float) -> dict[str, Any]:
    """A checkpoint of so many gigabytes with scales of a Gaussian weight; returns what is in it."""
    hidden, size = 8192, 28672
    draw = random.Random(1)
    block = bytes(draw.choices(range(0x30, 0x7F), k=1 << 20)) * 4
    per_layer = 3 * hidden * size * 9 / 16
    scales = 0
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    for i in range(layers):
        tensors: dict[str, tuple[str, list[int], int]] = {}
        for leaf, n, k in (("gate", size, hidden), ("up", size, hidden), ("down", hidden, size)):
            tensors |= nvfp4(f"model.layers.{i}.mlp.{leaf}_proj", n, k)
        file = place / f"model-{i + 1:05d}-of-{layers:05d}.safetensors"
        begins = save(file, tensors, data=True)
        with open(file, "r+b") as opened:
            for name, (dtype, _, length) in tensors.items():
                opened.seek(begins[name])
                if dtype == "F32":
                    opened.write(struct.pack("<f", 2e-4 if "scale_2" in name else 3e-3))
                elif dtype == "F8_E4M3":
                    scales += length
                    for at in range(0, length, len(block)):
                        opened.write(block[: length - at])
            opened.flush()
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    files = sorted(file.name for file in place.glob("*.safetensors"))
    where = {
        f"model.layers.{i}.mlp.{leaf}_proj.{part}": files[i]
        for i in range(layers)
        for leaf in ("gate", "up", "down")
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale")
    }
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    total = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return {"gigabytes": round(total / 1e9, 2), "scale_gigabytes": round(scales / 1e9, 2)}


def cost(out: Path, gigabytes: float) -> None:
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "load": [round(each, 1) for each in os.getloadavg()],
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory() as folder:
        tensors = many_files(Path(folder))
        runs = [fp4tune("layers", folder, "--tp", "8") for _ in range(7)]
        assert all(run["exit_code"] == 0 for run in runs), runs[0]["stderr"]
        empty = [fp4tune("--version") for _ in range(7)]
        document["layers"] = {
            "files": 160,
            "tensors": tensors,
            "median_seconds": statistics.median(run["seconds"] for run in runs),
            "least_seconds": min(run["seconds"] for run in runs),
            "median_cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            "of_these_to_start": statistics.median(run["cpu_seconds"] for run in empty),
            "peak_mib": runs[-1]["peak_mib"],
        }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as state:
        about = large(Path(folder), gigabytes)
        cold = fp4tune("check-weights", folder, "--state", state)
        warm = fp4tune("check-weights", folder, "--state", state)
        assert cold["exit_code"] == 0, cold["stdout"] + cold["stderr"]
        document["check-weights"] = {
            **about, "seconds": cold["seconds"], "cpu_seconds": cold["cpu_seconds"],
            "seconds_again": warm["seconds"],
            "peak_mib": warm["peak_mib"],
        }  # fmt: skip
    (out / "cost.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.corpus is not None:
        tables(options.corpus, options.out)
    if options.cases is not None:
        cases(options.cases, options.out)
    if options.gigabytes > 0 and shutil.disk_usage(tempfile.gettempdir()).free > 4e9:
        cost(options.out, options.gigabytes)


if __name__ == "__main__":
    main()
