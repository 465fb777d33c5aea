"""Plan: an ordered list of stages, each a place in the model (Site), a scorer and how many tokens survive it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from vtprune.errors import PlanError

if TYPE_CHECKING:
    from vtprune.contract import Scorer
    from vtprune.rules import Remainder, Selection

__all__ = ["Plan", "Positions", "Site", "Stage", "resolve_count"]

Positions = Literal["keep", "compact"]
_KINDS = ("vision", "input", "restart", "layer")
_SITE = re.compile(r"(vision|restart|layer)\[(\d+)\]|(input)")


@dataclass(frozen=True)
class Site:
    """A place where tokens can go: `vision[k]` after tower block k, `input` before the decoder, `restart[k]` before the
    decoder once its layers 0 to k have been asked, `layer[k]` before decoder layer k. Indices are 0-based."""

    kind: Literal["vision", "input", "restart", "layer"]
    index: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise PlanError(f"site kind must be one of {', '.join(_KINDS)}, got {self.kind!r}.")
        if self.index < 0 or (self.kind == "input" and self.index):
            raise PlanError(f"site index must be >= 0 (and 0 for 'input'), got {self.kind}[{self.index}].")
        if self.kind == "layer" and self.index == 0:
            raise PlanError("layer[0] is the site 'input'; write 'input', or layer[k] with k >= 1.")

    def __str__(self) -> str:
        return "input" if self.kind == "input" else f"{self.kind}[{self.index}]"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read what `str(site)` writes.

        Raises:
            PlanError: if `text` is not `vision[k]`, `input`, `restart[k]` or `layer[k]`.
        """
        match = _SITE.fullmatch(text.strip())
        if match is None:
            raise PlanError(f"site must be written 'vision[k]', 'input', 'restart[k]' or 'layer[k]', got {text!r}.")
        return cls("input") if match[3] else cls(match[1], int(match[2]))  # type: ignore[arg-type]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: tower blocks, then the decoder's input, restarts, then decoder layers."""
        return _KINDS.index(self.kind), self.index


def resolve_count(keep: int | float, total: int) -> int:
    """Turn a count or a fraction of `total` tokens into a count in [1, total]; 0 tokens stay 0, and 0 keeps none.

    The one place where a fraction becomes an integer: round half up, at least one token.

    Raises:
        PlanError: if an integer `keep` exceeds `total`.
    """
    if total == 0:
        return 0
    if isinstance(keep, float):
        return min(total, max(1, math.floor(keep * total + 0.5)))
    if keep > total:
        raise PlanError(f"keep must be in [1, {total}], got {keep} ({total} visual tokens here). Lower keep.")
    return keep


@dataclass(frozen=True)
class Stage:
    """One cut. `keep` counts survivors: an int, or a float fraction of the sample's original visual tokens.

    Attributes:
        site: where the cut is made.
        scorer: which tokens survive.
        keep: how many survive. With `adaptive` it is the final target that the scorer may stay above; the int 0 is
            none, possible at `layer[k]` (all leave).
        adaptive: the scorer's `count` decides how many survive this stage, never fewer than `keep`.
        positions: `keep` leaves survivors their position ids, `compact` renumbers the sequence 0..len-1.
        selection: how a set is made of the scores; None does as the scorer says.
        remainder: what happens to the tokens that are not in it; None does as the scorer says.

    Raises:
        PlanError: if a field is malformed, or the rules do not fit the scorer.
    """

    site: Site
    scorer: Scorer
    keep: int | float
    adaptive: bool = False
    positions: Positions = "keep"
    selection: Selection | None = None
    remainder: Remainder | None = None

    def __post_init__(self) -> None:
        keep = self.keep
        lowest = 0 if self.site.kind == "layer" else 1
        legal = isinstance(keep, int) and not isinstance(keep, bool) and keep >= lowest
        legal = legal or (isinstance(keep, float) and 0.0 < keep <= 1.0)
        if not legal:
            raise PlanError(
                f"stage keep must be an int >= {lowest} or a fraction in (0, 1], got {keep!r} at {self.site}."
            )
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"positions must be 'keep' or 'compact', got {self.positions!r} at {self.site}.")
        if self.positions == "compact" and self.site.kind == "vision":
            raise PlanError(
                f"positions='compact' has no meaning at {self.site}: set it on an 'input' or 'layer' stage."
            )
        self._check_rules()

    def _check_rules(self) -> None:
        for rule in (self.selection, self.remainder):
            if rule is not None and rule.needs_scores and not self.scorer.has_score:
                raise PlanError(
                    f"{rule.name} needs a score for every token, but {self.scorer.name} chooses a set and gives none. "
                    f"Use a method that scores, such as fastv or flowcut, or another rule than {rule.name}."
                )
        if self.selection is not None and self.selection.adaptive and not self.adaptive:
            raise PlanError(
                f"selection {self.selection.name} decides itself how many tokens stay: set adaptive=True on the stage "
                f"at {self.site}; its keep={self.keep!r} is then the fewest."
            )
        if self.selection is not None and self.scorer.merges and self.rules[1] is None:
            raise PlanError(
                f"{self.scorer.name} averages what leaves into the tokens that it keeps itself, and selection "
                f"{self.selection.name} keeps others. Name what happens to the rest as well, such as "
                f"{self.scorer.name}/{self.selection.name}/nearest."
            )

    @property
    def rules(self) -> tuple[Selection | None, Remainder | None]:
        """The selection and the remainder that apply; None where the scorer's own `select` or `assign` does."""
        return self.selection or self.scorer.selection, self.remainder or self.scorer.remainder

    @property
    def merges(self) -> bool:
        """Something of what leaves stays in survivors."""
        remainder = self.rules[1]
        return self.scorer.merges if remainder is None else remainder.merges

    @property
    def looks_ahead(self) -> bool:
        """The layer behind the cut is asked before it runs."""
        return self.site.kind == "layer" and self.scorer.ahead and self.scorer.reads_attention

    def count(self, total: int) -> int:
        """Survivors out of `total` original visual tokens (the final target, if the stage is adaptive)."""
        return resolve_count(self.keep, total)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; rules that are left to the scorer are left out."""
        rules = {"selection": self.selection, "remainder": self.remainder}
        return {
            "site": str(self.site),
            "scorer": self.scorer.to_dict(),
            "keep": self.keep,
            "adaptive": self.adaptive,
            "positions": self.positions,
            **{name: rule.to_dict() for name, rule in rules.items() if rule is not None},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """Inverse of `to_dict`.

        Raises:
            PlanError: if a field is missing or not known.
        """
        from vtprune.contract import Scorer
        from vtprune.rules import Remainder, Selection

        known = {"site", "scorer", "keep", "adaptive", "positions", "selection", "remainder"}
        if not {"site", "scorer", "keep"} <= set(data) <= known:
            raise PlanError(
                f"a stage has the fields {sorted(known)} (site, scorer, keep required), got {sorted(data)}."
            )
        rest = {k: data[k] for k in ("adaptive", "positions") if k in data}
        if data.get("selection") is not None:
            rest["selection"] = Selection.from_dict(data["selection"])
        if data.get("remainder") is not None:
            rest["remainder"] = Remainder.from_dict(data["remainder"])
        return cls(Site.parse(data["site"]), Scorer.from_dict(data["scorer"]), data["keep"], **rest)


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which a token meets them. Frozen, comparable, JSON in and out.

    Raises:
        PlanError: if the sites are not in increasing order.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            same = before.site.order == after.site.order and after.site.kind == "input"
            if after.site.order < before.site.order or (after.site == before.site and not same):
                raise PlanError(
                    f"stages must go forward through the model, got {after.site} ({after.scorer.name}) after "
                    f"{before.site} ({before.scorer.name}). Reorder the methods or move one of them."
                )

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.stages + other.stages)

    def at(self, kind: str) -> tuple[Stage, ...]:
        """The stages whose site is of this kind."""
        return tuple(s for s in self.stages if s.site.kind == kind)

    def tokens_per_layer(self, entering: tuple[int, ...], total: int) -> tuple[int, ...]:
        """Visual tokens that enter each decoder layer.

        Args:
            entering: the same before this plan acts, one int a decoder layer.
            total: the sample's original visual tokens, of which fractions are taken.
        """
        tokens = list(entering)
        for stage in self.stages:
            first = stage.site.index if stage.site.kind == "layer" else 0
            tokens[first:] = [min(t, stage.count(total)) for t in tokens[first:]]
        return tuple(tokens)

    def passes(self, entering: tuple[int, ...], total: int) -> tuple[tuple[int, int], ...]:
        """What restarts run before the decoder runs: (k, visual tokens) of each `restart[k]` that drops some.

        Layers 0 to k-1 run in full, layer k up to its queries and keys. Arguments as in `tokens_per_layer`.
        """
        found: list[tuple[int, int]] = []
        now = entering[0]
        for stage in self.stages:
            after = min(now, stage.count(total))
            if stage.site.kind == "restart" and after < now:
                found.append((stage.site.index, now))
            now = after
        return tuple(found)

    def looks_ahead(self, entering: tuple[int, ...], total: int) -> tuple[tuple[int, int], ...]:
        """(k, visual tokens) of each `layer[k]` that drops some by what layer k itself would attend to.

        Queries and keys of that layer are then computed twice. Arguments as in `tokens_per_layer`.
        """
        found: list[tuple[int, int]] = []
        before = Plan()
        for stage in self.stages:
            if stage.looks_ahead:
                now = before.tokens_per_layer(entering, total)[stage.site.index]
                if stage.count(total) < now:
                    found.append((stage.site.index, now))
            before = before + Plan((stage,))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"vtprune_plan": 1, "stages": [s.to_dict() for s in self.stages]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            PlanError: if this is not a plan or a later format.
        """
        if data.get("vtprune_plan") != 1 or not isinstance(data.get("stages"), list):
            raise PlanError(f"not a plan: expected {{'vtprune_plan': 1, 'stages': [...]}}, got keys {sorted(data)}.")
        return cls(tuple(Stage.from_dict(s) for s in data["stages"]))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: if the file is not JSON or not a plan.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise PlanError(f"{path} is not JSON: {error}. Expected a file written by Plan.save().") from error
        if not isinstance(data, dict):
            raise PlanError(f"{path} holds a {type(data).__name__}, expected a plan object.")
        return cls.from_dict(cast("dict[str, Any]", data))
