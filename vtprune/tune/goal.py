"""What a search is for: the most accuracy under a limit on FLOPs or time, or the fewest FLOPs at an accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtprune.errors import InputError

__all__ = ["Goal"]

_ROUNDING = 1e-9  # shares are quotients of sums, whose last bit does not decide


@dataclass(frozen=True)
class Goal:
    """A limit, and how a candidate is judged by it. Every limit is a share of the unpruned model's.

    Attributes:
        kind: "flops" of the decoder prefill, "latency" of the prefill with the vision tower, or "accuracy".
        limit: at most that share; of accuracy at least that share.

    Raises:
        InputError: if the limit is not in (0, 1].
    """

    kind: Literal["flops", "latency", "accuracy"]
    limit: float

    def __post_init__(self) -> None:
        if not 0.0 < self.limit <= 1.0:
            raise InputError(f"--{self.kind} must be a share in (0, 1] of the unpruned model's, got {self.limit}.")

    @classmethod
    def read(cls, flops: float | None, latency: float | None, accuracy: float | None) -> Goal:
        """The one limit that is set.

        Raises:
            InputError: if none or several are set, or the limit is not in (0, 1].
        """
        given = {"flops": flops, "latency": latency, "accuracy": accuracy}
        limits = {kind: limit for kind, limit in given.items() if limit is not None}
        if len(limits) != 1:
            found = ", ".join(f"--{kind} {limit:g}" for kind, limit in limits.items()) or "none"
            raise InputError(f"give exactly one of --flops, --latency and --accuracy, got {found}.")
        ((kind, limit),) = limits.items()
        return cls(kind, limit)  # type: ignore[arg-type]

    def value(self, accuracy: float, unpruned: float, share: float, ratio: float | None) -> float:
        """How good a candidate is, higher is better.

        A candidate within the limit has a value from 0 on, one beyond it minus the excess, so that any of the former is
        better than all of the latter.

        Args:
            accuracy, unpruned: of the candidate and of the unpruned model, on the same questions.
            share: its FLOPs, against unpruned.
            ratio: its prefill time, against unpruned, if the goal is about time.
        """
        excess = self.excess(share, ratio)
        if self.kind == "accuracy":
            lost = self.limit * unpruned - accuracy
            return -lost if lost > _ROUNDING else 1.0 - min(1.0, share)
        return -excess if excess > 0 else accuracy

    def excess(self, share: float, ratio: float | None) -> float:
        """How far beyond the limit a candidate's cost is; 0 if it is within, and for a limit on accuracy."""
        spent = {"flops": share, "latency": ratio, "accuracy": None}[self.kind]
        return 0.0 if spent is None or spent <= self.limit + _ROUNDING else spent - self.limit

    def so_far(self, accuracy: float, unpruned: float) -> float:
        """What candidates are compared by when they have been asked a part of the questions, higher is better."""
        return min(0.0, accuracy - self.limit * unpruned) if self.kind == "accuracy" else accuracy

    def __str__(self) -> str:
        what = {
            "flops": "prefill FLOPs at most",
            "latency": "prefill time at most",
            "accuracy": "accuracy at least",
        }[self.kind]
        return f"{what} {100 * self.limit:.4g} % of the unpruned model's"
