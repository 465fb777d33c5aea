"""Tasks of lmms-eval by name: are they there, is their data, and what went wrong in words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import InputError
from vtprune.eval import BUNDLED_TASKS
from vtprune.eval.suites import SUITES

__all__ = ["check_names", "load_task"]

_FORMATS = ("json", "csv", "parquet", "text", "arrow", "imagefolder", "videofolder", "webdataset")


def check_names(tasks: Sequence[str], manager: Any) -> None:
    """Refuse names that are no single task.

    Raises:
        InputError: if there is none, or one is unknown or a group.
    """
    if not tasks:
        raise InputError(f"name at least one task, e.g. {','.join(BUNDLED_TASKS)}.")
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, [*manager.all_tasks, *SUITES], n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise InputError(
                f"Unknown task {name!r}.{hint} Bundled: {', '.join(BUNDLED_TASKS)}; suites: {', '.join(SUITES)}; "
                "the rest is listed by `python -m lmms_eval --tasks list`."
            )
        if name not in manager.all_subtasks:
            raise InputError(f"{name!r} is a group of tasks; list its tasks one by one.")


def load_task(name: str, manager: Any) -> Any:
    """A task with its documents.

    Raises:
        InputError: if its data cannot be read, or one of its modules is missing; the cause is attached.
    """
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    try:
        _require_data(name, manager._get_config(name))
        return get_task_dict([name], manager, "chat")[name]
    except RetryError as error:
        # what was tried again and again is inside
        cause = error.last_attempt.exception() or error
    except (OSError, ImportError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        cause = error
    raise InputError(f"task {name!r} cannot be loaded: {type(cause).__name__}: {cause}") from cause


def _require_data(name: str, config: dict[str, Any]) -> None:
    """Say at once that data is missing where the hub must not be asked, instead of after five attempts."""
    from datasets import config as datasets_config
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import constants

    source = str(config.get("dataset_path") or "")
    if not constants.HF_HUB_OFFLINE or source in ("", *_FORMATS) or Path(source).exists():
        return
    owner, _, dataset = source.rpartition("/")
    places = (
        Path(constants.HF_HUB_CACHE, f"datasets--{source.replace('/', '--')}"),
        Path(datasets_config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(dataset)}"),
    )
    if not any(place.is_dir() for place in places):
        raise InputError(
            f"the data of task {name!r} ({source}) is not on this machine, and HF_HUB_OFFLINE forbids to fetch it. "
            f"Run `hf download --repo-type dataset {source}` where there is a network, or unset HF_HUB_OFFLINE."
        )
