"""Trains ATP's thresholds through the frozen model, with soft masks.

    L = L_ntp + lambda_atp L_ATP + lambda_target | N - N_target |
    L_ATP = sum over modules of (soft tokens behind it / V) i,  i the module's layer

after equations 12 to 14 of ATP-LLaVA (arXiv 2412.00447) as re-implementations have them. The paper also tunes the
language model; its variant with a frozen one is what this trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.predictors import Fingerprint, Thresholds
from vtprune.scorers.atp import ATP, module_layers
from vtprune.train.causal import require_causal
from vtprune.train.data import Example
from vtprune.train.dyvte import answer_losses
from vtprune.train.encoding import encode
from vtprune.train.loop import LoopConfig, LoopResult, own_seed, settings_of, train_loop
from vtprune.train.processes import save_from_main
from vtprune.train.soft import SoftCall, soft_pruning

if TYPE_CHECKING:
    from vtprune.progress import Progress

__all__ = ["AtpConfig", "depth_loss", "soft_tokens", "train_atp"]


@dataclass(frozen=True)
class AtpConfig:
    """What to train.

    Attributes:
        target: tokens aimed at, as a share of the visual tokens (the paper's 144 and 88 of 576 are 1/4 and 0.15).
        unit: what the target counts: "layers" is the average over all decoder layers, "modules" the mean behind the
            modules, which the re-implementations use and which cannot be what the paper reports.
        after: decoder layers behind which modules sit; None moves the paper's (4, 14, 24) of 32 to the model.
        width: of the modules; None is the model's.
        lambda_atp: weight of the depth loss; 0.05 and 0.01 in the re-implementations.
        lambda_target: weight of the target loss, in tokens; 0.2 in both.
        temperature: of the soft masks.
        axis, normalise, rates, penalty: knobs of `ATP`; the weights bring them along.
        loop: of the training.

    Raises:
        InputError: if a value is out of range.
        PlanError: if a knob of ATP is.
    """

    target: float = 0.25
    unit: Literal["layers", "modules"] = "layers"
    after: tuple[int, ...] | None = None
    width: int | None = None
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    temperature: float = 10.0
    axis: Literal["received", "given"] = "received"
    normalise: Literal["sum", "each", "none"] = "sum"
    rates: tuple[float, ...] = ATP.rates
    penalty: float = ATP.penalty
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=1, batch_size=16, lr=1e-4))

    def __post_init__(self) -> None:
        if not 0.0 < self.target <= 1.0:
            raise InputError(f"target must be a share of the visual tokens in (0, 1], got {self.target!r}.")
        if self.unit not in ("layers", "modules"):
            raise InputError(f"unit must be 'layers' or 'modules', got {self.unit!r}.")
        if min(self.lambda_atp, self.lambda_target) < 0 or self.temperature <= 0:
            raise InputError(
                "lambda_atp and lambda_target must be >= 0 and temperature above 0, got "
                f"{self.lambda_atp}, {self.lambda_target} and {self.temperature}."
            )
        if self.width is not None and (type(self.width) is not int or self.width < 1):
            raise InputError(f"width must be an int >= 1, or None for the model's, got {self.width!r}.")
        self.method()

    def method(self) -> ATP:
        """ATP with these knobs and without weights."""
        return ATP(after=self.after, axis=self.axis, normalise=self.normalise, rates=self.rates, penalty=self.penalty)


def depth_loss(counts: Sequence[Tensor], after: Sequence[int], total: Tensor) -> Tensor:
    """Mean over the samples of sum_k counts_k / total i_k: what is kept deep costs more.

    Args:
        counts: behind each module [B] tokens that are left.
        after: the modules' layers i_k.
        total: [B] visual tokens.
    """
    return sum((n / total * layer for n, layer in zip(counts, after, strict=True)), torch.zeros(())).mean()


def soft_tokens(counts: Sequence[Tensor], after: Sequence[int], total: Tensor, layers: int, unit: str) -> Tensor:
    """[B] visual tokens that enter a decoder layer, averaged over the `layers`; or over the modules alone."""
    if unit == "modules":
        return torch.stack(list(counts)).mean(0)
    edges = [*(k + 1 for k in after), layers]
    sums = total * edges[0]
    for n, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        sums = sums + n * (last - first)
    return sums / layers


def train_atp(
    model: Any,
    processor: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    config: AtpConfig,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoopResult:
    """Train, and write the best thresholds to `out` (state and log to `out/run`); goes on where it was interrupted.

    Args:
        model: frozen, in eval mode, not pruned.
        processor: of the model.
        train, held_out: examples, see `read_data`.
        out: folder that `ATP(weights=...)` takes.
        config: what to train.
        progress: told of the steps.
        dtype: of the weights that are written.

    Raises:
        UnsupportedModelError: if the model's prompt sees the answer behind it, or its attention takes no masks of
            numbers.

    Returns:
        how it went; of the held-out figures `held_out_answer` is L_ntp in nats, `held_out_tokens` the share kept.
    """
    require_causal(model, encode(processor, train[:1], model.device, answers=True))
    fingerprint = Fingerprint.of(model)
    depth, hidden = fingerprint.layers, fingerprint.hidden
    after = config.after or module_layers(depth)
    settings: dict[str, Any] = {"model": fingerprint.to_dict(), "config": settings_of(config)}
    settings["data"] = [example.key for example in (*train, *held_out)]
    method = config.method()
    with own_seed(config.loop.seed):
        thresholds = Thresholds(fingerprint.to_dict(), list(after), config.width or hidden, method.scores)
    thresholds.to(model.device)
    size = config.loop.micro_batch or config.loop.batch_size

    with soft_pruning(model, method, thresholds, config.temperature) as last:

        def parts(examples: Sequence[Example]) -> dict[str, Tensor]:
            batch = encode(processor, examples, model.device, answers=True)
            losses, _ = answer_losses(model(**batch.inputs, use_cache=False).logits, batch)
            return _losses(losses.mean(), last(), after, depth, config)

        def loss(places: Sequence[int]) -> Tensor:
            return parts([train[place] for place in places])["loss"]

        def measure() -> dict[str, float]:
            return _mean(parts, held_out, size)

        with frozen(model):
            result = train_loop(
                thresholds, len(train), loss, measure, config.loop, out / "run", settings=settings, progress=progress
            )
    save_from_main(thresholds, out, dtype)
    return result


def _mean(
    parts: Callable[[Sequence[Example]], dict[str, Tensor]], examples: Sequence[Example], size: int
) -> dict[str, float]:
    """Means over all examples, `size` at a time."""
    sums: dict[str, float] = {}
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        for name, value in parts(some).items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(some)
    return {name: value / len(examples) for name, value in sums.items()}


def _losses(answer: Tensor, call: SoftCall, after: Sequence[int], depth: int, config: AtpConfig) -> dict[str, Tensor]:
    """The loss of a batch and its parts; the target is met by the mean over the batch, not by each sample."""
    if call.valid is None:
        raise InputError("the batch has no visual tokens, so there is nothing to prune. Train on images.")
    total, counts = call.valid.sum(1).float(), call.counts()
    tokens = soft_tokens(counts, after, total, depth, config.unit)
    deep = depth_loss(counts, after, total)
    missed = (tokens.mean() - config.target * total.mean()).abs()
    loss = answer + config.lambda_atp * deep + config.lambda_target * missed
    return {"loss": loss, "answer": answer, "depth": deep, "tokens": (tokens / total).mean()}


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No weight of the model gets a gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
