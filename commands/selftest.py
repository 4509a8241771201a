"""The command ``fp4tune selftest``: what this prober catches here."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Gpu, Json, one_sentence, print_json


def selftest(
    gpu: Gpu = None,
    mutant: Annotated[
        list[str] | None,
        typer.Option(help="A mutant's name; repeatable. Default: all but those that need a soak."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Probe backends that fail on purpose: what does this prober catch here?"""
    with one_sentence():
        from ..machine import devices
        from ..probes.worker import nursery

        targets = devices.select(gpu)  # before what takes seconds to import
        nursery.warm()  # meanwhile
        from ..autotune import selftest as testing
        from ..report.terminal.progress import watching
        from ..report.terminal.selftest import print_rows

        chosen = [(t, testing.choose(t.device, mutant or ())) for t in targets]
        results = [(t, list[testing.Row]()) for t, _ in chosen]
        try:
            for (target, mutants), (_, rows) in zip(chosen, results, strict=True):
                for row in testing.selftest(target, mutants, watching):
                    rows.append(row)  # one by one: what is known is shown however this ends
                order = {mutant.name: place for place, mutant in enumerate(mutants)}
                rows.sort(key=lambda row: order[row.mutant])
        finally:
            for (target, mutants), (_, rows) in zip(chosen, results, strict=True):
                if rows and not as_json:
                    print_rows(target, rows, len(mutants) - len(rows))
        if as_json:
            print_json([testing.document(target, rows) for target, rows in results])
        raise typer.Exit(testing.exit_code(row for _, rows in results for row in rows))
