"""Single bits of a ledger flipped, one at a time: does it ever answer with what was not stored?

A ledger with rows of every kind, of several runs. Of each copy with one flipped bit everything is
read that the program reads, and every row is looked at: the copy says what is damaged, or is
refused in a sentence, or answers with what was stored and nothing else. Counted are changes without
a word, and exceptions that are no StateError. Then pages are overwritten with noise, and what is
saved of the ledger is counted.

    python benchmarks/trust_ledger.py --out benchmarks/results/trust --flips 2000 --pages 50
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _machine import machine, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_damage import everything, fill

from fp4tune.cache import state
from fp4tune.cache.errors import StateError
from fp4tune.daemon.mend import mend

PAGE = 4096


def read(place: Path, stored: set[str]) -> str:
    """What a ledger comes to."""
    try:
        found, said = everything(place, readonly=True)
    except StateError:
        return "refused in a sentence"
    except Exception as error:
        return f"raised {type(error).__name__}"
    if found - stored:
        return "said, with other content" if said else "other content without a word"
    if said:
        return "said what is damaged"
    return "as it was stored" if found == stored else "less content without a word"


def flips(data: bytes, stored: set[str], count: int, rng: random.Random, place: Path) -> Any:
    """Outcomes of `count` single bits, all over the file."""
    seen: Counter[str] = Counter()
    odd = []
    for _ in range(count):
        bit = rng.randrange(8 * len(data))
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (place / state.LEDGER).write_bytes(broken)
        outcome = read(place, stored)
        seen[outcome] += 1
        if outcome.endswith("without a word") or outcome.startswith("raised"):
            odd.append({"bit": bit, "outcome": outcome})
    return {"flips": count, "outcomes": dict(seen), "odd": odd}


def noise(data: bytes, stored: set[str], count: int, rng: random.Random) -> Any:
    """A page of noise in a ledger, and the daemon's mending: the rows that are there afterwards."""
    shares = []
    wrong = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            broken = bytearray(data)
            page = rng.randrange(1, len(data) // PAGE)
            broken[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
            (place / state.LEDGER).write_bytes(broken)
            mended = mend(place)
            found, said = everything(place, readonly=True)
            shares.append(len(found & stored) / len(stored))
            # Of a choices.db that is not there the last generation is published again.
            new = {row for row in found - stored if not row.startswith("generations ")}
            wrong += bool(new) or (found != stored and not (said or mended))
    shares.sort()
    return {
        "pages": count,
        "other_content_or_no_word": wrong,
        "rows_left_least": round(shares[0], 3),
        "rows_left_median": round(shares[len(shares) // 2], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copy:
        fill(Path(folder), runs=4, each=20)
        stored, said = everything(Path(folder), readonly=True)
        assert not said, said
        data = (Path(folder) / state.LEDGER).read_bytes()
        result = {
            "what": "single bits and whole pages of a ledger changed",
            "machine": machine(),
            "seed": arguments.seed,
            "bytes": len(data),
            "rows": len(stored),
            "bits": flips(data, stored, arguments.flips, rng, Path(copy)),
            "pages": noise(data, stored, arguments.pages, rng),
            "seconds": round(time.monotonic() - start, 1),
        }
    write(arguments.out / "ledger.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if result["bits"]["odd"] or result["pages"]["other_content_or_no_word"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
