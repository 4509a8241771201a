"""What `regret.py` measured, as numbers, a table and a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log, log2
from pathlib import Path
from typing import Any

BASELINES = {
    "marlin": "always marlin (SGLang's default on SM90)",
    "humming": "always humming (vLLM's default on SM90)",
    "torch-bf16-resident": "always cuBLAS (bf16 weights, 3.6 times the memory)",
}
COLOURS = {"marlin": "#4477aa", "humming": "#ee6677", "torch-bf16-resident": "#228833"}
ALLOWED = {"geometric_mean": 0.01, "worst": 0.05, "disagreement": 0.02}


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [log(v) for v in values]
    return exp(sum(logs) / len(logs)) if logs else None


def judged(row: dict[str, Any], more: Sequence[list[str]]) -> dict[str, Any]:
    """One (m, n, k): regret of each choice, agreement of the repeats, speed-up over the baselines.

    `more` are choices of earlier runs. Regret is 0 where the choice is the oracle's best.
    """
    us = {(c["backend"], c["tactic"]): c["us"] for c in row["candidates"]}
    able = {(c["backend"], c["tactic"]): c["us"] for c in row["candidates"] if not c["line"]}
    best = min(able, key=lambda key: (able[key], key))
    choices = [tuple(c) for c in (*row["choices"], *more) if tuple(c) in able]
    regrets = [able[c] / able[best] - 1 for c in choices]
    times = [able[c] for c in choices]
    usual, count = Counter(choices).most_common(1)[0]
    speed = {}
    for name in BASELINES:
        mine = [t for (backend, _), t in us.items() if backend == name]
        if mine:
            speed[name] = min(mine) / able[usual]
    return {
        "m": row["m"],
        "n": row["n"],
        "k": row["k"],
        "best": list(best),
        "best_us": able[best],
        "choice": list(usual),
        "choice_us": able[usual],
        "candidates": len(able),
        "regret_mean": sum(regrets) / len(regrets),
        "regret_worst": max(regrets),
        "repeats": len(choices),
        "same": count / len(choices),
        "differ": max(times) / min(times) - 1,
        "speedup": speed,
        "capped": sum(c["half_width"] > 0.005 for c in row["candidates"]),
    }


def summary(rows: Sequence[dict[str, Any]], document: dict[str, Any]) -> dict[str, Any]:
    races = [s for row in document["problems"] for s in row["race_seconds"]]
    regret = (geometric_mean(1 + row["regret_mean"] for row in rows) or 1) - 1
    worst = max(row["regret_worst"] for row in rows)
    differ = max(row["differ"] for row in rows)
    return {
        "problems": len(rows),
        "candidates": sum(row["candidates"] for row in rows),
        "regret_geometric_mean": regret,
        "regret_worst": worst,
        "repeats_fewest": min(row["repeats"] for row in rows),
        "same_choice": sum(row["same"] * row["repeats"] for row in rows)
        / sum(row["repeats"] for row in rows),
        "problems_that_differ": sum(row["same"] < 1 for row in rows),
        "differ_worst": differ,
        "race_seconds_per_problem": sum(races) / len(races),
        "oracle_seconds_per_problem": sum(r["oracle_seconds"] for r in document["problems"])
        / len(rows),
        "oracle_at_its_cap": sum(row["capped"] for row in rows),
        "speedup": {
            name: geometric_mean(r["speedup"][name] for r in rows if name in r["speedup"])
            for name in BASELINES
        },
        "within": {
            "geometric_mean": regret <= ALLOWED["geometric_mean"],
            "worst": worst <= ALLOWED["worst"],
            "disagreement": differ < ALLOWED["disagreement"],
        },
    }


def report(document: dict[str, Any], earlier: Sequence[dict[str, Any]], out: Path) -> None:
    """Write regret.json, regret.txt and regret.svg into `out`."""
    before: dict[tuple[int, int, int], list[list[str]]] = {}
    for each in earlier:
        for row in each["problems"]:
            before.setdefault((row["m"], row["n"], row["k"]), []).extend(row["choices"])
    rows = [
        judged(row, before.get((row["m"], row["n"], row["k"]), []))
        for row in document["problems"]
        if row["choices"] and row["candidates"]
    ]
    if not rows:
        return
    whole = {**document, "summary": summary(rows, document), "rows": rows}
    (out / "regret.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "regret.txt").write_text(text(whole) + "\n")
    (out / "regret.svg").write_text(svg(rows, document["device"]))


def text(whole: dict[str, Any]) -> str:
    s = whole["summary"]
    short = {"torch-bf16-resident": "cuBLAS"}
    names = [name for name in BASELINES if s["speedup"][name]]
    out = [
        f"{whole['device']}, {whole['date']}: {s['problems']} problems, "
        f"{s['candidates']} candidates, {s['repeats_fewest']} or more repeats",
        f"regret: {100 * s['regret_geometric_mean']:.2f} % (geometric mean), "
        f"{100 * s['regret_worst']:.2f} % (worst of all repeats)",
        f"repeats: the usual choice in {100 * s['same_choice']:.1f} %; {s['problems_that_differ']} "
        f"problems where they differ, by {100 * s['differ_worst']:.2f} % at most",
        f"seconds per problem: race {s['race_seconds_per_problem']:.2f}, oracle "
        f"{s['oracle_seconds_per_problem']:.2f}; {s['oracle_at_its_cap']} candidates of the oracle "
        f"stopped at {whole['oracle']['most']} samples",
        "speed-up (geometric mean): "
        + ", ".join(f"{s['speedup'][n]:.2f} over {BASELINES[n]}" for n in names),
        f"{whole.get('build_seconds')} s of building, {whole.get('seconds')} s in all",
        "",
        f"{'m':>5} {'n':>6} {'k':>6}  {'choice':<34} {'us':>8} {'regret %':>8} {'same %':>6} "
        f"{'differ %':>8} " + " ".join(f"{'x ' + short.get(n, n):>9}" for n in names),
    ]
    for r in whole["rows"]:
        choice = r["choice"][0] + ("" if r["choice"][1] == "default" else f" {r['choice'][1]}")
        speeds = " ".join(
            f"{r['speedup'][n]:>9.2f}" if n in r["speedup"] else f"{'':>9}" for n in names
        )
        out.append(
            f"{r['m']:>5} {r['n']:>6} {r['k']:>6}  {choice[:34]:<34} {r['choice_us']:>8.2f} "
            f"{100 * r['regret_worst']:>8.2f} {100 * r['same']:>6.0f} {100 * r['differ']:>8.2f} "
            f"{speeds}"
        )
    return "\n".join(out)


def svg(rows: Sequence[dict[str, Any]], device: str) -> str:
    """Speed-up of the choice over each baseline by m, a panel for each layer."""
    layers = list(dict.fromkeys((r["n"], r["k"]) for r in rows))
    width, height, left, top = 190, 150, 46, 46
    values = [log2(v) for r in rows for v in r["speedup"].values()] or [0.0]
    low, high = min(-0.5, *values) - 0.1, max(0.5, *values) + 0.1
    whole = left + len(layers) * (width + 14)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{top + height + 60}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">Speed-up of the choice, by m, on {device}</text>',
    ]
    x = left
    for name, about in BASELINES.items():
        if any(name in r["speedup"] for r in rows):
            out.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{COLOURS[name]}"/>')
            out.append(f'<text x="{x + 14}" y="33">over {about.split(" (")[0]}</text>')
            x += 160

    def at(value: float) -> float:
        return top + height * (high - value) / (high - low)

    for number, (n, k) in enumerate(layers):
        x0 = left + number * (width + 14)
        mine = sorted((r for r in rows if (r["n"], r["k"]) == (n, k)), key=lambda r: r["m"])
        out.append(
            f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" '
            'stroke="#999"/>'
        )
        for power in range(int(low) - 1, int(high) + 2):
            if low < power < high:
                y = at(power)
                colour = "#000" if power == 0 else "#ddd"
                out.append(
                    f'<line x1="{x0}" x2="{x0 + width}" y1="{y:.1f}" y2="{y:.1f}" '
                    f'stroke="{colour}" stroke-width="0.7"/>'
                )
                if number == 0:
                    out.append(
                        f'<text x="{x0 - 4}" y="{y + 4:.1f}" text-anchor="end">'
                        f"{2.0**power:g}x</text>"
                    )
        step = width / max(1, len(mine))
        for place, r in enumerate(mine):
            out.append(
                f'<text x="{x0 + step * (place + 0.5):.1f}" y="{top + height + 14}" '
                f'text-anchor="middle" font-size="7">{r["m"]}</text>'
            )
        out.append(
            f'<text x="{x0 + width / 2}" y="{top + height + 30}" text-anchor="middle">'
            f"n={n} k={k}</text>"
        )
        for name in BASELINES:
            points = [
                (x0 + step * (place + 0.5), at(log2(r["speedup"][name])))
                for place, r in enumerate(mine)
                if name in r["speedup"]
            ]
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}"/>')
            out += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="{COLOURS[name]}"/>'
                for px, py in points
            ]
    out.append("</svg>")
    return "\n".join(out) + "\n"
