"""Intervals for accuracies and tests of their differences.

Intervals are a bootstrap over images, because the questions of one image share its difficulty. McNemar's test counts
questions as independent: where images have several questions, the interval is the one to trust.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "RESAMPLES",
    "Interval",
    "McNemar",
    "by_image",
    "image_weights",
    "mcnemar",
    "mean_interval",
    "paired_difference",
    "percentile_interval",
    "ratio_interval",
]

RESAMPLES = 2000
_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: it is beyond noise, either way."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two models answers right, and how likely so uneven a split is by chance.

    Attributes:
        wins: questions on which the model scores higher than its reference.
        losses: questions on which it scores lower.
        p: two-sided exact binomial probability; 1.0 if the models never differ.
    """

    wins: int
    losses: int
    p: float


def image_weights(images: int, seed: int | Sequence[int]) -> np.ndarray:
    """[RESAMPLES, images] how often each image is drawn."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1.0 / images), size=RESAMPLES)


def by_image(values: Sequence[float], images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values, number of questions) of each image, in order of first appearance.

    Raises:
        ValueError: if there is no value, or not one image a value.
    """
    if not values or len(values) != len(images):
        raise ValueError(f"need at least one score and an image for each, got {len(values)} and {len(images)}.")
    place = {image: index for index, image in enumerate(dict.fromkeys(images))}
    rows = np.array([place[image] for image in images])
    return np.bincount(rows, np.asarray(values, float)), np.bincount(rows).astype(float)


def mean_interval(scores: Sequence[float], images: Sequence[Hashable], seed: int = 0) -> Interval:
    """Mean of scores in [0, 1] with a percentile interval over resampled images.

    If every image is all right (or all wrong) no resample differs, and the exact binomial bound for that many
    images is used instead of an interval of zero width.

    Args:
        scores: one a question.
        images: the image each question belongs to.
        seed: of the resampling.

    Raises:
        ValueError: if there is no score, or not one image a score.
    """
    sums, counts = by_image(scores, images)
    value = float(sums.sum() / counts.sum())
    if value in (0.0, 1.0):
        bound = _TAIL ** (1.0 / len(sums))
        return Interval(value, bound, 1.0) if value else Interval(value, 0.0, 1.0 - bound)
    weights = image_weights(len(sums), seed)
    return percentile_interval(value, (weights @ sums) / (weights @ counts))


def paired_difference(
    scores: Sequence[float], reference: Sequence[float], images: Sequence[Hashable], seed: int = 0
) -> Interval:
    """Mean of `scores - reference` on the same questions, resampling images.

    The pairing removes the difficulty of the questions, so this is the interval to read when asking whether a
    method loses against the unpruned model.

    Args:
        scores: one a question.
        reference: the unpruned model's scores of the same questions, in the same order.
        images: the image each question belongs to.
        seed: of the resampling.

    Raises:
        ValueError: if the lengths differ or there is no score.
    """
    _require_pairs(scores, reference)
    sums, counts = by_image([a - b for a, b in zip(scores, reference, strict=True)], images)
    weights = image_weights(len(sums), seed)
    return percentile_interval(float(sums.sum() / counts.sum()), (weights @ sums) / (weights @ counts))


def ratio_interval(
    scores: Sequence[float], reference: Sequence[float], images: Sequence[Hashable], seed: int = 0
) -> Interval | None:
    """Sum of `scores` over that of `reference` on the same questions (the retention), resampling images.

    Both sums are taken over the same drawn images. Draws in which the reference has no point are left out.

    Args:
        scores: one a question.
        reference: the unpruned model's scores of the same questions, in the same order.
        images: the image each question belongs to.
        seed: of the resampling.

    Returns:
        None if the reference has no point at all.

    Raises:
        ValueError: if the lengths differ or there is no score.
    """
    _require_pairs(scores, reference)
    mine, _ = by_image(scores, images)
    full, _ = by_image(reference, images)
    if not full.sum():
        return None
    weights = image_weights(len(full), seed)
    below = weights @ full
    return percentile_interval(float(mine.sum() / full.sum()), (weights @ mine)[below > 0] / below[below > 0])


def mcnemar(scores: Sequence[float], reference: Sequence[float]) -> McNemar:
    """Exact two-sided McNemar test on the same questions; of graded scores it is the sign test.

    Args:
        scores: one a question.
        reference: the other model's scores of the same questions, in the same order.

    Raises:
        ValueError: if the lengths differ.
    """
    _require_pairs(scores, reference)
    difference = np.asarray(scores, float) - np.asarray(reference, float)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    total, fewer = wins + losses, min(wins, losses)
    # log C(total, k) for k = 0..fewer, by the ratio of neighbours: the numbers themselves overflow
    steps = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((total - steps + 1) / steps))]) - total * np.log(2.0)
    # an even split counts its middle term twice
    return McNemar(wins, losses, min(1.0, float(2.0 * np.exp(logs).sum())))


def percentile_interval(value: float, estimates: np.ndarray) -> Interval:
    """`value` with the middle 95 % of its resampled `estimates`."""
    low, high = np.percentile(estimates, [100 * _TAIL, 100 * (1 - _TAIL)])
    return Interval(value, float(low), float(high))


def _require_pairs(scores: Sequence[float], reference: Sequence[float]) -> None:
    if len(scores) != len(reference):
        raise ValueError(f"paired scores must have one length, got {len(scores)} and {len(reference)}.")
