"""The unpruned model with tokens hidden from it: what a pruned model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from vtprune.errors import UnsupportedModelError
from vtprune.hooks.cache import physical_length
from vtprune.hooks.families.base import Parts
from vtprune.plan import Plan
from vtprune.report import Kept

__all__ = ["Hidden", "hiding"]


@dataclass(frozen=True)
class Hidden:
    """What the unpruned model must not see.

    Attributes:
        gone: for each decoder layer, [B, N] True at positions that it must not see.
        closed: for each decoder layer, [B, N] True at positions whose gap is closed up in the position ids, or None.
    """

    gone: list[Tensor]
    closed: list[Tensor | None]

    @classmethod
    def make(cls, visual: Tensor, real: Tensor, plan: Plan, kept: Sequence[Kept], layers: int) -> Hidden:
        """What left in a pruned run.

        Args:
            visual: [B, N] True at visual tokens.
            real: [B, N] False at padding.
            plan: the stages of the run.
            kept: what each of them kept.
            layers: decoder layers.
        """
        gone = [torch.zeros_like(visual)] * layers
        closed: list[Tensor | None] = [None] * layers
        text = whole = real & ~visual
        for stage, record in zip(plan.stages, kept, strict=True):
            if record.text is not None:
                text = _chosen(whole, record.text)
            left = real & ~text & ~_chosen(visual, record.indices)
            first = stage.site.index if stage.site.kind == "layer" else 0
            gone[first:] = [left] * (layers - first)
            if stage.positions == "compact":
                closed[first:] = [left] * (layers - first)
        return cls(gone, closed)

    def mirrored(self, visual: Tensor) -> Hidden:
        """As many other visual tokens: the last for the first, and so on; half of them where all are hidden."""

        def mirror(marks: Tensor) -> Tensor:
            result = marks.clone()
            for row, mine, here in zip(result, marks, visual, strict=True):
                gone = mine[here].flip(0)
                row[here] = torch.arange(len(gone), device=gone.device) % 2 == 0 if gone.all() else gone
            return result

        return Hidden([mirror(g) for g in self.gone], [None if c is None else mirror(c) for c in self.closed])


def _chosen(among: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """[B, N] True at the tokens of `among` [B, N] that have these numbers in each sample."""
    marks = torch.zeros_like(among)
    for row, mine, numbers in zip(marks, among, indices, strict=True):
        row[mine.nonzero()[numbers, 0]] = True
    return marks


@contextlib.contextmanager
def hiding(parts: Parts, real: Tensor, hidden: Hidden) -> Iterator[None]:
    """Run the model with tokens of its prompt hidden as keys, in the prompt's own call and in later ones.

    Args:
        parts: of the unpruned model.
        real: [B, N] False at the prompt's padding.
        hidden: what each layer must not see.
    """
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(parts.layers):
            hook = _hide(parts, index, real & ~hidden.gone[index], hidden.closed[index])
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hide(parts: Parts, index: int, visible: Tensor, closed: Tensor | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        missing = [name for name in ("attention_mask", "position_embeddings") if name not in kwargs]
        if missing:
            raise UnsupportedModelError(
                f"{type(module).__name__} is called without {' and '.join(missing)}, which pruning has to shorten."
            )
        states, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values")
        keys = physical_length(cache, index) + states.shape[1]
        later = keys - visible.shape[1]
        mask = create_causal_mask(
            config=parts.text_model.config,  # type: ignore[arg-type]
            inputs_embeds=states,
            attention_mask=nn.functional.pad(visible, (0, later), value=True),
            past_key_values=cache,
            layer_idx=index,
        )
        changed = {**kwargs, "attention_mask": mask}
        if closed is not None:
            position = torch.arange(keys, device=closed.device) - nn.functional.pad(closed, (0, later)).cumsum(1)
            changed["position_embeddings"] = parts.rotary(states, position_ids=position[:, -states.shape[1] :])
        return args, changed

    return hook
