"""Training of the relevance net: label once what the model's answers depend on, then fit the net to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vtprune
from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import InputError
from vtprune.plan import Plan
from vtprune.predictors import Fingerprint, RelevanceNet
from vtprune.train.config import LoopConfig
from vtprune.train.encoding import encode
from vtprune.train.loop import train_loop
from vtprune.train.processes import new_accelerator
from vtprune.train.relevance_labels import Of, relevance_labels, relevance_loss, relevance_target
from vtprune.train.store import label

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vtprune.progress import Progress
    from vtprune.train.data import Example

__all__ = ["RelevanceConfig", "RelevanceResult", "train_relevance"]

# samples whose held-out loss is computed at once
_CHUNK = 256


@dataclass(frozen=True)
class RelevanceConfig:
    """How a relevance net is made. The paper gives channels, Adam, batch and epochs; the rest is open.

    Attributes:
        channels, kernel: of the net, see `RelevanceNet`.
        of, end: what is labelled, see `relevance_labels`.
        label_batch: samples that are labelled together; memory grows with it.
        loop: of the fit.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    kernel: int = 5
    of: Of = "log_prob"
    end: bool = False
    label_batch: int = 8
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(epochs=100, batch_size=128, lr=1e-3, weight_decay=0.0, patience=10)
    )


@dataclass(frozen=True)
class RelevanceResult:
    """What came out; divergences are held-out means in nats.

    Attributes:
        loss: divergence of the net with the weights that were stored.
        untrained, uniform: of the net before training, and of a guess that all tokens matter alike.
        epoch: after which the stored weights were reached.
        train_size, held_out_size: samples that were used: those that the model answers correctly.
        train_asked, held_out_asked: samples that were given.
    """

    loss: float
    untrained: float
    uniform: float
    epoch: int
    train_size: int
    held_out_size: int
    train_asked: int
    held_out_asked: int


@dataclass(frozen=True)
class _Recorder(Scorer):
    """Runs where a method runs, and scores by what its net would read."""

    name: ClassVar[str] = "relevance-input"
    queries: ClassVar[Queries | None] = "instruction"

    method: Scorer = field(default_factory=lambda: METHODS["relevance"]())

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        return self.method.observe(view, memory)

    def score(self, view: TokenView) -> Tensor:
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        stages = self.method.plan(geometry, budget).stages
        return Plan(tuple(dataclasses.replace(stage, scorer=self) for stage in stages))


@dataclass(frozen=True)
class _Samples:
    """Inputs and targets [n, V] of a net, padded at the end, on its device."""

    attention: Tensor
    target: Tensor
    valid: Tensor
    asked: int

    def losses(self, net: RelevanceNet, places: Sequence[int] | slice) -> Tensor:
        """Divergence of each of these samples."""
        return relevance_loss(net(self.attention[places], self.valid[places]), self.target[places])

    def mean_loss(self, net: RelevanceNet) -> float:
        """Of all samples."""
        parts = [self.losses(net, slice(at, at + _CHUNK)) for at in range(0, len(self.target), _CHUNK)]
        return torch.cat(parts).mean().item()

    def uniform_loss(self) -> float:
        """Of a guess that all tokens of a sample matter alike."""
        flat = torch.zeros_like(self.target).masked_fill(~self.valid, float("-inf"))
        return relevance_loss(flat, self.target).mean().item()


def train_relevance(
    model: Any,
    processor: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    config: RelevanceConfig | None = None,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
) -> RelevanceResult:
    """Make a net for `vtprune.prune(model, f"relevance(weights='{out}')", ...)`. The model itself is not changed.

    Labels, the expensive part, and the fit are kept in folders below `out`: run again with the same arguments, an
    interrupted run goes on.

    Args:
        model: a model that `vtprune.prune` takes, in eval mode, not pruned.
        processor: of the model.
        train, held_out: questions with answers, on different images.
        out: folder of the checkpoint; `labels/` and `run/` below it.
        config: see there.
        progress: told of the steps.
        accelerator: of this process; a new one if None.

    Raises:
        InputError: if the model answers none of the training or of the held-out questions, or `out/run` holds a run
            with other settings.
        UnsupportedModelError: if the model does not hand out the attention of its layers.
    """
    config, out = config or RelevanceConfig(), Path(out)
    accelerator = accelerator or new_accelerator()
    fingerprint = Fingerprint.of(model).to_dict()
    labelled = {"model": fingerprint, "dtype": str(model.dtype), "of": config.of, "end": config.end}
    parts = [
        _labelled(model, processor, part, out / "labels" / name, labelled, config, progress, accelerator)
        for name, part in (("train", train), ("held-out", held_out))
    ]
    fit, check = parts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)
        net = RelevanceNet(fingerprint, config.channels, config.kernel)
    net.to(model.device)
    keys = json.dumps([[example.key for example in part] for part in (train, held_out)])
    result = train_loop(
        net,
        len(fit.target),
        lambda places: fit.losses(net, list(places)).mean(),
        lambda: check.mean_loss(net),
        config.loop,
        out / "run",
        settings={**labelled, "data": hashlib.sha256(keys.encode()).hexdigest(), "kernel": config.kernel},
        progress=progress,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        net.save_pretrained(out)
    accelerator.wait_for_everyone()
    return RelevanceResult(
        loss=result.best_loss,
        untrained=result.history[0]["held_out_loss"],
        uniform=check.uniform_loss(),
        epoch=result.best_epoch,
        train_size=len(fit.target),
        held_out_size=len(check.target),
        train_asked=fit.asked,
        held_out_asked=check.asked,
    )


def _labelled(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    folder: Path,
    settings: dict[str, Any],
    config: RelevanceConfig,
    progress: Progress | None,
    accelerator: Accelerator,
) -> _Samples:
    """Samples that the model answers correctly and of whose tokens one can be chosen."""

    def relevance(batch: list[Example]) -> dict[str, Tensor | list[Tensor]]:
        encoded = encode(processor, batch, model.device, answers=True, dtype=model.dtype)
        if encoded.answer is None:
            raise InputError("answers were asked for, but the batch holds none.")
        found = relevance_labels(model, encoded.inputs, encoded.answer, of=config.of, end=config.end)
        rows = [row[valid] for row, valid in zip(found.relevance, found.valid, strict=True)]
        return {"relevance": rows, "correct": found.correct}

    def attention(batch: list[Example]) -> dict[str, Tensor | list[Tensor]]:
        # the prompt alone, as the net will see it, and by the very same path
        model(**encode(processor, batch, model.device, answers=False, dtype=model.dtype).inputs, use_cache=False)
        kept = session.report.kept
        if not kept or kept[0].scores is None:
            # no sample has two visual tokens
            return {"attention": [torch.ones(count) for count in session.report.visual_tokens]}
        return {"attention": list(kept[0].scores)}

    options: dict[str, Any] = {"settings": settings, "progress": progress, "accelerator": accelerator}
    labels = label(examples, config.label_batch, relevance, folder, **options)
    with vtprune.prune(model, _Recorder(), 1, record_scores=True) as session:
        options["settings"] = {**settings, "what": "attention"}
        inputs = label(examples, config.label_batch, attention, folder, **options)
    usable = [
        place
        for place, (correct, row) in enumerate(zip(labels["correct"], labels["relevance"], strict=True))
        if bool(correct) and len(row) > 1
    ]
    if not usable:
        raise InputError(
            f"the model answers none of {len(examples)} {folder.name} questions with the given answer, and only what "
            "it answers can be explained. Pass questions that it can answer, answered in its own words."
        )
    device = model.device
    target = pad_sequence([labels["relevance"][place] for place in usable], batch_first=True).to(device)
    lengths = torch.tensor([len(labels["relevance"][place]) for place in usable], device=device)
    valid = torch.arange(target.shape[1], device=device) < lengths[:, None]
    read = pad_sequence([inputs["attention"][place] for place in usable], batch_first=True).to(device)
    return _Samples(read, relevance_target(target, valid), valid, len(examples))
