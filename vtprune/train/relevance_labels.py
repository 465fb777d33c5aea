"""Which visual tokens an answer depends on: attention of all layers, weighted by its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import vtprune
from vtprune.contract import top_k_mask
from vtprune.errors import InputError, UnsupportedModelError

__all__ = ["Of", "RelevanceLabels", "relevance_labels", "relevance_loss", "relevance_target", "relevant_row"]

Of = Literal["log_prob", "logit"]


@dataclass(frozen=True)
class RelevanceLabels:
    """What the full model's answers depend on.

    Attributes:
        relevance: [B, V] fp32, of each visual token, not negative.
        valid: [B, V] False at padding of the V axis, which lies at the end.
        correct: [B] whether the model would have given this answer itself.
    """

    relevance: Tensor
    valid: Tensor
    correct: Tensor


def relevance_labels(
    model: Any, inputs: Mapping[str, Tensor], answer: Tensor, *, of: Of = "log_prob", end: bool = False
) -> RelevanceLabels:
    """Relevance of each visual token to a given answer (the labels of arXiv 2506.01097).

    For each answer token: R = I, then R <- R + mean_h [A * dA]+ R from the first layer to the last, A the layer's
    attention and dA the gradient of the token's score by it. Relevance is the row of R from which the token is
    predicted, at the visual tokens; the mean over the tokens. Only that row is computed, from the last layer down. The
    answer is forced, and causality makes one forward serve all its tokens; there is a backward for each of them.
    The paper does not say of what the gradient is taken, nor whether the token that ends the answer counts.

    Args:
        model: a model that `vtprune.prune` takes, in eval mode, not pruned. It is left as it was; weights get no
            gradients. While this runs it attends eagerly, and holds the attention of all decoder layers.
        inputs: for `model(**inputs)`; `input_ids` [B, N] with the answers behind the prompts.
        answer: [B, N] bool, True at the answer's tokens and at the one that ends it.
        of: the score: log-probability or logit.
        end: the last token of the answer, which ends it, is explained too.

    Raises:
        InputError: if an answer is empty or begins the sequence, `of` is not known, or the model is in train mode.
        SessionError: if the model is pruned.
        UnsupportedModelError: if the model does not hand out the attention of its layers, or text sees what follows it.
    """
    if of not in get_args(Of):
        raise InputError(f"of must be one of {', '.join(get_args(Of))}, got {of!r}.")
    if model.training:
        raise InputError("relevance is measured in eval mode, where nothing is dropped at random; call model.eval().")
    counts = answer.sum(1)
    if bool((counts < 1 + (not end)).any()) or bool(answer[:, 0].any()):
        raise InputError(
            f"every answer needs {1 + (not end)} token(s) or more behind its prompt, got {counts.tolist()} of them."
        )
    ids = inputs["input_ids"]
    first = int(answer.any(0).nonzero()[0]) - 1  # what no answer needs has no logits
    with vtprune.prune(model, "uniform", 1.0) as session, _explainable(model), torch.enable_grad():
        out = model(**inputs, use_cache=False, output_attentions=True, logits_to_keep=ids.shape[1] - first)
        layout = session.report.layout
        attentions = _checked(out.attentions, vtprune.geometry(model).layers)
        _check_causal(attentions, inputs.get("attention_mask"), first)
        logits = out.logits.float()
        wanted = ids[:, first + 1 :].to(logits.device)
        asked = answer[:, first + 1 :].to(logits.device)
        correct = ((logits[:, :-1].argmax(-1) == wanted) | ~asked).all(1)
        scores = (logits[:, :-1] if of == "logit" else logits[:, :-1].log_softmax(-1)).gather(2, wanted[..., None])
        rows = _mean_row(scores[..., 0], asked if end else asked & ~_last(asked), attentions, first)
    if layout is None:
        raise UnsupportedModelError(f"{type(model).__name__} does not say where its visual tokens are.")
    position, valid = layout.position.to(rows.device), layout.valid.to(rows.device)
    return RelevanceLabels(rows.gather(1, position).masked_fill(~valid, 0.0), valid, correct)


def relevant_row(attentions: Sequence[Tensor], gradients: Sequence[Tensor], row: Tensor) -> Tensor:
    """Row of R: [B, N] one-hot at the row -> [B, N], fp32.

    Args:
        attentions: [B, H, N, N] of each layer, the first one first.
        gradients: of a score by them.
        row: where the score is read.
    """
    result = row.float()
    for weights, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        flow = (weights.detach().float() * gradient.float()).clamp_(min=0.0)
        # head by head, then their mean: a row times each map is smaller than the mean of the maps
        through = (result.to(flow.device)[:, None, None] @ flow)[:, :, 0].mean(1)
        result = result + through.to(result.device)
    return result


def _mean_row(scores: Tensor, asked: Tensor, attentions: Sequence[Tensor], first: int) -> Tensor:
    """Mean relevance over the answer tokens that are `asked`.

    Args:
        scores: [B, T] of the token behind each of the positions from `first` on.
        asked: [B, T] those that count.
        attentions: of each layer, in the graph of `scores`.
        first: position.

    Returns:
        [B, N] fp32.
    """
    total = torch.zeros(scores.shape[0], attentions[0].shape[-1], device=scores.device)
    ordinal = asked.cumsum(1)
    steps = int(ordinal.max())
    for step in range(1, steps + 1):
        # of every sample its own token; samples do not meet, so one backward serves all
        mine = asked & (ordinal == step)
        gradients = torch.autograd.grad(scores[mine].sum(), attentions, retain_graph=step < steps)
        row = torch.zeros_like(total)
        row[:, first : first + mine.shape[1]] = mine.float()
        total += relevant_row(attentions, gradients, row)
    return total / asked.sum(1, keepdim=True)


def _last(asked: Tensor) -> Tensor:
    """[B, T] True at the last asked token of each row."""
    ordinal = asked.cumsum(1)
    return asked & (ordinal == ordinal[:, -1:])


def _checked(attentions: Any, layers: int) -> Sequence[Tensor]:
    given = list(attentions or ())
    if len(given) != layers or any(weights is None or not weights.requires_grad for weights in given):
        raise UnsupportedModelError(
            f"the model handed out the attention of {len(given)} of its {layers} decoder layers, or cut off its "
            "gradients; relevance needs all of them (output_attentions=True under eager attention)."
        )
    return given


@torch.no_grad()
def _check_causal(attentions: Sequence[Tensor], mask: Tensor | None, first: int) -> None:
    """Refuse if a token sees the answer before its turn: then nobody predicted anything."""
    for weights in attentions:
        length = weights.shape[-1]
        row, column = torch.arange(length)[:, None], torch.arange(first + 1, length)
        early = (row < column).to(weights.device).expand(weights.shape[0], -1, -1)
        if mask is not None:
            # rows of padding see nothing, which softmax makes everything
            early = early & mask[:, :, None].bool().to(weights.device)
        if bool((weights[..., first + 1 :] * early[:, None]).any()):
            raise UnsupportedModelError(
                "tokens of this model see the answer that is forced behind the prompt before it is their turn "
                "(attention in both directions over the whole prompt), so what it depends on cannot be told."
            )


@contextmanager
def _explainable(model: Any) -> Iterator[None]:
    """Eager attention whose gradients are kept, while weights get none; all is put back."""
    before = list(_attention_backends(model.config)) + [
        pair
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
        for pair in _attention_backends(module.config)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # with frozen weights nothing else would ask for a graph; a copy, because hosts write image features into it
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_().clone()
    )
    try:
        model.set_attn_implementation("eager")
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for config, backend in before:
            # from the outside in: setting one sets those inside it
            config._attn_implementation = backend


def _attention_backends(config: Any) -> Iterator[tuple[Any, Any]]:
    yield config, config._attn_implementation
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _attention_backends(inner)


def relevance_target(relevance: Tensor, valid: Tensor) -> Tensor:
    """What a net learns: the lowest floor(V / 2) tokens get 0, of equal ones the later; the others share 1.

    Args:
        relevance: [B, V], not negative.
        valid: [B, V].

    Returns:
        [B, V] fp32, rows sum to 1; a sample whose tokens all have relevance 0 is shared evenly.
    """
    counts = valid.sum(1)
    best = top_k_mask(relevance, counts - counts // 2, valid)
    kept = relevance.float().masked_fill(~best, 0.0)
    kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, best.float())
    return kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def relevance_loss(logits: Tensor, target: Tensor) -> Tensor:
    """[B] Kullback-Leibler divergence of the predicted relevance (the softmax of the logits) from the target, in nats.

    Args:
        logits: [B, V], -inf at padding.
        target: [B, V], 0 there.
    """
    predicted = logits.log_softmax(1).masked_fill(target == 0, 0.0)
    return (torch.xlogy(target, target) - target * predicted).sum(1)
