"""One question to a daemon by its health's socket: ``python -m fp4tune.daemon.ask SOCKET PATH``.

For those who have no client that speaks HTTP over a Unix socket, as a container's probes. Exit code
0: it answered with 200; 1: with something else, which is printed; 2: it did not answer. Standard
library only.
"""

from __future__ import annotations

import socket
import sys
from http.client import HTTPConnection, HTTPException

SECONDS = 5.0


class _BySocket(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


def ask(path: str, what: str) -> tuple[int, str]:
    """Status and body of ``GET what`` at the socket `path`. Raises OSError and HTTPException."""
    connection = _BySocket(path)
    try:
        connection.request("GET", what)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16).decode("utf-8", "replace")
    finally:
        connection.close()


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m fp4tune.daemon.ask SOCKET PATH", file=sys.stderr)
        return 2
    try:
        status, body = ask(*sys.argv[1:])
    except (OSError, HTTPException) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    if status != 200:
        print(body)
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
