"""The command ``fp4tune``: the app, and which commands it has."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Annotated

import typer

from . import __version__
from .commands import _streams, fleet, quarantine
from .commands._help import Root
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
from .errors import NOT_ASSESSED
from .machine import processes

app = typer.Typer(
    name="fp4tune",
    cls=Root,
    help="Find, prove and remember the fastest safe FP4 GEMM backend of this GPU.",
    epilog="Exit codes: 0 a safe choice exists, or it did what it was asked; 1 unsafe, or no safe "
    "choice; 2 could not assess.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order of docs/commands.md; `_help.GROUPS` is how ``--help`` lists them.
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


_ENDING = 10.0
"""Seconds that processes which are killed at the end may take to be gone."""


def contain() -> None:
    """Have this process, which is the command's own, end with all that was ever started below it: a
    backend may kill the processes that keep it, and what it leaves then comes here."""
    processes.adopt_orphans()
    # Registered first, so that it is done last.
    atexit.register(processes.end_tree, lambda pid, status: None, _ENDING)


def main() -> None:
    """Entry point of the ``fp4tune`` command."""
    contain()
    _streams.forgive()
    try:
        app(prog_name="fp4tune")
    except Exception:
        # A fault of ours is told whole, and is no verdict: Python's own exit code would be one.
        sys.excepthook(*sys.exc_info())
        raise SystemExit(NOT_ASSESSED) from None
    finally:
        # What could not be printed was not answered, whatever it would have been.
        if not _streams.flushed():
            os.write(2, b"fp4tune: what it had to say could not be written\n")
            os._exit(NOT_ASSESSED)


if __name__ == "__main__":
    main()
