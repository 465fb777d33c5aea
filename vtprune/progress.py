"""What long work tells whoever watches, and bars in the terminal that show it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Progress", "RichProgress", "real_console"]


class Progress(Protocol):
    """What long work tells whoever watches."""

    def start(self, title: str, steps: int) -> None:
        """A phase of `steps` steps begins."""

    def step(self, title: str, count: int = 1) -> None:
        """`count` steps of the phase are done; `title` says what is running."""


def real_console(*, quiet: bool = False) -> Console:
    """The real stdout, for work during which lmms-eval redirects it; 120 columns where it is no terminal."""
    console = Console(file=sys.stdout, quiet=quiet)
    if not console.is_terminal:
        console.width = 120
    return console


class RichProgress:
    """One bar a phase; a context manager. Implements `Progress`."""

    def __init__(self, console: Console) -> None:
        self._bars = bars.Progress(
            TextColumn("{task.description:<34.34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            # lmms-eval's own output is collected elsewhere; these would put stdout back in its way
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._current = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, title: str, steps: int) -> None:
        """Begin a phase of `steps` steps."""
        self._current = self._bars.add_task(title, total=steps)

    def step(self, title: str, count: int = 1) -> None:
        """`count` steps are done while `title` runs."""
        if self._current is not None:
            self._bars.update(self._current, description=title, advance=count)
