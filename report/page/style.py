"""Colours and the style sheet. Every pair of ink and paper here has a contrast of 4.5 or more."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#15191e",
    "soft": "#4d5763",
    "line": "#c9d1d9",
    "link": "#0b57b0",
    "safe": "#0f6b34",
    "unsafe": "#b3181f",
    "inconclusive": "#7a5200",
    "reference": "#4d5763",
    "tile": "#dfe5ea",
    "wrong": "#b3181f",
}
DARK = {
    "paper": "#12161b",
    "panel": "#1b2128",
    "ink": "#e8edf2",
    "soft": "#a9b4c0",
    "line": "#3a444f",
    "link": "#8ec2ff",
    "safe": "#6fd694",
    "unsafe": "#ff8d88",
    "inconclusive": "#f0c060",
    "reference": "#a9b4c0",
    "tile": "#323c47",
    "wrong": "#ff8d88",
}
# Backends, in the order they appear; told apart by a letter, too.
LIGHT_NAMES = (
    "#cfe3ff",
    "#ffe0b8",
    "#cdeed6",
    "#f6d0e6",
    "#e2d8fb",
    "#f5efb0",
    "#c8eef0",
    "#e6dcd2",
)
DARK_NAMES = (
    "#1d3f6e",
    "#6b4310",
    "#1c5431",
    "#6a2450",
    "#473489",
    "#57500f",
    "#12545a",
    "#55473a",
)
# The same backends as lines; these need a contrast of 3.
LIGHT_LINES = (
    "#1f5fbf",
    "#b35c00",
    "#1a7a3c",
    "#b0257a",
    "#6a4bc4",
    "#7d7400",
    "#0b7d86",
    "#7a5c3e",
)
DARK_LINES = (
    "#7fb4ff",
    "#ffb25c",
    "#6fd694",
    "#ff8fcb",
    "#b9a3ff",
    "#e0d64a",
    "#5fd6de",
    "#d6b694",
)
# Little to much, of one quantity.
LIGHT_STEPS = ("#f1f6fb", "#dceaf7", "#c3dcf1", "#a7cce9", "#88b9e0", "#68a5d6", "#5b9bd0")
DARK_STEPS = ("#1a2129", "#1b2d3f", "#1c3955", "#1d466c", "#1f5384", "#22609b", "#2a6cab")
LIGHT_BAD, DARK_BAD = "#fbd5d3", "#6e1f22"
STEPS = len(LIGHT_STEPS)
NAMES = len(LIGHT_NAMES)


def pairs() -> list[tuple[str, str]]:
    """Every (ink, paper) that text is set in."""
    found = []
    schemes = (
        (LIGHT, LIGHT_NAMES, LIGHT_STEPS, LIGHT_BAD),
        (DARK, DARK_NAMES, DARK_STEPS, DARK_BAD),
    )
    for scheme, names, steps, bad in schemes:
        found += [(scheme["ink"], paper) for paper in (*names, *steps, bad)]
        for ink in ("ink", "soft", "link", "safe", "unsafe", "inconclusive", "reference"):
            found += [(scheme[ink], scheme[paper]) for paper in ("paper", "panel")]
    return found


def lines() -> list[tuple[str, str]]:
    """Every (stroke, paper) of a chart."""
    return [(c, LIGHT["paper"]) for c in LIGHT_LINES] + [(c, DARK["paper"]) for c in DARK_LINES]


def _variables(
    scheme: dict[str, str],
    names: tuple[str, ...],
    lines: tuple[str, ...],
    steps: tuple[str, ...],
    bad: str,
) -> str:
    all_ = {
        **scheme,
        **{f"l{i}": c for i, c in enumerate(lines)},
        **{f"n{i}": c for i, c in enumerate(names)},
        **{f"s{i}": c for i, c in enumerate(steps)},
        "bad": bad,
    }
    return "".join(f"--{name}:{value};" for name, value in all_.items())


def sheet() -> str:
    """The style sheet."""
    light = _variables(LIGHT, LIGHT_NAMES, LIGHT_LINES, LIGHT_STEPS, LIGHT_BAD)
    dark = _variables(DARK, DARK_NAMES, DARK_LINES, DARK_STEPS, DARK_BAD)
    classes = "".join(f".n{i}{{background:var(--n{i})}}" for i in range(NAMES))
    classes += "".join(f".l{i}{{stroke:var(--l{i})}}" for i in range(NAMES))
    classes += "".join(f".s{i}{{background:var(--s{i})}}" for i in range(STEPS))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_RULES}{classes}\n"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header,footer,nav{max-width:78rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.25rem}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.25rem;margin:2.25rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
h4{font-size:.95rem;margin:1rem 0 .25rem}
p{margin:.5rem 0;max-width:48rem}
.soft,footer,caption,figcaption{color:var(--soft)}
.small,footer,figcaption,caption{font-size:.85rem}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:3px solid var(--link);
 outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.25rem .5rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.75rem 0 0}
nav a{display:inline-block;padding:.35rem 0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;
 margin:1rem 0}
dl.facts div{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;
 padding:.5rem .75rem}
dl.facts dt{color:var(--soft);font-size:.85rem}
dl.facts dd{margin:0;font-weight:600}
.scroll{overflow-x:auto;max-width:100%;margin:.75rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.88rem;overflow-wrap:normal}
caption{text-align:left;padding:.25rem 0;caption-side:top}
caption .said{position:sticky;left:0;display:inline-block;min-width:min(24rem,78vw);
 max-width:min(48rem,calc(100vw - 2.75rem))}
.side{display:flex;flex-wrap:wrap;gap:0 2.5rem}
.side>.scroll{min-width:0}
th,td{padding:.3rem .5rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;color:var(--soft);font-weight:600}
tbody th{font-weight:600;background:var(--paper);position:sticky;left:0}
td{max-width:34rem}
.num{text-align:right;font-variant-numeric:tabular-nums}
.words td{overflow-wrap:break-word}
.words td:last-child{min-width:14rem}
.words th[scope=row]{min-width:6.5rem;max-width:16rem;overflow-wrap:break-word}
th.num{white-space:nowrap}
.heat{border-spacing:2px}
.heat th,.heat td{border:0}
.heat td{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;border-radius:.2rem;
 padding:.25rem .4rem}
.heat th[scope=col]{text-align:right}
.heat th{padding:.25rem .4rem;white-space:nowrap}
.heat td b{margin-right:.45rem}
.heat th.long{white-space:normal;text-align:left;min-width:8.5rem;max-width:20rem;
 overflow-wrap:break-word;font-weight:400}
.none,.bad{background:var(--bad)}
.none{outline:2px dashed var(--unsafe);outline-offset:-2px}
.floor{outline:2px dotted var(--soft);outline-offset:-2px}
.span{color:var(--soft);font-size:.85em;display:block}
.heat td .span,.bad .span{color:inherit}
.cell{text-align:right;padding:.05rem .3rem;font-variant-numeric:tabular-nums;white-space:nowrap}
.chosen{font-weight:700;outline:2px solid var(--link);border-radius:.2rem}
.chosen .span{font-weight:400}
dl.finding{margin:.25rem 0}
dl.finding div{display:grid;grid-template-columns:6.5rem 1fr;gap:.5rem;padding:.15rem 0}
dl.finding dt{color:var(--soft)}
dl.finding dd{margin:0}
ul.key{list-style:none;display:flex;flex-wrap:wrap;gap:.35rem 1rem;padding:0;margin:.5rem 0;
 font-size:.88rem}
ul.key .swatch{display:inline-block;min-width:1.6rem;text-align:center;border-radius:.2rem;
 font-weight:700;margin-right:.35rem;padding:0 .3rem}
.mark{font-weight:600;white-space:nowrap}
.safe{color:var(--safe)}.unsafe{color:var(--unsafe)}.inconclusive{color:var(--inconclusive)}
.reference,.unsupported{color:var(--reference)}
.vh{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.rel{position:relative}
details{border:1px solid var(--line);border-radius:.4rem;margin:.5rem 0;padding:0 .75rem}
details[open]{padding-bottom:.75rem}
summary{cursor:pointer;padding:.55rem 0;font-weight:600}
summary .soft{font-weight:400}
summary .mark{white-space:normal}
figure{margin:.75rem 0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink)}
.chart{max-width:36rem}
.chart path{fill:none;stroke-width:1.6}
.chart .bar{stroke-width:3;stroke-opacity:.7}
.chart .grid{stroke:var(--line);stroke-width:.6}
.chart text{font-size:11px}
.chart .mid{text-anchor:middle}.chart .end{text-anchor:end}.chart .name{font-weight:700}
.tiles{max-width:30rem}
.tiles svg{background:var(--tile);border:1px solid var(--soft)}
.tiles .all{fill:var(--wrong)}.tiles .some{fill:var(--wrong);fill-opacity:.45}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.92em}
footer{padding:2rem 1rem 3rem}
@media (max-width:30rem){
 .words td:last-child{min-width:10.5rem}
 .words th[scope=row]{min-width:5rem}
 th,td{padding-left:.3rem;padding-right:.3rem}
 main,header,footer,nav{padding-left:.75rem;padding-right:.75rem}
 .heat td,.heat th{padding:.25rem .3rem}
 table{font-size:.82rem}
 details{padding:0 .5rem}
}
@media print{.scroll{overflow:visible}nav{display:none}}
"""
