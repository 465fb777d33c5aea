"""A demo that runs in a process of its own, and a browser to look at it with."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHOTS = HERE.parent / "runs" / "demo-screenshots"
_PATIENCE_S = 180


@dataclass(frozen=True)
class Server:
    """A running demo.

    Attributes:
        address: of its page.
        tried: file with every host that it tried to reach beyond this machine.
        log: what it printed.
    """

    address: str
    tried: Path
    log: Path


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """The demo with these options, once its page answers."""
    port = free_port()
    tried, log = folder / "tried.txt", folder / "log.txt"
    command = [sys.executable, str(HERE / "demo_process.py"), str(tried), "--port", str(port), *options]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        server = Server(f"http://127.0.0.1:{port}/", tried, log)
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the demo ended with {process.returncode}:\n{server.log.read_text(encoding='utf-8')}")
        try:
            with urllib.request.urlopen(server.address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the demo did not answer:\n{server.log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


def chromium() -> str:
    """The system's browser; the tests are skipped without one, but not in CI."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("CI has no chromium: apt-get install chromium")
    if found is None:
        pytest.skip("no chromium is installed")
    return found
