"""The command ``fp4tune``: the app, and which commands it has."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import __version__
from .commands import fleet, quarantine
from .commands.audit import audit
from .commands.backends import backends
from .commands.check_weights import check_weights
from .commands.choose import choose
from .commands.daemon import daemon
from .commands.doctor import doctor
from .commands.emit import emit
from .commands.explain import explain
from .commands.export import export
from .commands.facts import facts
from .commands.forget import forget
from .commands.import_ import import_
from .commands.layers import layers
from .commands.probe import probe
from .commands.report import report
from .commands.reproduce import reproduce
from .commands.selftest import selftest
from .commands.show import show

app = typer.Typer(
    name="fp4tune",
    help="Find, prove and remember the fastest safe FP4 GEMM backend of this GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order in which ``--help`` lists them.
for command in (
    probe,
    choose,
    show,
    reproduce,
    forget,
    backends,
    audit,
    selftest,
    doctor,
    explain,
    layers,
    check_weights,
    report,
    emit,
    daemon,
    facts,
    export,
):
    app.command()(command)
app.command("import")(import_)
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(fleet.app, name="fleet")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"fp4tune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Exit codes: 0 a safe choice exists; 1 unsafe, or no safe choice; 2 could not assess."""


def main() -> None:
    """Entry point of the ``fp4tune`` command."""
    for stream in (sys.stdout, sys.stderr):
        # A name that a terminal's encoding lacks is no reason to end in a traceback.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app(prog_name="fp4tune")


if __name__ == "__main__":
    main()
