"""The contract of a method: what a scorer sees, what it returns, and how a budget becomes its plan.

Axes: B samples (images at a `vision` site), V visual tokens still alive (padded at the end, see `valid`),
N keys of the attention block, H query heads, Hkv key/value heads, R query rows, d head width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.registry import Registry, load_entry, write_entry
from vtprune.rules import Merge, Remainder, Selection, top_k_mask
from vtprune.views import AttentionView, Memory, Queries, TextView, TokenView, TransitionView

__all__ = [
    "METHODS",
    "AttentionView",
    "Memory",
    "Queries",
    "Scorer",
    "TextView",
    "TokenView",
    "TransitionView",
    "compose",
    "top_k_mask",
]


@dataclass(frozen=True)
class Scorer:
    """One paper's science, and the method that users name: a frozen dataclass whose fields are its knobs.

    A subclass sets `site`, overrides `score` (or `select`, for set-valued rules) and registers itself:
    `@METHODS.register("name")`. Methods with several stages override `plan`. A scorer holds no state: what must
    live through a forward pass goes into `memory`.

    Attributes:
        name: registry key.
        summary: one line for listings, with the arXiv id.
        site: where the stage of a one-stage method cuts; None if the method overrides `plan`.
        queries: query rows that `observe` needs, or None if the method reads no attention. In a tower without CLS
            "cls" is served as "mean".
        accumulates: `observe` runs after every block before the stage (else only after the last one before it).
        ahead: at `layer[k]` `observe` sees layer k itself, asked about the tokens that are about to be cut, and not the
            layer before it. (At `restart[k]` it always sees layer k.)
        adaptive: the method can decide itself how many tokens stay; a budget is then optional.
        takes_budget: the method can be given a budget; if not, it decides itself and refuses one.
        merges: tokens that leave are averaged into a survivor (see `assign`).
        reads_prompt: the view's `text_key` is filled (it costs one copy of the token ids to the host).
        reads_text: the view's `text` is filled.
        reads_input: `prepare` is called once, on what enters the decoder's layers.
        reads_frames: it compares the frames of a film, which a tower sees one by one: it cannot cut there.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    site: ClassVar[Site | None] = None
    queries: ClassVar[Queries | None] = None
    accumulates: ClassVar[bool] = False
    ahead: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    takes_budget: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    reads_input: ClassVar[bool] = False
    reads_frames: ClassVar[bool] = False

    @property
    def reads_attention(self) -> bool:
        """`observe` is called; unless overridden whenever `queries` is set."""
        return self.queries is not None

    @property
    def has_score(self) -> bool:
        """It defines `score`, so that any selection can be made of it."""
        return type(self).score is not Scorer.score

    @property
    def selects_best(self) -> bool:
        """It leaves `select` as it is: the best by score."""
        return type(self).select is Scorer.select

    @property
    def selection(self) -> Selection | None:
        """What makes a set of the scores where the stage names nothing; None for the best, or `select`."""
        return None

    @property
    def remainder(self) -> Remainder | None:
        """What happens to the rest where the stage names nothing; None drops it, or does as `assign` says."""
        return None

    @property
    def drops_text(self) -> bool:
        """At `restart[k]` text competes with visual tokens for the rows of the second pass, by `score_rows`."""
        return False

    @property
    def weighs_sizes(self) -> bool:
        """Blocks of a tower behind its first cut weigh keys by how many tokens were merged into them."""
        return False

    @property
    def reads_transitions(self) -> bool:
        """`observe_transition` is called."""
        return False

    def bind(self, model: Any) -> Scorer:
        """The method as it runs on `model`; one that is learned finds its weights, or refuses. Called by `prune()`."""
        return self

    def watches(self, site: Site) -> range:
        """Blocks that are observed before a cut at `site`; unless overridden as `accumulates` says."""
        last = site.index - (site.kind == "layer")
        return range(0 if self.accumulates else last, last + 1)

    def floor(self, geometry: Geometry) -> int:
        """Fewest tokens that a stage of this method can leave of a prompt; a plan that asks for fewer is refused."""
        return 0

    def prepare(self, view: TokenView) -> Memory:
        """The first memory of a method that cuts in the decoder's layers, from what enters them. If `reads_input`.

        Args:
            view: with `text`; `keep` says nothing yet.
        """
        raise PlanError(f"{self.name} reads the decoder's input but does not define prepare().")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Turn one attention block into per-token memory. Called only if `reads_attention`.

        Args:
            view: the block that has just run.
            memory: what earlier blocks left, {} at the first.

        Returns:
            the new memory, tensors [B, V] or [B, V, d].
        """
        raise PlanError(f"{self.name} sets queries={self.queries!r} but does not define observe().")

    def observe_transition(self, view: TransitionView, memory: Memory) -> Memory:
        """Turn what a sublayer did in a prefill into per-token memory [B, V]. Called only if `reads_transitions`."""
        raise PlanError(f"{self.name} reads transitions but does not define observe_transition().")

    def score_rows(self, view: AttentionView) -> Tensor:
        """[B, M] scores of all tokens of the call, those of `score` at visual ones. Called only if `drops_text`."""
        raise PlanError(f"{self.name} drops text but does not define score_rows().")

    def score(self, view: TokenView) -> Tensor:
        """[B, V] scores, higher is kept; values at invalid tokens are ignored."""
        raise PlanError(f"{self.name} defines neither score() nor select().")

    def select(self, view: TokenView) -> Tensor:
        """[B, V] bool: the tokens that survive, `view.keep[b]` of them a sample; unless overridden by `selection`."""
        if self.selection is None:
            return top_k_mask(self.score(view), view.keep, view.valid)
        return self.selection.select(view, self.score(view) if self.has_score else None)

    def count(self, view: TokenView) -> Tensor:
        """[B] survivors of an adaptive stage; the engine never lets them fall below `view.keep` (the target)."""
        raise PlanError(f"{self.name} has an adaptive stage but does not define count().")

    def assign(self, view: TokenView, kept: Tensor) -> Tensor:
        """[B, V] for each token the index (on the V axis) of the survivor it is averaged into. Only if `merges`.

        Args:
            kept: [B, V] what `select` returned; a kept token is its own owner.
        """
        raise PlanError(f"{self.name} sets merges=True but does not define assign().")

    def merge(self, view: TokenView) -> Merge:
        """What `select` keeps, and what `assign` makes of the rest; to override where one search finds both."""
        kept = self.select(view)
        return Merge(kept, self.assign(view, kept))

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """The stages that spend `budget` on a model of this `geometry`; unless overridden, one stage at `site`.

        Raises:
            BudgetError: if the budget is missing or out of reach (with the smallest one possible).
            PlanError: if the method neither sets `site` nor overrides this.
        """
        site = self.site
        if site is None:
            raise PlanError(f"{self.name} neither sets a site nor defines plan().")
        return solve(lambda n: Plan((Stage(site, self, n),)), geometry, budget, method=self.name)

    def require(self, budget: Budget) -> Budget:
        """`budget`, or a BudgetError if none was given."""
        if budget.value is None:
            raise BudgetError(
                f"{self.name} needs a budget: pass keep=64 (tokens), keep=0.25 (a fraction) or flops=0.3."
            )
        return budget

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the name and every field."""
        return write_entry(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Scorer:
        """Inverse of `to_dict`.

        Raises:
            UnknownNameError: if no method has this name.
            PlanError: if a field is not one of the method's knobs.
        """
        return load_entry(METHODS, data)


METHODS: Registry[Scorer] = Registry("method", "vtprune.scorers")


def compose(methods: Sequence[Scorer], budgets: Sequence[Budget], geometry: Geometry) -> Plan:
    """One plan of several methods in order, each solved on what the earlier ones leave.

    Raises:
        BudgetError: if a budget is missing or out of reach.
        PlanError: if the methods cannot follow each other in this order.
    """
    plan = Plan()
    for method, budget in zip(methods, budgets, strict=True):
        plan = plan + method.plan(geometry.after(plan), budget)
    return plan
