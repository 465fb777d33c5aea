"""Each row beside a reference method with the same FLOPs: is a method better than, say, dropping tokens at random?

FLOPs here are those of the decoder prefill: what a method saves in the vision tower, which the reference cannot, does
not make the reference weaker. The reference cuts before the decoder, so its cost is known from its number of tokens; it
gets the fewest that cost no less than the row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS
from vtprune.cost import prefill_flops
from vtprune.errors import PlanError
from vtprune.eval.cell import Answers, paired
from vtprune.eval.rows import UNPRUNED_ROW, Against, Row
from vtprune.plan import Site
from vtprune.specs import parse_chain, parse_method

if TYPE_CHECKING:
    from vtprune.contract import Scorer
    from vtprune.eval.counts import Totals

__all__ = ["InputCut", "compare", "require_reference"]


def require_reference(text: str) -> Scorer:
    """The method that rows are compared with.

    Raises:
        UnknownNameError: if it is not registered.
        PlanError: if it does not cut at `input`, or its knobs are malformed.
    """
    method = parse_method(text)
    if method.site != Site("input"):
        legal = ", ".join(name for name, cls in METHODS.items() if cls.site == Site("input"))
        raise PlanError(f"rows are compared with a method that cuts at 'input' ({legal}) or none, got {text!r}.")
    return method


class InputCut:
    """What a method that cuts at `input` costs on the batches that a cell has run.

    Attributes:
        keeps: budgets in order of cost: 1 to V tokens; shares n / V where questions differ in their visual tokens, V
            being the most that one has.
    """

    def __init__(self, method: Scorer, geometry: Geometry, totals: Totals) -> None:
        self._method, self._geometry, self._totals = method, geometry, totals
        sizes = {visual for batch in totals.batches for _, visual in batch}
        most = max(sizes, default=0)
        self.keeps: Sequence[int | float] = range(1, most + 1)
        if len(sizes) > 1:
            self.keeps = [n / most for n in self.keeps]
        self._kept: dict[tuple[int | float, int], int] = {}

    def flops(self, keep: int | float) -> int:
        """Decoder prefill of all batches as run, padding included."""
        total = 0
        for batch in self._totals.batches:
            rows = max(text + self._survivors(keep, visual) for text, visual in batch)
            total += len(batch) * prefill_flops(self._geometry, [rows] * self._geometry.layers)
        return total

    def match(self, spent: int) -> int | float:
        """The smallest budget that costs no less than `spent`; all tokens if none does."""
        place = bisect.bisect_left(self.keeps, spent, key=self.flops)
        return self.keeps[min(place, len(self.keeps) - 1)]

    def _survivors(self, keep: int | float, visual: int) -> int:
        if not visual:
            return 0
        if (keep, visual) not in self._kept:
            # whether the prompts were films is not known here; the run itself will tell
            geometry = self._geometry.for_prompt(visual, 0, 1, opening=0)
            plan = self._method.plan(geometry, Budget(keep))
            self._kept[keep, visual] = plan.tokens_per_layer(geometry.entering, visual)[0]
        return self._kept[keep, visual]


def compare(
    rows: Sequence[Row],
    answers: Mapping[str, Answers],
    reference: str,
    seed: int,
    begin: Callable[[int], object],
    ask: Callable[[Row], Answers | None],
) -> None:
    """Fill `row.against` of every row that ran and is of another method.

    Rows whose reference has the same budget share its run, and the sweep's own rows are used where they are that run.

    Args:
        rows: of the sweep, all measured.
        answers: by row name.
        reference: the method to compare with.
        seed: of the bootstrap.
        begin: called with the number of runs that are to come.
        ask: runs a row that is not in the table; None if it failed, with the reason in the row.
    """
    method = parse_method(reference)
    ran = [row for row in rows if row.status == "ok" and row.method != UNPRUNED_ROW]
    own = [row for row in ran if parse_chain(row.method).methods == (method,)]
    others = [row for row in ran if row not in own]
    if not others:
        return
    first = answers[others[0].name]
    cut = InputCut(method, first.geometry, first.totals)  # type: ignore[arg-type]
    if not cut.keeps:
        return
    wanted: dict[int | float, list[Row]] = {}
    for row in others:
        wanted.setdefault(cut.match(answers[row.name].totals.flops), []).append(row)
    known = {cut.keeps[-1]: answers[UNPRUNED_ROW]}
    costs = {answers[row.name].totals.flops: answers[row.name] for row in own}
    known |= {keep: costs[cut.flops(keep)] for keep in wanted if cut.flops(keep) in costs}
    begin(len(wanted.keys() - known.keys()))
    for keep, its_rows in wanted.items():
        run = Row(reference, f"{keep:.4g}", keep)
        found = known[keep] if keep in known else ask(run)
        for row in its_rows:
            row.against = _against(run, keep, found, answers[row.name], seed)


def _against(run: Row, keep: int | float, found: Answers | None, mine: Answers, seed: int) -> Against:
    share = mine.totals.share("flops")
    if found is None:
        return Against(run.method, keep, share, message=run.message)
    return Against(
        run.method,
        keep,
        share,
        tokens=found.totals.to_dict()["average_tokens"],
        reference_share=found.totals.share("flops"),
        differences={task: paired(samples, found.samples[task], seed) for task, samples in mine.samples.items()},
    )
