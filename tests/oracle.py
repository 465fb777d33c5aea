"""The masked oracle: the unpruned model in which dropped tokens are hidden as keys from the layer at which they left.

Written independently of vtprune's engine: it knows only the indices in a report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from models import IMAGE
from torch import Tensor, nn

from vtprune import Plan, Report


def hidden_keys(
    report: Report, input_ids: Tensor, layers: int, visual: Tensor | None = None, real: Tensor | None = None
) -> list[Tensor]:
    """For each decoder layer, [B, N] True at prompt positions that it must not see.

    Args:
        report: of the pruned run.
        input_ids: [B, N] of the prompt.
        layers: of the decoder.
        visual: [B, N] True at visual tokens; None finds them.
        real: [B, N] the attention mask, if there is padding.
    """
    visual = input_ids == IMAGE if visual is None else visual
    result = [torch.zeros_like(visual) for _ in range(layers)]
    for record in report.kept:
        first = record.site.index if record.site.kind == "layer" else 0
        for b, kept in enumerate(record.indices):
            positions = visual[b].nonzero()[:, 0]
            gone = torch.ones(len(positions), dtype=torch.bool)
            gone[kept] = False
            for layer in range(first, layers):
                result[layer][b, positions[gone]] = True
            if record.text is not None:
                text = (~visual[b] if real is None else ~visual[b] & real[b].bool()).nonzero()[:, 0]
                lost = torch.ones(len(text), dtype=torch.bool)
                lost[record.text[b]] = False
                for layer in range(first, layers):
                    result[layer][b, text[lost]] = True
    return result


@contextmanager
def masked(model: nn.Module, hidden: list[Tensor], features: Tensor | None = None) -> Iterator[None]:
    """Hide prompt positions from each decoder layer; optionally replace the image features.

    Args:
        model: a LLaVA.
        hidden: [B, N] a layer, from `hidden_keys`.
        features: what the projector shall return.
    """
    handles = []

    def hook(layer: int):
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            states, cache = args[0], kwargs.get("past_key_values")
            rows, queries = states.shape[:2]
            past = 0 if cache is None else cache.get_seq_length(layer)
            keys = past + queries
            gone = hidden[layer].repeat_interleave(rows // hidden[layer].shape[0], 0)
            see = torch.ones(rows, keys, dtype=torch.bool)
            see[:, : gone.shape[1]] = ~gone[:, :keys]
            mask = kwargs.get("attention_mask")
            if mask is None:
                full = torch.ones(queries, keys, dtype=torch.bool)
                if getattr(module.self_attn, "is_causal", True):
                    full = full.tril(keys - queries)
                full = full[None, None].expand(rows, 1, -1, -1)
            else:
                full = mask if mask.dtype == torch.bool else mask == 0
            # a sliding cache has forgotten the first keys
            full = full & see[:, None, None, -full.shape[-1] :]
            full = full | ~full.any(-1, keepdim=True)  # rows of hidden or padded queries must stay finite
            if model.config.text_config._attn_implementation == "eager":
                full = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": full}

        return pre

    root = model.model
    text = root.language_model if hasattr(root, "language_model") else root.text_model
    for i, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(hook(i), with_kwargs=True))
    if features is not None:
        handles.append(root.multi_modal_projector.register_forward_hook(lambda m, a, out: features))
    try:
        yield
    finally:
        for handle in handles:
            with suppress(KeyError):
                handle.remove()


def same_scores(got: Any, want: Any) -> None:
    """The logits of every step of two `generate` calls are equal but for rounding, where they are not suppressed."""
    for mine, theirs in zip(got.scores, want.scores, strict=True):
        finite = theirs.isfinite()
        torch.testing.assert_close(mine[finite], theirs[finite], atol=1e-5, rtol=1e-5)


@contextmanager
def renumbered(model: nn.Module, plan: Plan, hidden: list[Tensor]) -> Iterator[None]:
    """Rotary angles of the sequence closed up at each stage with compact positions; nothing where no stage has them.

    Args:
        model: any with a decoder of plain rotary positions.
        plan: says where.
        hidden: [B, N] a layer, from `hidden_keys`.
    """
    root, handles = model.model, []
    text = root.language_model if hasattr(root, "language_model") else root.text_model
    for stage in plan.stages:
        if stage.positions == "compact":
            gone = hidden[stage.site.index]

            def close(module: nn.Module, args: tuple, kwargs: dict, gone: Tensor = gone) -> tuple:
                position = kwargs["position_ids"]
                mine = gone.repeat_interleave(args[0].shape[0] // gone.shape[0], 0)
                shift = mine.cumsum(1) if position.shape[1] == mine.shape[1] else mine.sum(1, keepdim=True)
                return args, {**kwargs, "position_embeddings": text.rotary_emb(args[0], position_ids=position - shift)}

            for layer in text.layers[stage.site.index :]:
                handles.append(layer.register_forward_pre_hook(close, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tower_hidden(report: Report, blocks: int) -> list[list[Tensor]]:
    """For each tower block, for each image (one a sample), [N] True at patches that it must not see."""
    samples = [n for n in report.visual_tokens if n]
    result = [[torch.zeros(n, dtype=torch.bool) for n in samples] for _ in range(blocks)]
    for record in report.kept:
        if record.site.kind != "vision":
            continue
        with_image = [i for i, n in zip(record.indices, report.visual_tokens, strict=True) if n]
        for image, kept in enumerate(with_image):
            gone = torch.ones(samples[image], dtype=torch.bool)
            gone[kept] = False
            for block in range(record.site.index + 1, blocks):
                result[block][image] |= gone
    return result


def tower_features(model: nn.Module, pixels: Tensor, hidden: list[list[Tensor]], has_cls: bool) -> Tensor:
    """[images, N, D] projected features of the unpruned tower with patches hidden as keys."""
    handles = []

    def hook(block: int):
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            gone = torch.stack(hidden[block])
            if has_cls:
                gone = torch.cat([torch.zeros(len(gone), 1, dtype=torch.bool), gone], 1)
            mask = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)
            return (args[0], mask[:, None, None].expand(-1, 1, gone.shape[1], -1), *args[2:]), kwargs

        return pre

    for i, block in enumerate(model.model.vision_tower.encoder.layers):
        handles.append(block.register_forward_pre_hook(hook(i), with_kwargs=True))
    try:
        return torch.stack(list(model.get_image_features(pixels).pooler_output))
    finally:
        for handle in handles:
            handle.remove()
