"""Trains the relevance net: label once what the model's answers depend on, then fit the net to that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vtprune
from vtprune.contract import TokenView, top_k_mask
from vtprune.errors import InputError
from vtprune.predictors import Fingerprint, RelevanceNet
from vtprune.scorers.relevance import Relevance
from vtprune.train.data import Example
from vtprune.train.encoding import Encoded, encode
from vtprune.train.loop import LoopConfig, LoopResult, own_seed, settings_of, train_loop
from vtprune.train.processes import save_from_main
from vtprune.train.relevance_labels import Of, relevance_labels, relevance_loss, relevance_target
from vtprune.train.store import label

if TYPE_CHECKING:
    from vtprune.progress import Progress

__all__ = ["RelevanceConfig", "net_inputs", "train_relevance"]

# samples whose held-out loss is computed at once
_CHUNK = 256


@dataclass(frozen=True)
class RelevanceConfig:
    """What to train. The paper gives channels, Adam, batch and epochs (arXiv 2506.01097); the rest is open.

    Attributes:
        channels, kernel: of the net, see `RelevanceNet`.
        of, end: what is labelled, see `relevance_labels`.
        label_batch: samples that are labelled together; memory grows with it.
        loop: of the fit; without weight decay AdamW is Adam.

    Raises:
        InputError: if a value is out of range.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    kernel: int = 5
    of: Of = "log_prob"
    end: bool = False
    label_batch: int = 8
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(epochs=100, batch_size=128, lr=5e-3, weight_decay=0.0, patience=20)
    )

    def __post_init__(self) -> None:
        channels: Any = self.channels
        if not isinstance(channels, tuple) or not channels or any(type(c) is not int or c < 1 for c in channels):
            raise InputError(f"channels must be ints >= 1, one a layer, got {channels!r}.")
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel must be an odd int >= 1, got {self.kernel!r}.")
        if self.of not in get_args(Of):
            raise InputError(f"of must be one of {', '.join(get_args(Of))}, got {self.of!r}.")
        if not isinstance(self.end, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"end must be True or False, got {self.end!r}.")
        if type(self.label_batch) is not int or self.label_batch < 1:
            raise InputError(f"label_batch must be an int >= 1, got {self.label_batch!r}.")


@dataclass(frozen=True)
class _Recorder(Relevance):
    """Scores by what the net would read: training sees what inference sees."""

    @property
    def needs_weights(self) -> bool:
        """See `LearnedScorer`."""
        return False

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention."""
        return view.memory["attention"]


@torch.no_grad()
def net_inputs(model: Any, prompts: Encoded) -> list[Tensor]:
    """[V] of each prompt: what the net reads of it, fp32."""
    with vtprune.prune(model, _Recorder(), 1, record_scores=True) as session:
        model(**prompts.inputs, use_cache=False)
    kept = session.report.kept
    if not kept or kept[0].scores is None:
        # no prompt has two visual tokens, so there was nothing to choose
        return [torch.ones(count) for count in session.report.visual_tokens]
    return list(kept[0].scores)


@dataclass(frozen=True)
class _Samples:
    """Inputs and targets [n, V] of a net, padded at the end, on its device."""

    attention: Tensor
    target: Tensor
    valid: Tensor

    def losses(self, net: RelevanceNet, places: Sequence[int] | slice) -> Tensor:
        """Divergence of each of these samples."""
        return relevance_loss(net(self.attention[places], self.valid[places]), self.target[places])

    def figures(self, net: RelevanceNet) -> dict[str, float]:
        """Mean divergence, that of a guess that all tokens matter alike, and what the net's best quarter holds."""
        losses, held = [], []
        quarter = (self.valid.sum(1) / 4).ceil().long()
        for at in range(0, len(self.target), _CHUNK):
            part = slice(at, at + _CHUNK)
            logits, target = net(self.attention[part], self.valid[part]), self.target[part]
            losses.append(relevance_loss(logits, target))
            held.append((target * top_k_mask(logits, quarter[part], self.valid[part])).sum(1))
        flat = torch.zeros_like(self.target).masked_fill(~self.valid, float("-inf"))
        return {
            "loss": torch.cat(losses).mean().item(),
            "uniform": relevance_loss(flat, self.target).mean().item(),
            "quarter": torch.cat(held).mean().item(),
        }


def train_relevance(
    model: Any,
    processor: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    config: RelevanceConfig,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoopResult:
    """Label, fit, and write the best net to `out` (labels and state to `out/run`); goes on where it was interrupted.

    Only what the model answers correctly is learned from, and only prompts of two visual tokens or more.

    Args:
        model: frozen, in eval mode, not pruned.
        processor: of the model.
        train, held_out: examples, see `read_data`.
        out: folder that `Relevance(weights=...)` takes.
        config: what to train.
        progress: told of the steps.
        dtype: of the weights that are written.

    Returns:
        how the fit went; `held_out_loss` is the mean divergence in nats of the predicted relevance from the target,
        `held_out_uniform` that of a guess that all tokens matter alike, `held_out_quarter` the share of the target that
        lies on the net's best quarter of the tokens.

    Raises:
        InputError: if the model answers none of the training or of the held-out questions correctly, or the folder
            holds a run with other settings.
        UnsupportedModelError: if the model does not hand out the attention of its layers.
    """
    fingerprint = Fingerprint.of(model).to_dict()
    labelled = {"model": fingerprint, "dtype": str(model.dtype), "of": config.of, "end": config.end}
    fit, check = (
        _samples(model, processor, part, out / "run" / "labels", labelled, config, progress)
        for part in (train, held_out)
    )
    with own_seed(config.loop.seed):
        net = RelevanceNet(fingerprint, config.channels, config.kernel)
    net.to(model.device)
    keys = json.dumps([[example.key for example in part] for part in (train, held_out)])
    kept = {name: value for name, value in settings_of(config).items() if name != "label_batch"}
    result = train_loop(
        net,
        len(fit.target),
        lambda places: fit.losses(net, list(places)).mean(),
        lambda: check.figures(net),
        config.loop,
        out / "run",
        settings={**labelled, "config": kept, "data": hashlib.sha256(keys.encode()).hexdigest()},
        progress=progress,
    )
    save_from_main(net, out, dtype)
    return result


def _samples(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    folder: Path,
    settings: dict[str, Any],
    config: RelevanceConfig,
    progress: Progress | None,
) -> _Samples:
    def make(batch: list[Example]) -> dict[str, Tensor | list[Tensor]]:
        attention = net_inputs(model, encode(processor, batch, model.device, answers=False, dtype=model.dtype))
        both = encode(processor, batch, model.device, answers=True, dtype=model.dtype)
        if both.answer is None:
            raise InputError("the batch was encoded without answers.")
        found = relevance_labels(model, both.inputs, both.answer, of=config.of, end=config.end)
        rows = [row[valid] for row, valid in zip(found.relevance, found.valid, strict=True)]
        return {"attention": attention, "relevance": rows, "correct": found.correct}

    labels = label(examples, config.label_batch, make, folder, settings=settings, progress=progress)
    rows = list(zip(labels["correct"], labels["attention"], labels["relevance"], strict=True))
    usable = [(read, relevance) for correct, read, relevance in rows if bool(correct) and len(relevance) > 1]
    if not usable:
        raise InputError(
            f"the model gives none of {len(examples)} answers by itself ({examples[0].question!r}: "
            f"{examples[0].answer!r}), and only those that it gives can be explained. Pass questions that it can "
            "answer, answered in its own words."
        )
    lengths = torch.tensor([len(relevance) for _, relevance in usable])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    read, relevance = (pad_sequence(list(part), batch_first=True) for part in zip(*usable, strict=True))
    return _Samples(*(part.to(model.device) for part in (read, relevance_target(relevance, valid), valid)))
