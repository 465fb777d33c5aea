"""Accuracy against token budget, measured through lmms-eval.

Importing this package is cheap: lmms-eval, matplotlib and torch are loaded by the modules that need them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["BUNDLED_TASKS", "DEFAULT_TASKS", "TASKS_DIR"]

TASKS_DIR = Path(__file__).parent / "tasks"
"""Folder for lmms-eval's `--include_path`; every YAML file below it is a task."""

BUNDLED_TASKS = tuple(sorted(path.stem for path in TASKS_DIR.glob("*/*.yaml")))
"""Names of the tasks that ship with vtprune and need no download; docs/tasks.md says what each isolates."""

DEFAULT_TASKS = ("vtp_easy_vqa", "vtp_scenes")
"""Those that every embedded model was trained for."""
