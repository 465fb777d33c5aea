"""A thin, quiet door to lmms-eval: load tasks once, run one model over them, hand back what it said to each question.

lmms-eval's command line ends with exit status 0 whatever happens; its `simple_evaluate` raises, so that is what
runs here.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError
from vtprune.eval import BUNDLED_TASKS, TASKS_DIR
from vtprune.eval.scores import sample_kind, sample_score
from vtprune.eval.task_data import question_seed
from vtprune.eval.task_loading import check_names, load_task
from vtprune.processes import from_main

if TYPE_CHECKING:
    from vtprune.eval.lmms_base import LmmsVtprune
    from vtprune.eval.lmms_model import VtpruneChat

__all__ = ["Asked", "Harness", "Sample", "quiet", "require_lmms_eval"]


@dataclass(frozen=True)
class Sample:
    """What one model said to one question.

    Attributes:
        doc_id: place of the question in its task.
        image_id: groups the questions of one image; the doc id where a task has no such column.
        score: of the task's first metric, in [0, 1].
        counts: lmms-eval's token counts with vtprune's figures.
        seed: of the task's questions, None where they do not depend on it.
    """

    task: str
    doc_id: int
    image_id: str
    question: str
    answer: str
    kind: str | None
    prediction: str
    score: float
    counts: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """A document of a task as a prompt with its answer; the first one where several count as right."""

    doc_id: int
    images: tuple[Any, ...]
    question: str
    answer: str
    kind: str | None


def require_lmms_eval() -> None:
    """Import lmms-eval, quietly.

    Raises:
        VtpruneError: with the command that installs what is missing.
    """
    if "lmms_eval" not in sys.modules:
        # lmms-eval reads local files through `datasets`, which otherwise counts the download on the hub
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "FALSE")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            # 2026-11: deprecations inside lmms-eval 0.7.3 and what it imports; not ours to act on
            warnings.simplefilter("ignore")
            import lmms_eval.evaluator
            import lmms_eval.models
            import lmms_eval.tasks  # noqa: F401
    except ImportError as error:
        raise VtpruneError(f"vtprune eval needs lmms-eval ({error}). Run: pip install 'vtprune[eval]'") from error


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Collect what lmms-eval and the loading of a model print. Their progress bars would cut through ours."""
    from loguru import logger

    text = io.StringIO()
    # importing lmms_eval.models has replaced every loguru sink by one on stdout; this one keeps errors visible
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings():
        for module in ("lmms_eval", "datasets", "accelerate", "evaluate", "dill", "multiprocess"):
            # 2026-11: deprecations inside the harness (lmms-eval 0.7.3, datasets 5.2)
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
        yield text


class Harness:
    """Tasks of one sweep.

    Args:
        tasks: names of single tasks; the bundled ones and all of lmms-eval's.
        limit: questions a task, None for all.
        seed: which questions the bundled tasks ask.
        split: of the bundled tasks, "test" or "dev"; others have the documents that they have.
        prompts_of: the model of lmms-eval whose prompts are used, where a task has several.
        isolate: a task that cannot be loaded is left out, and `problems` says why.

    Attributes:
        tasks: names of those that could be loaded.
        problems: tracebacks of the others, by name.
        log: what lmms-eval printed during the last run.

    Raises:
        VtpruneError: if lmms-eval is not installed.
        InputError: if a task is unknown or is a group, or cannot be loaded (unless isolated).
    """

    def __init__(
        self,
        tasks: Sequence[str],
        limit: int | None,
        seed: int = 0,
        split: str = "test",
        *,
        prompts_of: str | None = None,
        isolate: bool = False,
    ) -> None:
        require_lmms_eval()
        from lmms_eval.tasks import TaskManager

        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1 question a task, got {limit}.")
        self.limit = limit
        self.problems: dict[str, str] = {}
        self.log = ""
        self._tasks: dict[str, Any] = {}
        # indexing lmms-eval's own folder takes seconds, and only its own tasks need it
        others = any(name not in BUNDLED_TASKS for name in tasks)
        with quiet(), question_seed(seed, split):
            self._manager = TaskManager("WARNING", [str(TASKS_DIR)], include_defaults=others, model_name=prompts_of)
            check_names(tasks, self._manager)
            for name in tasks:
                try:
                    self._tasks[name] = load_task(name, self._manager)
                except InputError as error:
                    if not isolate:
                        raise
                    self.problems[name] = "".join(traceback.format_exception(error))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that could be loaded."""
        return tuple(self._tasks)

    def count(self, task: str) -> int:
        """How many questions one model answers of a task."""
        documents = len(self._tasks[task].eval_docs)
        return documents if self.limit is None else min(self.limit, documents)

    @property
    def questions(self) -> int:
        """How many questions one model answers in all."""
        return sum(map(self.count, self._tasks))

    @property
    def sizes(self) -> dict[str, int]:
        """Questions that each task has, whatever the limit."""
        return {name: len(task.eval_docs) for name, task in self._tasks.items()}

    def run(self, model: LmmsVtprune, tasks: Sequence[str] | None = None, *, first: int = 0) -> dict[str, list[Sample]]:
        """Ask `model` every question. Of several processes each asks its share, and all of them get all answers.

        Args:
            model: what is asked.
            tasks: which of the tasks, all if None.
            first: document of each task to begin with; `limit` of them are asked from there on.

        Returns:
            the samples of each task, in order of doc id.
        """
        from lmms_eval.evaluator import simple_evaluate

        chosen = {name: self._tasks[name] for name in (self._tasks if tasks is None else tasks)}
        settings = argparse.Namespace(
            process_with_media=False, reasoning_tags=None, log_samples=True, predict_only=False, output_path=None
        )
        with quiet() as text:
            try:
                results: Any = simple_evaluate(
                    model=model,
                    tasks=list(chosen.values()),
                    limit=self.limit,
                    offset=first,
                    task_manager=self._manager,
                    log_samples=True,
                    cli_args=settings,
                    bootstrap_iters=0,
                    process_docs_parallel=1,
                    batch_size=model.batch_size,
                    verbosity="WARNING",
                )
            finally:
                self.log = text.getvalue()
        found = None
        if results is not None:  # only the main process gets them
            logged = {name: sorted(results["samples"][name], key=lambda one: one["doc_id"]) for name in chosen}
            found = {name: [_sample(name, chosen[name], one) for one in lines] for name, lines in logged.items()}
        return from_main(found, getattr(model, "accelerator", None))  # type: ignore[return-value]

    def documents(self, task: str, count: int) -> list[dict[str, Any]]:
        """The first questions of a task, with their images."""
        docs = self._tasks[task].eval_docs
        return [docs[index] for index in range(min(count, len(docs)))]

    def prompts(self, model: VtpruneChat, task: str, count: int) -> list[tuple[str, Sequence[Any]]]:
        """(prompt text, images and videos) of the first questions of a task, as `model` asks them."""
        return [self.prompt_at(model, task, place) for place in range(min(count, len(self._tasks[task].eval_docs)))]

    def prompt_at(self, model: VtpruneChat, task: str, place: int) -> tuple[str, Sequence[Any]]:
        """(prompt text, images and videos) of the question with this doc id."""
        from lmms_eval.protocol import ChatMessages

        entry = self._tasks[task]
        return model.read(ChatMessages(messages=entry.doc_to_messages(entry.eval_docs[place])), task)

    def image_ids(self, task: str) -> list[str]:
        """For each document to train on the image it asks about; its place where the task does not say."""
        docs = _training_docs(self._tasks[task])
        if "image_id" in getattr(docs, "column_names", ()):
            return [str(name) for name in docs["image_id"]]
        return [str(place) for place in range(len(docs))]

    def questions_of(self, task: str, places: Sequence[int]) -> Iterator[Asked]:
        """The documents to train on at these places, as prompts with their answers.

        Raises:
            InputError: if a document has no answer, or its media are not images.
        """
        entry = self._tasks[task]
        docs = _training_docs(entry)
        for place in places:
            doc = docs[place]
            images, target = list(entry.doc_to_visual(doc) or []), entry.doc_to_target(doc)
            answer = str(target[0] if isinstance(target, (list, tuple)) and target else target).strip()
            if not answer or target is None:
                raise InputError(f"task {task!r} has no answer to its question {place}; train on another task.")
            if not all(hasattr(image, "convert") for image in images):
                raise InputError(f"task {task!r} asks about video or audio; predictors are trained on images.")
            text = str(entry.doc_to_text(doc)).replace("<image>", "").strip()
            yield Asked(place, tuple(images), text, answer, doc.get("kind"))


def _training_docs(task: Any) -> Any:
    """What a task offers to train on; the documents it is evaluated on where it has no others."""
    return task.training_docs() if task.has_training_docs() else task.eval_docs


def _sample(name: str, task: Any, logged: dict[str, Any]) -> Sample:
    """One line of lmms-eval's sample log as a `Sample`."""
    doc = logged.get("doc") or {}
    metrics = [entry["metric"] for entry in task.config.metric_list or []]
    return Sample(
        task=name,
        doc_id=int(logged["doc_id"]),
        image_id=str(doc.get("image_id", logged["doc_id"])),
        question=str(doc.get("question", "")),
        answer=str(logged["target"]),
        kind=sample_kind(metrics, logged),
        prediction=str(logged["filtered_resps"][0]),
        score=sample_score(name, metrics, logged),
        counts=(logged.get("token_counts") or [None])[0] or {},
    )
