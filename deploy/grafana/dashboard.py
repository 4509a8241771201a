"""Makes the Grafana dashboard, fp4tune.json beside this file.

pip install grafana-foundation-sdk
python deploy/grafana/dashboard.py > deploy/grafana/fp4tune.json
"""

from __future__ import annotations

import sys
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    StackingMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    GridPos,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'instance=~"$instance"'
ELSE_0 = " or vector(0)"
EVENTS = "fp4tune_gpu_events_total"
WIDTH = 24

_WITNESSED = ("faults", "suspected", "suspicions", "cleared", "skipped", "beyond")


def query(expr: str, legend: str = "", ref: str = "A", instant: bool = False) -> Any:
    made = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(ref)
    return made.instant() if instant else made.range()


def steps(*pairs: tuple[float | None, str]) -> Any:
    return (
        dashboard.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=value, color=color) for value, color in pairs])
    )


def words(**texts: tuple[str, str]) -> list[Any]:
    """Values by their numbers, as (text, colour): ``words(_0=("no", "red"))``."""
    options = {
        name.removeprefix("_"): ValueMappingResult(text=text, color=color, index=index)
        for index, (name, (text, color)) in enumerate(texts.items())
    }
    return [ValueMap(options=options)]


def count(title: str, expr: str, help_: str, *levels: tuple[float | None, str]) -> Any:
    return (
        stat.Panel()
        .title(title)
        .description(help_)
        .with_target(query(expr, instant=True))
        .thresholds(steps(*levels))
        .color_mode(BigValueColorMode.BACKGROUND)
        .no_value("none")
    )


def witnessed(kind: str) -> str:
    """What a witness counted in the last hour, by backend, with its kind as a label."""
    counted = f"sum by (backend) (increase(fp4tune_witness_{kind}_total{{{HERE}}}[1h]))"
    return f'label_replace({counted}, "kind", "{kind}", "", "")'


def lines(title: str, expr: str, legend: str, help_: str, unit: str = "short") -> Any:
    return (
        timeseries.Panel()
        .title(title)
        .description(help_)
        .with_target(query(expr, legend))
        .unit(unit)
        .min(0)
    )


def listed(title: str, expr: str, help_: str, columns: dict[str, str]) -> Any:
    """A table of the labels in `columns`, and the value under the name that it has there."""
    panel = (
        table.Panel()
        .title(title)
        .description(help_)
        .with_target(query(expr, instant=True).format("table"))
    )
    for name in ("Time",):
        panel = panel.override_by_name(
            name, [DynamicConfigValue(id_val="custom.hidden", value=True)]
        )
    for name, shown in columns.items():
        panel = panel.override_by_name(
            name, [DynamicConfigValue(id_val="displayName", value=shown)]
        )
    return panel


BAD = ((None, "green"), (1, "red"))
DOUBTFUL = ((None, "green"), (1, "orange"))
STATES = ("free", "busy", "probing", "marked", "unknown")
_NUMBERED = " or ".join(
    f'{number} * (fp4tune_gpu_state{{{HERE}, state="{state}"}} == 1)'
    for number, state in enumerate(STATES)
)

# Rows of (title, panels); a panel is (width, height, panel).
ROWS: list[tuple[str, list[tuple[int, int, Any]]]] = [
    (
        "Is everything proven",
        [
            (
                4,
                4,
                count(
                    "Nodes not ready",
                    f"count(fp4tune_ready{{{HERE}}} == 0){ELSE_0}",
                    "Not published for every GPU, or not yet compared.",
                    *DOUBTFUL,
                ),
            ),
            (
                4,
                4,
                count(
                    "Buckets without a safe backend",
                    f'sum(fp4tune_choices{{{HERE}, status="none"}}){ELSE_0}',
                    "Not even the floor is safe there.",
                    *BAD,
                ),
            ),
            (
                4,
                4,
                count(
                    "Marked GPUs",
                    f'sum(fp4tune_gpu_state{{{HERE}, state="marked"}}){ELSE_0}',
                    "A fault keeps them from being probed; /healthz says which.",
                    *BAD,
                ),
            ),
            (
                4,
                4,
                count(
                    "Quarantined",
                    f"sum(fp4tune_quarantines{{{HERE}}})",
                    "Backends and tactics that failed in production or in a canary.",
                    *DOUBTFUL,
                ),
            ),
            (
                4,
                4,
                count(
                    "Stale backends",
                    f"sum(fp4tune_stale_backends{{{HERE}}})",
                    "Their evidence no longer holds; they are not chosen.",
                    *DOUBTFUL,
                ),
            ),
            (
                4,
                4,
                count(
                    "Layers to be probed",
                    f"sum(fp4tune_pending_layers{{{HERE}}})",
                    "Probed when their GPU is free.",
                    (None, "green"),
                    (1, "blue"),
                ),
            ),
        ],
    ),
    (
        "What is chosen",
        [
            (
                10,
                8,
                bargauge.Panel()
                .title("Choices by status")
                .description("Published buckets: safe, the floor only, or none.")
                .with_target(
                    query(
                        f"sum by (gpu, profile, status) (fp4tune_choices{{{HERE}}})",
                        "{{gpu}}, {{profile}}: {{status}}",
                        instant=True,
                    )
                )
                .orientation(VizOrientation.HORIZONTAL)
                .min(0)
                .thresholds(steps((None, "blue"))),
            ),
            (
                14,
                8,
                lines(
                    "Answers of a reader",
                    f"sum by (status) (fp4tune_reader_answers{{{HERE}}})",
                    "{{status}}",
                    "From the textfile: what an engine on the node would be answered.",
                )
                .stacking(common.StackingConfig().mode(StackingMode.NORMAL))
                .fill_opacity(30),
            ),
            (
                8,
                7,
                lines(
                    "Generation",
                    f"fp4tune_generation{{{HERE}}}",
                    "{{instance}}",
                    "Each publication is one higher.",
                ),
            ),
            (
                8,
                7,
                lines(
                    "Since the last publication",
                    f"time() - (fp4tune_published_timestamp_seconds{{{HERE}}} > 0)",
                    "{{instance}}",
                    "Age of what is published.",
                    "s",
                ),
            ),
            (
                8,
                7,
                lines(
                    "Comparisons",
                    f"sum by (result) (increase(fp4tune_comparisons_total{{{HERE}}}[1h]))",
                    "{{result}}",
                    "Times an hour that evidence was compared with the node.",
                ),
            ),
        ],
    ),
    (
        "Production",
        [
            (
                12,
                7,
                lines(
                    "Rows watched",
                    f"sum by (backend) (rate(fp4tune_witness_rows_total{{{HERE}}}[5m]))",
                    "{{backend}}",
                    "Rows of engines' GEMMs that the witness judges, each second.",
                ),
            ),
            (
                12,
                7,
                lines(
                    "What the witness said",
                    " or ".join(map(witnessed, _WITNESSED)),
                    "{{backend}}: {{kind}}",
                    "Faults, what could not be judged, suspicions and those that were right after "
                    "all, rows left out, rows too near overflow; in an hour.",
                ),
            ),
        ],
    ),
    (
        "GPUs",
        [
            (
                24,
                8,
                statetimeline.Panel()
                .title("What each GPU is doing")
                .description("As the daemon sees it.")
                .with_target(
                    query(f"max by (instance, device) ({_NUMBERED})", "{{instance}} {{device}}")
                )
                .mappings(
                    words(
                        _0=("free", "green"),
                        _1=("busy", "blue"),
                        _2=("probing", "purple"),
                        _3=("marked", "red"),
                        _4=("unknown", "gray"),
                    )
                )
                .merge_values(True),
            ),
            (
                8,
                7,
                lines(
                    "Probes",
                    f"sum by (outcome) (increase(fp4tune_probes_total{{{HERE}}}[1h]))",
                    "{{outcome}}",
                    "By how they ended, an hour. Yielded: an engine came in.",
                ),
            ),
            (
                8,
                7,
                lines(
                    "Time spent probing",
                    f"sum by (instance) (rate(fp4tune_probe_seconds_total{{{HERE}}}[1h]))",
                    "{{instance}}",
                    "GPUs in use by probes, on average over an hour.",
                ),
            ),
            (
                8,
                7,
                lines(
                    "Canaries",
                    f"sum by (outcome) (increase(fp4tune_canaries_total{{{HERE}}}[1h]))",
                    "{{outcome}}",
                    "By how they ended, an hour.",
                ),
            ),
            (
                12,
                7,
                lines(
                    "Driver events",
                    f"sum by (instance, device, kind) (increase({EVENTS}{{{HERE}}}[1h]))",
                    "{{instance}} {{device}}: {{kind}}",
                    "XID, ECC, MIG, unavailable and recovery.",
                ),
            ),
            (
                12,
                7,
                listed(
                    "Stale backends by GPU model",
                    f"sum by (instance, gpu) (fp4tune_stale_backends{{{HERE}}}) > 0",
                    "Where to drain a node, so that it can be probed.",
                    {"instance": "node", "gpu": "GPU", "Value": "backends"},
                ),
            ),
        ],
    ),
]


def build() -> Any:
    made = (
        dashboard.Dashboard("fp4tune")
        .uid("fp4tune")
        .description("FP4 GEMM backends: what is proven, chosen, stale and quarantined.")
        .tags(["fp4tune", "gpu"])
        .refresh("1m")
        .time("now-24h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Node")
            .datasource(SOURCE)
            .query('label_values({__name__=~"fp4tune_ready|fp4tune_reader_readable"}, instance)')
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    y, number = 0, 0
    for title, panels in ROWS:
        number += 1
        made = made.with_row(
            dashboard.Row(title).id(number).grid_pos(GridPos(x=0, y=y, w=WIDTH, h=1))
        )
        y += 1
        x = tallest = 0
        for width, height, panel in panels:
            if x + width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            made = made.with_panel(
                panel.id(number).datasource(SOURCE).grid_pos(GridPos(x=x, y=y, w=width, h=height))
            )
            x, tallest = x + width, max(tallest, height)
        y += tallest
    return made.build()


if __name__ == "__main__":
    sys.stdout.write(JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n")
