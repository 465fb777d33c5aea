"""Runs `vtprune demo` in a process that reaches this machine only; what it tried beyond is written to a file.

python demo_process.py FILE [options of `vtprune demo`]
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

TRIED = Path(sys.argv[1])
_connect, _look_up = socket.socket.connect, socket.getaddrinfo


def _is_here(host: str) -> bool:
    if host in ("localhost", "", "::"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _refuse(host: str) -> None:
    with TRIED.open("a", encoding="utf-8") as file:
        file.write(f"{host}\n")
    raise OSError(f"this process reaches this machine only, and was asked for {host!r}")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    if isinstance(address, tuple) and not _is_here(str(address[0])):
        _refuse(str(address[0]))
    _connect(self, address)


def _guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
    text = host.decode() if isinstance(host, bytes) else str(host or "")
    if not _is_here(text):
        _refuse(text)
    return _look_up(host, *args, **kwargs)


if __name__ == "__main__":
    socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
    socket.getaddrinfo = _guarded_look_up
    from vtprune.cli import main

    sys.argv[:] = ["vtprune", "demo", *sys.argv[2:]]
    main()
