"""Proof on the user's own model and prompt: pruning equals hiding the same tokens from the unpruned model.

Axes: B samples, N positions of the prompt, M physical rows that are left, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import InputError, UnsupportedModelError
from vtprune.hooks import prune, without_adapters
from vtprune.hooks.accounting import real_positions
from vtprune.hooks.families.base import Parts, family_of
from vtprune.hooks.hiding import Hidden, hiding
from vtprune.hooks.planner import Methods
from vtprune.hooks.proof import distances
from vtprune.hooks.session import Session
from vtprune.plan import Plan
from vtprune.report import Report

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """How far a pruned prefill is from the unpruned one with the same tokens hidden.

    All are root mean squares over the width of the decoder's output, as a share of its spread.

    Attributes:
        error: of the worst token that is left (in half precision of the median one).
        control: of the median token, if as many other tokens are hidden instead (half of them where all were).
        allowed: rounding in the model's dtype.
        contrast: how many times more than `error` the control must be to say something.
        report: of the pruned prefill.
    """

    error: float
    control: float
    allowed: float
    contrast: float
    report: Report

    @property
    def exact(self) -> bool:
        """The difference is rounding."""
        return self.error <= self.allowed

    @property
    def told_apart(self) -> bool:
        """Hiding other tokens makes a difference that is more than rounding, so that `exact` says something."""
        return self.control > self.contrast * max(self.error, self.allowed / 100)


@torch.no_grad()
def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Methods,
    keep: Any = None,
    *,
    basis: str = "average",
    flops: float | None = None,
) -> Verification:
    """Prefill pruned, then unpruned with the dropped tokens hidden as keys, and compare the decoder's output.

    The unpruned run starts from the same token embeddings, those that came out of a tower that was cut included: what
    is proved is the decoder. It is a prefill of full length with masks of its own; memory and time are those of three
    prefills.

    Args:
        model: a model that `prune` takes, in eval mode, not pruned.
        inputs: keyword arguments of its forward: a prompt with images.
        method, keep, basis, flops: as for `prune`.

    Raises:
        InputError: if the prompt has no image.
        UnsupportedModelError: if its decoder has sliding windows or two-way blocks, which this check cannot hide
            tokens from, or adds visual features in its layers that a tower cut would change; or if the plan merges
            tokens between layers.
        and what `prune` raises.
    """
    family = family_of(model.config)(without_adapters(model))
    parts, prompt = family.parts(), family.prompt(dict(inputs))
    if prompt.visual is None or not any(prompt.counts):
        raise InputError("verify() needs a prompt with an image, which `inputs` does not hold.")
    if any(parts.windows) or prompt.blocks is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has sliding windows or two-way attention, from which verify() cannot hide tokens."
        )
    with prune(model, method, keep, basis=basis, flops=flops) as session:
        if session.geometry.deepstack and session.plan.at("vision"):
            raise UnsupportedModelError(
                f"{type(model).__name__} adds visual features of its tower to decoder layers, which a tower cut "
                "changes; verify() serves cuts at 'input' or later."
            )
        merging = next((s for s in session.plan.at("layer") if s.merges), None)
        if merging is not None:
            raise UnsupportedModelError(
                f"{merging.scorer.name} merges tokens at {merging.site}, which hiding cannot imitate; verify() serves "
                "merges at 'input' or in the tower, whose result enters both runs."
            )
        with _watching(parts, session) as seen:
            model(**inputs)
        report = session.report
    real = real_positions(prompt)
    # a prompt from which nothing is dropped has no records
    plan = session.plan if report.kept else Plan()
    hidden = Hidden.make(prompt.visual, real, plan, report.kept, session.geometry.layers)

    def run(what: Hidden) -> Tensor:
        with hiding(parts, real, what), _watching(parts, None, seen) as unpruned:
            model(**inputs)
        return unpruned.output

    want, other = run(hidden), run(hidden.mirrored(prompt.visual))
    left = (real & ~hidden.gone[-1]).to(want.device)
    found = distances(seen.output[left], want[left], other[left], seen.output.dtype)
    return Verification(*found, report)


class _Seen:
    """What entered the text model, [B, M, D] at the positions [B, M] of `rows`, and what came out, [B, N, D]."""

    entered: Tensor | None = None
    position: Tensor
    filled: Tensor
    output: Tensor


@contextlib.contextmanager
def _watching(parts: Parts, session: Session | None, give: _Seen | None = None) -> Iterator[_Seen]:
    """Note what passes the text model; `give` writes what it saw over the embeddings that enter."""
    seen = _Seen()

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = None if session is None else session.pruned_rows()
        if rows is not None:
            seen.entered, seen.position, seen.filled = kwargs["inputs_embeds"], rows.position, rows.filled
        if give is None or give.entered is None:
            return None
        full = kwargs["inputs_embeds"].clone()
        sample, row = give.filled.nonzero(as_tuple=True)
        full[sample, give.position[sample, row]] = give.entered[sample, row]
        return args, {**kwargs, "inputs_embeds": full}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.output = output[0] if isinstance(output, tuple) else output.last_hidden_state

    undo: list[Callable[[], object]] = [
        parts.text_model.register_forward_pre_hook(before, with_kwargs=True).remove,
        parts.text_model.register_forward_hook(after, with_kwargs=True).remove,
    ]
    try:
        yield seen
    finally:
        for handle in undo:
            handle()
