"""How sure a model stays of its own unpruned answer while its budget shrinks, for one question."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtprune.demo.stream import TokenStream
from vtprune.errors import BudgetError

if TYPE_CHECKING:
    from vtprune.demo.models import Loaded
    from vtprune.demo.settings import Run
    from vtprune.prompt import Question

__all__ = ["KEEPS", "Point", "stability"]

KEEPS = ("100%", "75%", "50%", "1/3", "25%", "1/6", "1/9", "1/16", "1/25", "1/36")


@dataclass(frozen=True)
class Point:
    """One budget of one method.

    Attributes:
        method: the chain.
        keep: the budget, as it was asked.
        share: visual tokens a decoder layer, averaged, as a share of all.
        probability: that the model gives the tokens of its unpruned answer, geometric mean over them; None if the
            budget is out of the method's reach.
        same: its own (greedy) answer is the unpruned one.
        message: why there is no probability.
    """

    method: str
    keep: str
    share: float | None
    probability: float | None
    same: bool | None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


def stability(
    loaded: Loaded, question: Question, runs: Sequence[Run], max_new_tokens: int, keeps: Sequence[str] = KEEPS
) -> Iterator[Point]:
    """Ask unpruned once, then let each method be asked for that answer at every budget.

    The pruned model is made to say the unpruned answer, and at each of its tokens its own probability of that token is
    read. Where that token is always its first choice too, its own greedy answer is the same one. A method that takes no
    budget gives one point.

    Args:
        loaded: the model.
        question: to be asked.
        runs: the methods; their budgets are replaced.
        max_new_tokens: length of the unpruned answer at most.
        keeps: the budgets.

    Raises:
        VtpruneError: if a method cannot run on this model at all.
    """
    from vtprune.prompt import prompt_inputs

    inputs = prompt_inputs(loaded.model, loaded.processor, [question])
    stream = TokenStream(loaded.copy(), inputs, max_new_tokens=max_new_tokens)
    while stream.step() is not None:
        continue
    for run in runs:
        for keep in keeps if run.keep is not None else (None,):
            yield _point(loaded, inputs, dataclasses.replace(run, keep=keep), stream.ids)


def _point(loaded: Loaded, inputs: Mapping[str, Any], run: Run, answer: Sequence[int]) -> Point:
    model = loaded.copy()
    asked = "its own choice" if run.keep is None else run.keep
    try:
        session = run.attach(model)
        # where images differ in their tokens, only the prompt tells what is in reach
        chances, best = _chances(model, inputs, answer)
    except BudgetError as error:
        return Point(run.method, asked, None, None, None, str(error))
    report = session.report
    mean = math.exp(sum(math.log(max(p, 1e-30)) for p in chances) / len(chances))
    share = report.average_tokens[0] / report.visual_tokens[0]
    return Point(run.method, asked, share, mean, best == list(answer))


def _chances(model: Any, inputs: Mapping[str, Any], answer: Sequence[int]) -> tuple[list[float], list[int]]:
    """The probability of each token of `answer` behind those before it, and the likeliest token there."""
    import torch

    prompt = inputs["input_ids"].shape[1]

    def forced(_: int, ids: Any) -> list[int]:
        return [answer[len(ids) - prompt]]

    with torch.no_grad():
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=len(answer),
            prefix_allowed_tokens_fn=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
    rows = [row[0].float().log_softmax(-1) for row in out.logits]
    chances = [float(row[token].exp()) for row, token in zip(rows, answer, strict=True)]
    return chances, [int(row.argmax()) for row in rows]
