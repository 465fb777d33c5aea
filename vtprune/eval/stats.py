"""Intervals for accuracies: a bootstrap over images, because the questions of one image share its difficulty."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "mean_interval", "paired_difference"]

RESAMPLES = 2000
_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def _weights(images: int, seed: int) -> np.ndarray:
    """[RESAMPLES, images] how often each image is drawn."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1.0 / images), size=RESAMPLES)


def _by_image(values: Sequence[float], images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
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
    sums, counts = _by_image(scores, images)
    value = float(sums.sum() / counts.sum())
    if value in (0.0, 1.0):
        bound = _TAIL ** (1.0 / len(sums))
        return Interval(value, bound, 1.0) if value else Interval(value, 0.0, 1.0 - bound)
    weights = _weights(len(sums), seed)
    return Interval(value, *_percentiles((weights @ sums) / (weights @ counts)))


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
    if len(scores) != len(reference):
        raise ValueError(f"paired scores must have one length, got {len(scores)} and {len(reference)}.")
    sums, counts = _by_image([a - b for a, b in zip(scores, reference, strict=True)], images)
    weights = _weights(len(sums), seed)
    return Interval(float(sums.sum() / counts.sum()), *_percentiles((weights @ sums) / (weights @ counts)))


def _percentiles(estimates: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(estimates, [100 * _TAIL, 100 * (1 - _TAIL)])
    return float(low), float(high)
