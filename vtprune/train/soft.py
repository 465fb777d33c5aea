"""Soft pruning: all tokens stay, and a mask in (0, 1) weakens visual tokens as keys in the layers behind each module.

A mask M multiplies the attention weights before they are normalised: log(M + eps) is added to the logits of the key's
column (as in DynamicViT; what ATP-LLaVA adds is not public). The masks of successive modules multiply. What inference
would have dropped, a product of 1/2 or less, counts no more in the scores of later modules, which then see what they
will see.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.contract import AttentionView, Memory, TokenView
from vtprune.errors import UnsupportedModelError
from vtprune.predictors import Thresholds
from vtprune.scorers.atp import ATP

__all__ = ["SoftCall", "soft_pruning"]

_EPSILON = 1e-6


@dataclass
class SoftCall:
    """One forward pass.

    Attributes:
        masks: for each module its [B, V] mask, in order, with gradients to the thresholds; 0 at padding.
        valid: [B, V] False at padding of the V axis.
    """

    masks: list[Tensor] = field(default_factory=list)
    valid: Tensor | None = None

    def counts(self) -> list[Tensor]:
        """Behind each module the [B] soft number of tokens: sums of the products of the masks so far."""
        left, counts = None, []
        for mask in self.masks:
            left = mask if left is None else left * mask
            counts.append(left.sum(1))
        return counts


@dataclass(frozen=True)
class _Watch(ATP):
    """Notes what each module sees, and lets nothing leave."""

    call: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def needs_weights(self) -> bool:
        """See `LearnedScorer`."""
        return False

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """See `ATP`; the columns of the visual tokens are noted."""
        self.call["column"] = view.column
        left: Tensor | None = self.call.get("left")
        if left is not None:
            view = _without(view, view.valid & ~left)
        return super().observe(view, memory)

    def count(self, view: TokenView) -> Tensor:
        """[B] all."""
        self.call["view"] = view
        return view.valid.sum(1)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] equal."""
        return torch.zeros(view.valid.shape, device=view.valid.device)


@contextlib.contextmanager
def soft_pruning(
    model: Any, method: ATP, thresholds: Thresholds, temperature: float = 10.0
) -> Iterator[Callable[[], SoftCall]]:
    """Weaken visual tokens by ATP's soft masks in every prefill inside, with gradients to `thresholds`.

    Scores come from the same views as in pruning, and carry no gradient themselves.

    Args:
        model: not pruned, with sdpa or eager attention; call it with `use_cache=False`.
        method: ATP with its knobs; the modules sit behind the layers of `thresholds`.
        thresholds: what is trained.
        temperature: of the masks.

    Yields:
        a function that returns what the last call did.

    Raises:
        UnsupportedModelError: if the model's attention takes no mask of numbers.
    """
    kind = model.config.get_text_config()._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"soft masks need attention that takes a mask of numbers (sdpa or eager), and the model uses {kind!r}. "
            "Load it with attn_implementation='sdpa'."
        )
    call: dict[str, Any] = {}
    watch = _Watch(after=thresholds.after, call=call, **method.scores)
    last: list[SoftCall] = [SoftCall()]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        call.clear()
        last[0] = SoftCall()

    def weaken(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index - 1 in thresholds.after:
                view: TokenView = call["view"]
                left = call.get("left", view.valid)
                mask = watch.soft(dataclasses.replace(view, valid=left), thresholds, temperature)
                # what has left before keeps the weight that it has
                mask = torch.where(left, mask, view.valid.to(mask.dtype))
                call["product"] = call.get("product", 1.0) * mask.detach()
                call["left"] = view.valid & (call["product"] > 0.5)
                last[0].masks.append(mask)
                last[0].valid = view.valid
                hidden = args[0] if args else kwargs["hidden_states"]
                bias = torch.zeros(hidden.shape[:2], device=hidden.device)
                # padding of the V axis points at columns of others and adds nothing
                amount = torch.log(mask + _EPSILON).masked_fill(~view.valid, 0.0)
                call["bias"] = call.get("bias", 0.0) + bias.scatter_add(1, call["column"], amount)
            if "bias" not in call:
                return None
            return args, {**kwargs, "attention_mask": _with(kwargs.get("attention_mask"), call["bias"], args, kwargs)}

        return hook

    with contextlib.ExitStack() as stack:
        decoder: Any = model.get_decoder()
        stack.enter_context(vtprune.prune(model, watch))
        stack.callback(decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for index, layer in enumerate(decoder.layers):
            # behind the session's own hook on the layer, which runs the module in front of it
            stack.callback(layer.register_forward_pre_hook(weaken(index), with_kwargs=True).remove)
        yield lambda: last[0]


def _without(view: AttentionView, gone: Tensor) -> AttentionView:
    """The view with some of its visual tokens hidden as keys and as queries; `gone` is [B, V]."""
    keys = view.key.shape[2]
    hidden = torch.zeros(gone.shape[0], keys, dtype=torch.bool, device=gone.device)
    hidden = hidden.int().scatter_add(1, view.column, gone.int()).bool()
    real = torch.ones_like(hidden) if view.real is None else view.real
    real = real & ~(hidden if real.dim() == 2 else hidden[:, None])
    return dataclasses.replace(view, real=real, valid=view.valid & ~gone)


def _with(mask: Tensor | None, bias: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """[B, 1, N, N] the host's mask with the bias [B, N] of the keys."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if mask is None:
        length = hidden.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask.dtype == torch.bool:
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask + bias[:, None, None, :].to(hidden.dtype)
