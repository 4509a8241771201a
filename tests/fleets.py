"""Small fleets to fill a fleet store with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fp4tune.fleet import bundle, merge

BUCKET = {
    "format": "nvfp4",
    "activation": "bf16",
    "out_dtype": "bf16",
    "groups": 1,
    "m_lo": 1,
    "m_hi": 16,
    "n": 4096,
    "k": 4096,
}


def sha(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def node(number: int) -> str:
    return sha("node", number)[:32]


def gpu(number: int, index: int = 0) -> str:
    return f"GPU-{number}-{index}"


def rows(
    number: int,
    failures: dict[tuple[int, str], int] | None = None,
    gpus: int = 2,
    backends: tuple[str, ...] = ("fast", "plain"),
    problems: int = 1000,
    us: dict[tuple[int, str], float] | None = None,
    choice: str | None = None,
    run: str = "a",
    started: float = 1e9,
) -> dict[str, list[dict]]:
    """A node's tables; `failures` is failing problems by (GPU, backend), `us` times likewise."""
    found: dict[str, list[dict]] = {
        "environment": [
            {
                "fingerprint": sha(b),
                "backend": b,
                "arch": "sm90",
                "facts": json.dumps({"code": sha("code", b)}),
                "first_seen": started,
            }
            for b in backends
        ]
    }
    for index in range(gpus):
        name = f"run-{number}-{index}-{run}"
        device = json.dumps({"name": "H200", "uuid": gpu(number, index)})
        found.setdefault("run", []).append(
            {
                "id": name,
                "started": started,
                "finished": started + 1,
                "status": "finished",
                "seed": str(2**64 - 1),
                "level": "quick",
                "profile": "strict",
                "device": device,
                "versions": "{}",
            }
        )
        for at, b in enumerate(backends):
            bad = (failures or {}).get((index, b), 0)
            identity = 100 * index + at + 1
            what = {"id": identity, "run": name, "fingerprint": sha(b), "backend": b}
            what |= {"tactic": "default", **BUCKET}
            found.setdefault("evidence", []).append(
                {
                    **what,
                    "regime": "streams",
                    "data": "exact",
                    "status": "failed" if bad else "passed",
                    "launches": 2 * problems,
                    "problems": problems,
                    "width": 24,
                    "seconds": 0.5,
                    "detail": json.dumps({"bad_launches": bad, "bad_problems": bad})
                    if bad
                    else "{}",
                    "at": started,
                }
            )
            if bad:
                found.setdefault("finding", []).append(
                    {
                        **what,
                        "problem": "{}",
                        "kind": "unwritten",
                        "regime": "streams",
                        "data": "exact",
                        "seed": "1",
                        "launch": None,
                        "condition": None,
                        "detail": "{}",
                        "at": started,
                    }
                )
            median = (us or {}).get((index, b), 10.0)
            found.setdefault("timing", []).append(
                {
                    **what,
                    "median_us": median,
                    "lo_us": median,
                    "hi_us": median,
                    "samples": 9,
                    "host_us": None,
                    "detail": "{}",
                    "at": started,
                }
            )
            found.setdefault("verdict", []).append(
                {
                    **what,
                    "profile": "strict",
                    "status": "unsafe" if bad else "safe",
                    "conditions": "[]",
                    "reasons": "[]",
                    "bounds": "{}",
                    "at": started,
                }
            )
    chosen = choice or backends[0]
    found["choice"] = [
        {
            "arch": "sm90",
            "gpu": "H200",
            "profile": "strict",
            **BUCKET,
            "backend": chosen,
            "tactic": "default",
            "layout": "plain",
            "status": "safe",
            "conditions": "[]",
            "median_us": 10.0,
            "launches": 2 * problems,
            "problems": problems,
            "fingerprint": sha(chosen),
            "default_backend": None,
        }
    ]
    return found


def content(members: dict[str, bytes]) -> str:
    """The content hash of these members, made as docs/fleet.md says and not by the program."""
    lines = [
        f"{name.removesuffix('.ndjson')} {hashlib.sha256(members[name]).hexdigest()}\n"
        for name in sorted(members)
        if name.endswith(".ndjson")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def put(folder: Path, number: int, created: float = 1e9, key: Path | None = None, **other) -> Path:
    """Write one node's bundle; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    identity, data = bundle.pack(
        rows(number, **other), node(number), created, None, key, parquet=False
    )
    path = folder / f"{number:05d}-{identity[:8]}{bundle.SUFFIX}"
    path.write_bytes(data)
    return path


def troubled(folder: Path) -> None:
    """Merge twelve nodes into ``store``: ``fast`` fails on all GPUs, one GPU fails with ``plain``,
    one is slow, and one node has chosen otherwise."""
    for number in range(12):
        failures = {(g, "fast"): 300 + number for g in range(2)}
        if number == 3:
            failures[1, "plain"] = 400
        times = {(0, b): 13.0 for b in ("fast", "plain")} if number == 5 else {}
        choice = "plain" if number != 7 else "fast"
        put(folder / "in", number, failures=failures, us=times, choice=choice)
    merge.merge([str(folder / "in")], str(folder / "store"))


def key(path: Path) -> tuple[Path, Path]:
    """A new Ed25519 key: (private key file, public key file)."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Ed25519PrivateKey.generate()
    private, public = path.with_suffix(".pem"), path.with_suffix(".pub")
    private.write_bytes(made.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(
        made.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
