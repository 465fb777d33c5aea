"""The errors vtprune raises. Every message says what was given, what is legal and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CheckpointError",
    "HostContractError",
    "InputError",
    "KernelError",
    "PlanError",
    "SessionError",
    "ShapeError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UntrainedError",
    "VtpruneError",
]


class VtpruneError(Exception):
    """Base of every error raised by vtprune."""


class UnknownNameError(VtpruneError, ValueError):
    """A method, family, kernel, site or model name that is not registered."""

    def __init__(self, kind: str, given: str, legal: Iterable[str]) -> None:
        names = sorted(legal)
        close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"Unknown {kind} {given!r}.{hint} Available: {', '.join(names)}.")


class BudgetError(VtpruneError, ValueError):
    """A token budget that is malformed, or that the method's schedule cannot reach.

    Attributes:
        floor: smallest average number of visual tokens a decoder layer that the schedule reaches, if known.
    """

    def __init__(self, message: str, *, floor: float | None = None) -> None:
        super().__init__(message)
        self.floor = floor


class PlanError(VtpruneError, ValueError):
    """A plan whose stages cannot be run in this order or on this model."""


class InputError(VtpruneError, ValueError):
    """A call of the wrapped model that cannot be pruned; raised before the decoder runs."""


class UnsupportedModelError(VtpruneError, TypeError):
    """A model that no registered family recognises, or a feature its family refuses."""


class SessionError(VtpruneError, RuntimeError):
    """A session that is used after `remove()`, or a second one on the same model."""


class ShapeError(VtpruneError, ValueError):
    """Tensors given to a kernel whose shapes or dtypes do not fit together."""


class KernelError(VtpruneError, RuntimeError):
    """An implementation of a kernel that was asked for by name and cannot run here or on these tensors."""


class CheckpointError(VtpruneError, ValueError):
    """Weights of a predictor that are missing, damaged, of another method, or trained for another model."""


class UntrainedError(CheckpointError):
    """A learned method without weights for this model; the message says how to train them."""


class HostContractError(VtpruneError, RuntimeError):
    """transformers passed something per token that vtprune does not know how to gather."""
