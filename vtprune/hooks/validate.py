"""Everything that can be refused, refused before a hook is added or the decoder runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vtprune.budget import Geometry
from vtprune.contract import Scorer
from vtprune.errors import InputError, PlanError, UnsupportedModelError
from vtprune.hooks.families.base import Prompt
from vtprune.plan import Plan, Stage
from vtprune.views import PROMPT_ROWS

__all__ = [
    "asked_layers",
    "check_call",
    "check_counts",
    "check_drafts",
    "check_plan",
    "watched_blocks",
    "watched_transitions",
]


def check_plan(plan: Plan, geometry: Geometry) -> None:
    """Check that every stage can run on a model of this geometry.

    Raises:
        PlanError: if a site lies outside the model, or a scorer needs a signal that its site cannot give.
        UnsupportedModelError: if the plan cuts in a tower that the family does not open.
    """
    for stage in plan.stages:
        site, scorer = stage.site, stage.scorer
        if stage.positions == "compact" and geometry.rotary_axes > 1:
            raise PlanError(
                f"positions='compact' has no meaning with rotary positions of {geometry.rotary_axes} axes (time, row, "
                "column): a row that is closed up would move other rows of the image. Use positions='keep'."
            )
        if stage.positions == "compact" and geometry.windows:
            raise PlanError(
                "positions='compact' has no meaning where layers have sliding windows: a sequence that is closed up "
                "would bring far tokens back into them. Use positions='keep'."
            )
        merger = scorer.name if stage.rules[1] is None else f"{scorer.name}/{stage.rules[1].name}"
        early = site.kind != "layer" or site.index < geometry.deepstack
        if stage.merges and early and geometry.deepstack:
            raise PlanError(
                f"{merger} merges tokens at {site}, but this model adds visual features again until after layer "
                f"{geometry.deepstack - 1} (DeepStack), which a merged token would miss. Merge at "
                f"layer[{geometry.deepstack}] or later, or use a method that drops."
            )
        if site.kind in ("restart", "layer") and site.index >= geometry.layers:
            raise PlanError(f"{site} is outside the decoder, which has layers 0 to {geometry.layers - 1}.")
        if site.kind == "vision":
            if geometry.vision is None:
                raise UnsupportedModelError(f"family {geometry.family!r} has no vision stages, got {site}.")
            last = geometry.vision.feature_block
            if site.index > last:
                raise PlanError(
                    f"{site} is too late: the projector reads block {last}, so the last cut is vision[{last}]."
                )
        if scorer.reads_attention and site.kind == "input":
            raise PlanError(f"{scorer.name} reads attention, which does not exist yet at 'input'; use 'layer[k]'.")
        if scorer.queries in ("cls", "mean") and site.kind in ("restart", "layer"):
            raise PlanError(f"{scorer.name} reads the {scorer.queries!r} query of a tower; it cannot cut at {site}.")
        if (scorer.reads_text or scorer.queries in PROMPT_ROWS) and site.kind == "vision":
            raise PlanError(f"{scorer.name} reads the prompt; it cannot cut at {site}, where only images are known.")
        if scorer.reads_input and site.kind != "layer":
            raise PlanError(f"{scorer.name} reads what enters the decoder; it cannot cut at {site}, use 'layer[k]'.")
        if scorer.reads_transitions and site.kind != "layer":
            raise PlanError(f"{scorer.name} reads what decoder layers do; it cannot cut at {site}, use 'layer[k]'.")
        if scorer.reads_frames and site.kind == "vision":
            raise PlanError(
                f"{scorer.name} compares the frames of a film; it cannot cut at {site}, where each frame is alone. Use "
                "'input' or 'layer[k]'."
            )
        if site.kind == "restart" and not scorer.reads_attention:
            raise PlanError(
                f"{scorer.name} reads no attention, so there is nothing to ask layer {site.index} at {site}; use "
                "'input' or 'layer[k]'."
            )


def watched_blocks(plan: Plan, kind: str) -> dict[int, list[Scorer]]:
    """Which scorers observe which blocks of the tower ("vision") or the decoder ("layer")."""
    return _watched(s for s in plan.at(kind) if s.scorer.reads_attention and not s.scorer.ahead)


def watched_transitions(plan: Plan) -> dict[int, list[Scorer]]:
    """Which scorers observe what the sublayers of which decoder layers do."""
    return _watched(s for s in plan.at("layer") if s.scorer.reads_transitions)


def _watched(stages: Iterable[Stage]) -> dict[int, list[Scorer]]:
    watched: dict[int, list[Scorer]] = {}
    for stage in stages:
        for block in stage.scorer.watches(stage.site):
            scorers = watched.setdefault(block, [])
            # stages of one method share one memory, so one of them observes each block
            if stage.scorer.name not in {s.name for s in scorers}:
                scorers.append(stage.scorer)
    return watched


def asked_layers(plan: Plan) -> set[int]:
    """Decoder layers that are asked about a cut before they run: by a restart, or by a scorer that looks ahead."""
    return {s.site.index for s in plan.stages if s.site.kind == "restart" or s.looks_ahead}


def check_counts(prompt: Prompt, tower_stages: Sequence[Stage]) -> None:
    """Check that the tower, which knows no prompts, can keep so many tokens a prompt.

    Raises:
        InputError: with what to pass instead.
    """
    counted = [s for s in tower_stages if isinstance(s.keep, int)]
    if counted and prompt.carried != sum(n > 0 for n in prompt.counts):
        raise InputError(
            f"keep={counted[-1].keep} counts tokens a sample, but the tower cuts before it is known which of the "
            f"{prompt.carried} images belong to which of the {len(prompt.counts)} prompts. With several images a "
            "prompt (tiles and crops that are images to the model too), pass a fraction, such as keep=0.25."
        )


def check_call(root: nn.Module, prompt: Prompt, real: Tensor, plans: Sequence[Plan]) -> None:
    """Check that this call can be pruned exactly; `real` [B, N] is False at padding.

    Raises:
        InputError: with what was given and what to do instead.
    """
    mask, cache = prompt.attention_mask, prompt.cache
    if cache is not None and getattr(cache, "is_compileable", False):
        raise InputError(
            f"the cache is a {type(cache).__name__}, whose layers have one fixed length; pruning needs a DynamicCache "
            "(leave cache_implementation unset)."
        )
    if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
        got = f"a mask for each of {sorted(mask)}" if isinstance(mask, dict) else f"shape {tuple(mask.shape)}"
        raise InputError(
            f"attention_mask must be 2-D [batch, length], got {got}. A mask with more axes is tied to the unpruned "
            "length; pass the 2-D mask."
        )
    if prompt.visual is not None:
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1, keepdim=True)
        ends = (prompt.visual & real).gather(1, last)[:, 0]
        if bool(ends.any()):
            raise InputError(
                f"the prompt of sample {int(ends.nonzero()[0, 0])} ends with a visual token, from which the answer "
                "would be read; pruning may drop it. Put text behind the last image (the model's chat template does)."
            )
    if root.training and any(getattr(m, "gradient_checkpointing", False) for m in root.modules()):
        raise InputError(
            "activation (gradient) checkpointing runs layers a second time, when this call's pruning is gone. Call "
            "model.activation_checkpointing_disable() (gradient_checkpointing_disable() in older releases) to train "
            "with pruning."
        )
    if len({tuple(s.site for s in p.stages) for p in plans}) > 1:
        raise PlanError("the plans of the samples have different sites; a batch needs one plan.")


def check_drafts(plan: Plan, wanted: int) -> None:
    """Refuse a prompt that comes with draft tokens behind it, if a scorer reads the prompt.

    Assisted and prompt-lookup decoding send the first drafts together with the prompt and ask for the logits of all of
    them; a scorer that reads the prompt's text would read a draft, and the kept set would depend on it.

    Raises:
        InputError: naming the methods that read the prompt.
    """
    readers = sorted(
        {
            s.scorer.name
            for s in plan.stages
            # transitions are weighed against those of all tokens of the call, drafts too
            if s.scorer.reads_prompt
            or s.scorer.reads_text
            or s.scorer.reads_input
            or s.scorer.reads_transitions
            or (s.scorer.reads_attention and s.scorer.queries in PROMPT_ROWS)
        }
    )
    if readers:
        raise InputError(
            f"logits_to_keep={wanted} on a prompt: assisted decoding sends draft tokens behind it, and "
            f"{', '.join(readers)} would read a draft as part of the prompt. Generate without an assistant, or use "
            "a method that does not read the prompt; to get several logits yourself, pass logits_to_keep=0 and slice."
        )
