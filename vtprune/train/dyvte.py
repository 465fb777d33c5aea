"""Trains DyVTE's exit gates: labels from the frozen model, then a gate a layer on the stored features.

A label says whether all visual tokens may leave after a layer: the answer's tokens, given the right ones before them,
are predicted as without leaving, and their loss is not much larger. Labels depend on the model alone, so they are
computed once; the gates are then fitted to them. The paper computes one random layer a step as it trains, which gives
each gate the same data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

import vtprune
from vtprune.contract import TokenView
from vtprune.errors import InputError
from vtprune.predictors import ExitGates, Fingerprint
from vtprune.scorers.dyvte import DyVTE
from vtprune.train.causal import require_causal
from vtprune.train.data import Example
from vtprune.train.encoding import Encoded, encode
from vtprune.train.loop import LoopConfig, LoopResult, own_seed, settings_of, train_loop
from vtprune.train.processes import save_from_main
from vtprune.train.replay import Replay
from vtprune.train.store import Labels, label

if TYPE_CHECKING:
    from vtprune.progress import Progress

__all__ = ["DyvteConfig", "answer_losses", "exit_labels", "exit_outcomes", "gate_features", "train_dyvte"]


@dataclass(frozen=True)
class DyvteConfig:
    """What to train.

    Attributes:
        width: of the gates; 2048 in the paper.
        read: text whose mean the gates read, see `DyVTE`.
        layers_per_example: layers that are labelled, drawn for each batch; None for all. The paper's training draws
            one.
        agree: share of the answer's tokens that must be predicted as without leaving, exclusive.
        ratio: the answer's loss may be this many times that of not leaving, exclusive.
        slack: nats that the loss may be larger besides; 0 in the paper. Small models are so sure of their answers that
            a ratio of losses near 0 says little.
        stay_weight: weight of the class "stay" in the gates' loss; 1 in the paper. Above 1 tokens leave later.
        label_batch: examples that the model labels at once.
        loop: of the fit.

    Raises:
        InputError: if a value is out of range.
    """

    width: int = 2048
    read: Literal["behind", "all"] = "behind"
    layers_per_example: int | None = 1
    agree: float = 0.99
    ratio: float = 1.03
    slack: float = 0.0
    stay_weight: float = 1.0
    label_batch: int = 16
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=4e-5, weight_decay=0.0, warmup=0.03))

    def __post_init__(self) -> None:
        for name, value, least in (("width", self.width, 1), ("label_batch", self.label_batch, 1)):
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be an int >= {least}, got {value!r}.")
        layers = self.layers_per_example
        if layers is not None and (type(layers) is not int or layers < 1):
            raise InputError(f"layers_per_example must be an int >= 1, or None for all, got {layers!r}.")
        if not 0.0 <= self.agree < 1.0 or self.ratio <= 0 or self.slack < 0 or self.stay_weight <= 0:
            raise InputError(
                "agree must be in [0, 1), ratio and stay_weight above 0 and slack >= 0, got "
                f"{self.agree}, {self.ratio}, {self.stay_weight} and {self.slack}."
            )


@dataclass(frozen=True)
class _Recorder(DyVTE):
    """Notes what every gate would read, and lets nothing leave: training sees what inference sees."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def needs_weights(self) -> bool:
        """See `DyVTE`."""
        return False

    def count(self, view: TokenView) -> Tensor:
        """[B] all."""
        self.seen.append(self.features(view))
        return view.valid.sum(1)


@torch.no_grad()
def gate_features(model: Any, prompts: Encoded, read: Literal["behind", "all"] = "behind") -> Tensor:
    """[B, L - 1, 2 D] what the gates behind the decoder layers but the last read of these prompts, fp32."""
    recorder = _Recorder(read=read)
    with vtprune.prune(model, recorder):
        model(**prompts.inputs, use_cache=False)
    return torch.stack(recorder.seen, 1)


def answer_losses(logits: Tensor, batch: Encoded) -> tuple[Tensor, list[Tensor]]:
    """How well a batch's answers are predicted, given the right tokens before each.

    Args:
        logits: [B, N, words].
        batch: encoded with answers.

    Returns:
        [B] mean cross-entropy in nats, and for each sample the most likely word at each token of its answer.
    """
    if batch.answer is None:
        raise InputError("the batch was encoded without answers.")
    before = batch.answer[:, 1:]
    losses, words = [], []
    for row, ids, there in zip(logits[:, :-1], batch.inputs["input_ids"][:, 1:], before, strict=True):
        losses.append(functional.cross_entropy(row[there].float(), ids[there]))
        words.append(row[there].argmax(1))
    return torch.stack(losses), words


@torch.no_grad()
def exit_outcomes(model: Any, batch: Encoded, layers: Sequence[int]) -> dict[str, Tensor]:
    """What becomes of the answers if all visual tokens leave behind a layer, for each of `layers`.

    Args:
        model: frozen, in eval mode, not pruned.
        batch: encoded with answers.
        layers: 0-based decoder layers.

    Returns:
        `agree` [B, len(layers)] share of the answer's tokens that are predicted as without leaving; `loss` of the same
        shape and `full` [B] mean cross-entropy of the answer with and without leaving, in nats.
    """
    agree, losses = [], []
    with Replay(model) as replay:
        with replay.recording():
            full, wanted = answer_losses(model(**batch.inputs, use_cache=False).logits, batch)
        for layer in layers:
            with vtprune.prune(model, DyVTE(exit_layer=layer)), replay.from_layer(layer):
                loss, words = answer_losses(model(**batch.inputs, use_cache=False).logits, batch)
            losses.append(loss)
            agree.append(torch.stack([(a == b).float().mean() for a, b in zip(words, wanted, strict=True)]))
    return {"agree": torch.stack(agree, 1), "loss": torch.stack(losses, 1), "full": full}


def exit_labels(outcomes: Mapping[str, Tensor], config: DyvteConfig) -> Tensor:
    """[B, layers] bool: may all visual tokens leave behind this layer? (arXiv 2411.19628, eq. 5)"""
    allowed = config.ratio * outcomes["full"][:, None] + config.slack
    return (outcomes["agree"] > config.agree) & (outcomes["loss"] < allowed)


def train_dyvte(
    model: Any,
    processor: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    config: DyvteConfig,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoopResult:
    """Label, fit, and write the best gates to `out` (labels and state to `out/run`); goes on where it was interrupted.

    Args:
        model: frozen, in eval mode, not pruned.
        processor: of the model.
        train, held_out: examples, see `read_data`.
        out: folder that `DyVTE(weights=...)` takes.
        config: what to train.
        progress: told of the steps.
        dtype: of the weights that are written.

    Raises:
        UnsupportedModelError: if the model's prompt sees the answer behind it.

    Returns:
        how the fit went; `held_out_loss` is the gates' cross-entropy, `held_out_accuracy` the share of labels they hit.
    """
    require_causal(model, encode(processor, train[:1], model.device, answers=True))
    fingerprint = Fingerprint.of(model)
    depth = fingerprint.layers - 1
    number = min(depth, config.layers_per_example or depth)
    settings = {"model": fingerprint.to_dict(), "config": settings_of(config)}
    # what labels are made of depends on no threshold, so trying other ones costs a fit
    asked = {"model": settings["model"], "read": config.read, "layers": number, "seed": config.loop.seed}

    def labelled(examples: Sequence[Example]) -> Labels:
        make = _labeller(model, processor, config, depth, number)
        found = label(examples, config.label_batch, make, out / "run" / "labels", settings=asked, progress=progress)
        outcomes: Any = found
        return {**found, "leave": exit_labels(outcomes, config).long()}

    data, other = labelled(train), labelled(held_out)
    shape = (fingerprint.layers, fingerprint.hidden, config.width, config.read)
    with own_seed(config.loop.seed):
        gates = ExitGates(fingerprint.to_dict(), *shape)
    gates.to(model.device)
    weight = torch.tensor([config.stay_weight, 1.0], device=model.device)

    def loss(places: Sequence[int]) -> Tensor:
        logits, leave = _asked(gates, data, places)
        return functional.cross_entropy(logits, leave, weight=weight)

    def measure() -> dict[str, float]:
        logits, leave = _asked(gates, other, range(len(held_out)))
        right = (logits.argmax(1) == leave).float().mean()
        return {
            "loss": functional.cross_entropy(logits, leave, weight=weight).item(),
            "accuracy": right.item(),
            "leave": leave.float().mean().item(),
        }

    result = train_loop(
        gates, len(train), loss, measure, config.loop, out / "run", settings=settings, progress=progress
    )
    save_from_main(gates, out, dtype)
    return result


def _labeller(
    model: Any, processor: Any, config: DyvteConfig, depth: int, number: int
) -> Callable[[list[Example]], dict[str, Tensor]]:
    """What the gates read of a batch, and what becomes of its answers, for `number` of `depth` layers drawn for it."""

    def make(examples: list[Example]) -> dict[str, Tensor]:
        layers = sorted(random.Random(f"{config.loop.seed}/{examples[0].key}").sample(range(depth), number))
        features = gate_features(model, encode(processor, examples, model.device, answers=False), config.read)
        batch = encode(processor, examples, model.device, answers=True)
        return {
            "features": features[:, layers].cpu(),
            "layers": torch.tensor(layers).expand(len(examples), -1).clone(),
            **{name: value.cpu() for name, value in exit_outcomes(model, batch, layers).items()},
        }

    return make


def _asked(gates: ExitGates, data: Labels, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[n, 2] logits and [n] labels of all labelled layers of these examples."""
    features, layers, leave = (_rows(data[name], places) for name in ("features", "layers", "leave"))
    device = next(gates.parameters()).device
    logits, labels = [], []
    for layer in layers.unique().tolist():
        there = layers == layer
        logits.append(gates(layer, features[there].to(device)))
        labels.append(leave[there].to(device))
    return torch.cat(logits), torch.cat(labels)


def _rows(values: Tensor | list[Tensor], places: Sequence[int]) -> Tensor:
    if not isinstance(values, Tensor):
        raise InputError("labels of the gates must be of one shape.")
    return values[torch.as_tensor(list(places))]
