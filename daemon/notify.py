"""What systemd is told (sd_notify): a datagram on the socket it names. Nothing where it names none.

Own lines, since the well-known package for it is unmaintained and the other compiles C.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from ..errors import printable


class Notifier:
    """Tells the socket in NOTIFY_SOCKET; a failure to is ignored, as sd_notify(3) advises."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        self._address = env.get("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog(env)
        self._said = ""

    def tell(self, *lines: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the null byte of an abstract socket.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), address)

    def status(self, text: str) -> None:
        """``STATUS=``, where it differs from the last."""
        if text != self._said:
            self._said = text
            self.tell(f"STATUS={printable(text)}")


def _watchdog(env: Mapping[str, str]) -> float | None:
    """Seconds between two signs of life that systemd wants, None where it wants none."""
    microseconds = env.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or env.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return None
    return int(microseconds) / 1e6
