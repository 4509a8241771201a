"""What typer is told otherwise: commands in groups, nothing cut off, mistakes in a sentence."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import NOT_ASSESSED
from ._console import say

GROUPS = (
    ("Every day", ("probe", "show", "choose", "explain", "report")),
    ("Engines", ("emit", "layers", "check-weights")),
    ("Node", ("doctor", "facts", "backends", "quarantine", "forget", "daemon")),
    ("Fleet", ("export", "import", "fleet")),
    ("Developers", ("reproduce", "audit", "selftest")),
)
"""The commands as ``--help`` lists them."""
_Usage: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, which typer has a copy of in some versions and imports in others."""


class Whole(TyperGroup):
    """A group of commands whose help shows what each does, whole."""

    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands under their headings; in one list where there are none."""
        for title, names in self.groups or (("Commands", tuple(self.commands)),):
            rows = [(name, _first_paragraph(self.commands[name].help or "")) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)


class Root(Whole):
    """``fp4tune`` itself."""

    groups = GROUPS

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but that a mistake in how it is called is one sentence and exit code 2."""
        given = (args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            code = super().main(*given, **extra)
        except _Usage as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                say(f"fp4tune: {sentence(error)}", err=True)
            sys.exit(NOT_ASSESSED)
        except typer.Abort:
            say("fp4tune: interrupted", err=True)
            sys.exit(NOT_ASSESSED)
        sys.exit(code if isinstance(code, int) else 0)


def sentence(error: Any) -> str:
    """A usage error in one sentence, with where to read on."""
    option = str(getattr(error, "option_name", ""))
    if re.match(r"-[0-9.]", option):
        said = f"{option}: no number here is negative"
    else:
        said = " ".join(str(error.format_message()).split()).rstrip(".")
    where = error.ctx.command_path if error.ctx is not None else "fp4tune"
    return f"{said}; see {where} --help"


def _first_paragraph(text: str) -> str:
    """The first paragraph of a help text, in one line."""
    return " ".join(text.split("\n\n")[0].split())
