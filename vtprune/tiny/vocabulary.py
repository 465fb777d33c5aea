"""The closed vocabulary of the embedded tiny VLM: colours, kinds of objects, words, and word <-> id."""

from __future__ import annotations

import re
from collections.abc import Mapping

IMAGE_SIZE = 128
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = GRID * GRID

# RGB in 0..255; the first eight may be asked about, the last four only dye clutter
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 150, 40),
    "blue": (40, 60, 230),
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "teal": (0, 150, 150),
    "brown": (130, 70, 25),
    "yellow": (240, 225, 20),
    "purple": (150, 40, 190),
    "orange": (250, 140, 20),
    "pink": (250, 130, 190),
    "lime": (160, 245, 50),
}
COLORS = tuple(PALETTE)
ASKED_COLORS = 8

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
PLURALS = ("circles", "rectangles", "triangles", "stars", "crosses")
CLUTTER = ("ring", "bar", "diamond", "hash")
KINDS = (*SHAPES, *(str(digit) for digit in range(10)), *CLUTTER)
ASKED_KINDS = len(SHAPES) + 10
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "user", ":", "?", "assistant")
# words of the easy-VQA questions and answers, then those that only scenes use
_TEXT = (
    *("a", "circle", "color", "contain", "does", "gray", "green", "image", "in", "is", "no", "not", "of", "present"),
    *("rectangle", "red", "shape", "teal", "the", "there", "triangle", "what", "yellow", "yes", "black", "blue"),
    *("brown", "digit", "objects", "object", "which", "where", "how", "many", "are", "at", "frame", "above", "below"),
)
WORDS = (
    *_SPECIAL,
    *sorted({*_TEXT, *COLORS[:ASKED_COLORS], *KINDS[:ASKED_KINDS], *PLURALS, *ROWS, *COLUMNS}),
)
WORD_IDS = {word: index for index, word in enumerate(WORDS)}
PAD, UNK, BOS, EOS, IMAGE = range(5)
PREFIX = (BOS, WORD_IDS["user"], WORD_IDS[":"])
SUFFIX = (WORD_IDS["assistant"], WORD_IDS[":"])

_TOKEN = re.compile(r"<\w+>|\w+|[^\w\s]")


def encode(text: str, ids: Mapping[str, int] = WORD_IDS) -> list[int]:
    """Word ids of `text`, lower-cased; a word outside the vocabulary becomes `UNK`."""
    return [ids.get(word, UNK) for word in _TOKEN.findall(text.lower())]
