"""One question, answered by the unpruned model and by pruned ones, token by token in turn, then timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vtprune.demo.stream import TokenStream
from vtprune.stopwatch import timer

if TYPE_CHECKING:
    from vtprune.demo.models import Loaded
    from vtprune.demo.settings import Run
    from vtprune.plan import Plan
    from vtprune.prompt import Question
    from vtprune.report import Report

__all__ = ["Answer", "Race", "race"]

# enough rounds for a median, as long as they do not make anybody wait
_ROUNDS, _PATIENCE_S = 5, 2.5  # seconds
_DECODE_TOKENS = 8


@dataclass
class Answer:
    """What one model said.

    Attributes:
        title: "unpruned", or how it was pruned.
        run: how it was pruned, None of the unpruned model.
        ids: new tokens so far, end of sequence included.
        text: the same for people.
        finished: there are no more.
        report: of the pruned prefill.
        plan: that it followed.
        prefill_s: median seconds of a prefill, tower included.
        tokens_per_s: while decoding.
        agrees: leading tokens that are those of the unpruned answer; None while either still runs.
    """

    title: str
    run: Run | None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    report: Report | None = None
    plan: Plan | None = None
    prefill_s: float | None = None
    tokens_per_s: float | None = None
    agrees: int | None = None

    @property
    def same(self) -> bool:
        """All tokens are those of the unpruned answer."""
        return self.agrees is not None and self.agrees == len(self.ids)


@dataclass
class Race:
    """How far a question has come.

    Attributes:
        phase: what is going on.
        answers: the unpruned one first.
        inputs: what the processor made of the question.
        rounds: over how many rounds times are medians.
    """

    phase: Literal["answering", "measuring", "done"]
    answers: list[Answer]
    inputs: Mapping[str, Any]
    rounds: int = 0

    @property
    def pruned(self) -> list[Answer]:
        """All answers but the first."""
        return self.answers[1:]


def race(
    loaded: Loaded, question: Question, runs: Sequence[Run], max_new_tokens: int, *, patience_s: float = _PATIENCE_S
) -> Iterator[Race]:
    """Ask; yields the same `Race` again after every token and every round of timing, and when all is done.

    The models take turns: only one computes at any time. Closing the iterator stops them.

    Args:
        loaded: the model.
        question: to be asked.
        runs: how to prune it.
        max_new_tokens: length of an answer at most.
        patience_s: seconds that timing may about take, which is one round at least; 0 for none.

    Raises:
        VtpruneError: if a run cannot be attached, or does not fit this prompt.
    """
    from vtprune.prompt import prompt_inputs

    models = [loaded.copy() for _ in range(1 + len(runs))]
    sessions = [run.attach(model, record_scores=True) for run, model in zip(runs, models[1:], strict=True)]
    inputs = prompt_inputs(loaded.model, loaded.processor, [question])
    answers = [Answer("unpruned", None), *(Answer(run.title, run) for run in runs)]
    state = Race("answering", answers, inputs)
    with ExitStack() as stack:
        streams = [TokenStream(model, inputs, max_new_tokens=max_new_tokens) for model in models]
        for stream in streams:
            stack.callback(stream.close)
        while not all(answer.finished for answer in answers):
            for stream, answer in zip(streams, answers, strict=True):
                stream.step()
                answer.ids, answer.finished = stream.ids, stream.finished
                answer.text = loaded.decode(stream.ids)
            yield state
    for answer, session in zip(answers[1:], sessions, strict=True):
        report = answer.report = session.report
        images = len(question.images) + len(question.videos)
        opening = None if report.layout is None else report.layout.opening[0]
        answer.plan = session.plan_for(report.visual_tokens[0], report.text_tokens[0], images, opening)
        answer.agrees = agreement(answers[0].ids, answer.ids)
    if patience_s > 0:
        state.phase = "measuring"
        # a round is a prefill, and another one with a few steps behind it
        step = [stream.seconds[-1] for stream in streams]
        cost = sum(2 * stream.seconds[0] for stream in streams) + _DECODE_TOKENS * sum(step)
        yield from _measure(state, models, max(1, min(_ROUNDS, int(patience_s / cost))))
    state.phase = "done"
    yield state


def agreement(full: Sequence[int], pruned: Sequence[int]) -> int:
    """How many leading tokens agree; one more than there are if `full` goes on where `pruned` ends."""
    shared = next((at for at, (a, b) in enumerate(zip(full, pruned, strict=False)) if a != b), None)
    if shared is not None:
        return shared
    return min(len(full), len(pruned)) + (len(full) > len(pruned))


def _measure(state: Race, models: Sequence[Any], rounds: int) -> Iterator[Race]:
    """Prefill and decoding of all models in turn, so that drift of the machine hits all alike."""
    prefills: list[list[float]] = [[] for _ in models]
    decodes: list[list[float]] = [[] for _ in models]
    for number in range(rounds):
        # every second round goes backwards: no model always runs right after the same other one
        order = range(len(models))
        for index in order if number % 2 == 0 else reversed(order):
            prefills[index].append(_prefill(models[index], state.inputs))
            decodes[index] += _decode(models[index], state.inputs)
        for answer, prefill, decode in zip(state.answers, prefills, decodes, strict=True):
            answer.prefill_s, answer.tokens_per_s = statistics.median(prefill), 1 / statistics.median(decode)
        state.rounds = number + 1
        yield state


def _prefill(model: Any, inputs: Mapping[str, Any]) -> float:
    import torch

    start = timer()
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return timer() - start


def _decode(model: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Seconds of single decode steps, whether or not the answer would have ended before."""
    stream = TokenStream(model, inputs, max_new_tokens=1 + _DECODE_TOKENS, min_new_tokens=1 + _DECODE_TOKENS)
    while stream.step() is not None:
        continue
    return stream.seconds[1:]
