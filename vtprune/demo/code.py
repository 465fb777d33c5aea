"""The present settings as lines of Python and as a command, both of which run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vtprune.demo.media import FILM_TYPES
from vtprune.demo.settings import Run, Settings

__all__ = ["command_line", "python_lines"]


def python_lines(settings: Settings, run: Run, files: Sequence[str]) -> str:
    """A script that prints the answer and the report.

    Args:
        settings: what was asked.
        run: how to prune.
        files: names of the pictures and films, if they are not an example's.
    """
    keep = "" if run.keep is None else f", keep={run.keep!r}"
    basis = "" if run.basis == "average" else f", basis={run.basis!r}"
    if settings.example:
        first, extra = [], ["from vtprune.examples import example"]
        shown = [
            f"shown = example({settings.example!r})",
            "images, videos = shown.images, shown.videos",
        ]
    else:
        first, extra = ["from pathlib import Path", ""], []
        images, videos = (
            [f"Path({name!r})" for name in files if name.lower().endswith(FILM_TYPES) == is_film]
            for is_film in (False, True)
        )
        shown = [f"images, videos = [{', '.join(images)}], [{', '.join(videos)}]"]
    lines = [
        *first,
        "import vtprune",
        *extra,
        "from vtprune.images import open_image",
        "from vtprune.loading import load_model",
        "from vtprune.prompt import Question, prompt_inputs, read_video",
        "",
        *shown,
        f"model, processor = load_model({settings.model!r})",
        "question = Question(",
        f"    {settings.question!r},",
        "    tuple(open_image(path) for path in images),",
        "    tuple(read_video(model, path) for path in videos),",
        ")",
        "inputs = prompt_inputs(model, processor, [question])",
        f"with vtprune.prune(model, {run.method!r}{keep}{basis}) as session:",
        f"    out = model.generate(**inputs, max_new_tokens={settings.max_new_tokens}, do_sample=False)",
        "print(processor.decode(out[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))",
        "print(session.report)",
    ]
    return "\n".join(lines) + "\n"


def command_line(settings: Settings, run: Run, files: Sequence[str]) -> str:
    """`vtprune run` with the same picture, question and pruning."""
    words = ["vtprune", "run", "--model", settings.model]
    if settings.example:
        words += ["--example", settings.example]
    for name in () if settings.example else files:
        words += ["--video" if name.lower().endswith(FILM_TYPES) else "--image", name]
    words += ["--question", settings.question, "--method", run.method]
    if run.keep is not None:
        words += ["--keep", run.keep]
    if run.basis != "average":
        words += ["--basis", run.basis]
    words += ["--max-new-tokens", str(settings.max_new_tokens)]
    return shlex.join(words) + "\n"
