"""Pictures the scenes are composed of: shape masks, handwritten digits, background textures.

Everything is a pure function of its arguments. Digits are scikit-learn's `load_digits` (8x8, 1797 of them),
cut once into 1200 / 300 / 297 for train / dev / test; textures are drawn, 200 / 28 / 28 of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vtprune.tiny.vocabulary import IMAGE_SIZE

SPLITS = ("train", "dev", "test")
SHAPE_SIZES = (13, 15, 17)
CLUTTER_SIZES = (8, 9, 10, 11)
DIGIT_INK = (20, 22)
FRAME = 2
RECTANGLE_ASPECTS = (0.65, 0.8, 1.25, 1.5)
_SUPERSAMPLING = 4
_TEXTURE_RANGE = {"train": (0, 200), "dev": (200, 228), "test": (228, 256)}
_DIGIT_RANGE = {"train": (0, 1200), "dev": (1200, 1500), "test": (1500, 1797)}


def variants(kind: str) -> int:
    """How many forms `shape_mask` knows of this kind (rectangle aspects, bar directions)."""
    return {"rectangle": len(RECTANGLE_ASPECTS), "bar": 2}.get(kind, 1)


@lru_cache(maxsize=256)
def shape_mask(kind: str, size: int, variant: int = 0) -> np.ndarray:
    """Coverage in 0..1 of a `size` x `size` box, float32, anti-aliased."""
    axis = (np.arange(size * _SUPERSAMPLING) + 0.5) / (size * _SUPERSAMPLING) * 2 - 1
    inside = _inside(kind, axis[:, None], axis[None, :], variant)
    blocks = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return blocks.mean((1, 3)).astype(np.float32)


def _inside(kind: str, y: np.ndarray, x: np.ndarray, variant: int) -> np.ndarray:
    radius = np.hypot(x, y)
    if kind == "circle":
        return radius <= 1
    if kind == "rectangle":
        aspect = RECTANGLE_ASPECTS[variant]
        return (abs(x) <= min(1, aspect)) & (abs(y) <= min(1, 1 / aspect))
    if kind == "triangle":
        return (abs(x) <= (y + 1) / 2) & (y >= -1)
    if kind == "cross":
        return (abs(x) <= 0.3) | (abs(y) <= 0.3)
    if kind == "star":
        return _inside_star(y, x)
    if kind == "ring":
        return (radius <= 1) & (radius >= 0.5)
    if kind == "bar":
        return (abs(y) <= 0.34) & (abs(x) <= 1) if variant == 0 else (abs(x) <= 0.34) & (abs(y) <= 1)
    if kind == "diamond":
        return abs(x) + abs(y) <= 1
    if kind == "hash":
        return (abs(abs(x) - 0.45) <= 0.2) | (abs(abs(y) - 0.45) <= 0.2)
    raise ValueError(f"kind must be a shape or clutter kind, got {kind!r}. Digits are drawn by digit_ink.")


def _inside_star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Five-pointed star, tip up: below the straight edge between an outer and an inner corner."""
    half_arm, inner = np.pi / 5, 0.42
    angle = np.abs((np.arctan2(x, -y) + half_arm) % (2 * half_arm) - half_arm)
    inner_x, inner_y = inner * np.cos(half_arm), inner * np.sin(half_arm)
    edge = inner_y / (np.cos(angle) * inner_y - np.sin(angle) * (inner_x - 1))
    return np.hypot(x, y) <= edge


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images [1797, 8, 8] in 0..1, digit per image, shuffled order that the splits cut)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    return (bunch.images / 16).astype(np.float32), bunch.target, order


@lru_cache(maxsize=64)
def digit_ids(split: str, digit: int) -> np.ndarray:
    """Indices into `load_digits` of this digit's handwritten samples in this split."""
    _, target, order = _digits()
    first, last = _DIGIT_RANGE[split]
    part = order[first:last]
    return part[target[part] == digit]


@lru_cache(maxsize=4096)
def digit_ink(index: int, size: int) -> np.ndarray:
    """Ink in 0..1 of one handwritten digit, [size, size] float32."""
    image = Image.fromarray(_digits()[0][index])
    return np.clip(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


@lru_cache(maxsize=256)
def _texture(index: int) -> np.ndarray:
    rng = np.random.default_rng([1, index])
    coarse = rng.standard_normal((3, *rng.integers(3, 10, 2))).astype(np.float32)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    smooth = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in coarse]
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    angle, frequency = rng.random() * np.pi, rng.uniform(0.15, 0.9)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency) * rng.uniform(0, 12)
    gray_noise = rng.standard_normal((*size, 1)) * rng.uniform(3, 12)
    color_noise = rng.standard_normal((*size, 3)) * rng.uniform(0, 6)
    texture = np.stack(smooth, -1) * rng.uniform(5, 20) + stripes[..., None] + gray_noise + color_noise
    return texture.astype(np.float32)


def background(rng: np.random.Generator, split: str) -> np.ndarray:
    """One textured light ground of this split, [128, 128, 3] float32 around 165..235."""
    first, last = _TEXTURE_RANGE[split]
    texture = _texture(int(rng.integers(first, last)))[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    shifted = np.roll(texture, tuple(rng.integers(IMAGE_SIZE, size=2)), (0, 1))
    return shifted + (rng.uniform(165, 235) + rng.uniform(-18, 18, 3)).astype(np.float32)
