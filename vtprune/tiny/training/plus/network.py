"""The tiny Qwen2-VL with more words, seen with one picture, a pair of pictures, or a film in its prompt."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vtprune.tiny import load_tiny
from vtprune.tiny.exercises import NEW_WORDS
from vtprune.tiny.exercises.films import FILM_FRAMES, FILM_SIZE
from vtprune.tiny.training.vlms import TokenGrid
from vtprune.tiny.training.vlms.base import PIXEL_MEAN, PIXEL_STD
from vtprune.tiny.training.vlms.qwen2_vl import Qwen2VL, block_forward, rotary_angles
from vtprune.tiny.vocabulary import PATCH_SIZE

NAME = "qwen2_vl_plus"
OLD_WORDS = tuple(Qwen2VL.words())
WORDS = (*OLD_WORDS, *NEW_WORDS)
WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_MERGE, _START, _END = 2, len(OLD_WORDS) - 3, len(OLD_WORDS) - 2
# a new word starts near an old one of a like role
_LIKE = {
    "word": "digit",
    "say": "contain",
    "gap": "frame",
    "ring": "circle",
    "has": "contain",
    "more": "many",
    "first": "left",
    "second": "right",
    "both": "yes",
    "neither": "no",
    "way": "where",
    "move": "present",
    "up": "top",
    "down": "bottom",
    "appears": "yes",
    "disappears": "no",
}
_LIKENESS, _HEAD_LIKENESS = 0.6, 0.3


def build() -> Qwen2VLForConditionalGeneration:
    """The tiny Qwen2-VL with rows for NEW_WORDS, from torch's global generator."""
    old: Any = load_tiny("qwen2_vl")[0]
    config = type(old.config).from_dict(old.config.to_dict())
    config.text_config.vocab_size = len(WORDS)
    model: Any = Qwen2VLForConditionalGeneration(config)
    grown = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    own, theirs = dict(model.named_parameters()), dict(old.named_parameters())
    with torch.no_grad():
        for name, weight in own.items():
            weight[: len(theirs[name])].copy_(theirs[name])
        for name in grown:
            old_rows = theirs[name]
            likeness = _HEAD_LIKENESS if name.startswith("lm_head") else _LIKENESS
            for place, word in enumerate(NEW_WORDS):
                like = old_rows[OLD_WORDS.index(_LIKE[word])]
                noise = torch.randn_like(like) * old_rows.std() * (1 - likeness)
                own[name][len(OLD_WORDS) + place] = likeness * like + noise
    return model


def build_processor() -> Qwen2VLProcessor:
    """That of the tiny Qwen2-VL, with more words, and films in their own size."""
    from transformers import Qwen2VLVideoProcessor

    from vtprune.tiny.training.vlms.tokenizer import build_tokenizer

    old: Any = load_tiny("qwen2_vl")[1]
    tokenizer = build_tokenizer(WORDS, Qwen2VL.image_word, Qwen2VL.extra_words)
    tokenizer.chat_template = old.chat_template
    films: Any = old.video_processor.to_dict()
    films["size"] = {"shortest_edge": FILM_SIZE**2, "longest_edge": films["size"]["longest_edge"]}
    return Qwen2VLProcessor(
        image_processor=old.image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**films),
        chat_template=old.chat_template,
    )


class Seen(NamedTuple):
    """cells [B, V', F] before the merger's matrices; tokens [B, V, D], which may hold words between pictures."""

    cells: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class SeriesGrid(TokenGrid):
    """Visual tokens of `frames` pictures or moments; `between` stand as words between two of them."""

    frames: int = 1
    between: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Visual tokens and words between them."""
        return self.frames * self.side**2 + (self.frames - 1) * len(self.between)

    @property
    def visual(self) -> np.ndarray:
        """Places of the visual tokens among `tokens`."""
        step = self.side**2 + len(self.between)
        return (np.arange(self.frames)[:, None] * step + np.arange(self.side**2)).ravel()


class View(Qwen2VL, ABC):
    """One model under several prompts: each subclass says what stands before the question."""

    grid: SeriesGrid

    def __init__(self, hf: Any) -> None:
        # the weights belong to whoever made `hf`
        nn.Module.__init__(self)
        self.hf = hf
        self._run_block: Callable[..., torch.Tensor] = block_forward

    def compile_blocks(self) -> None:
        """Compile the blocks of the tower; the layers of the decoder are compiled once for all views."""
        self._run_block = torch.compile(block_forward, dynamic=False)

    @abstractmethod
    def _tiles(self, images: np.ndarray) -> torch.Tensor:
        """[B, N, H, W, 3] uint8 -> flat patches [M, P, 384] of every still or moment, the four of a token in a row."""

    def cells(self, images: np.ndarray, tower: Any = None) -> torch.Tensor:
        """Run the tower (another one, if given) on [B, N, H, W, 3] uint8. Returns [B * stills, V', F]."""
        tower, tiles = tower or self.hf.model.visual, self._tiles(images)
        side = self.grid.side
        axis = torch.arange(side * _MERGE).expand(side * _MERGE, -1)
        places = [part.reshape(side, _MERGE, side, _MERGE).permute(0, 2, 1, 3).flatten() for part in (axis.T, axis)]
        angles = rotary_angles(torch.stack(places))
        hidden = nn.functional.linear(tiles, tower.patch_embed.proj.weight.flatten(1))
        for block in tower.blocks:
            hidden = self._run_block(block, hidden, *angles)
        return tower.merger.ln_q(hidden).unflatten(1, (-1, _MERGE**2)).flatten(2)

    def look(self, images: np.ndarray) -> Seen:
        """Run tower and merger on [B, N, H, W, 3] uint8."""
        cells, size = self.cells(images), len(images)
        tokens = self.hf.model.visual.merger.mlp(cells)
        cells = cells.reshape(size, -1, cells.shape[-1])
        if not self.grid.between:
            return Seen(cells, tokens.reshape(size, -1, tokens.shape[-1]))
        words = self.embed(torch.tensor(self.grid.between)).expand(size, -1, -1)
        frames = tokens.unflatten(0, (size, -1)).unbind(1)
        spaced = [part for frame in frames[:-1] for part in (frame, words)]
        return Seen(cells, torch.cat([*spaced, frames[-1]], 1))


def _tile(pixels: torch.Tensor) -> torch.Tensor:
    """[M, 2, 3, P, P] two moments each -> [M, patches, 3 * 2 * 8 * 8]."""
    side = pixels.shape[-1] // PATCH_SIZE // _MERGE
    tiles = pixels.view(len(pixels), 2, 3, side, _MERGE, PATCH_SIZE, side, _MERGE, PATCH_SIZE)
    return tiles.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(pixels), -1, 6 * PATCH_SIZE**2)


class OnePicture(View):
    """As the tiny Qwen2-VL sees a scene."""

    grid = SeriesGrid(pixels=144, side=9, merge=_MERGE, after=(_END,))

    def _tiles(self, images: np.ndarray) -> torch.Tensor:
        # a still picture is two equal frames
        return _tile(self.pixels(images.reshape(-1, *images.shape[-3:]))[:, None].expand(-1, 2, -1, -1, -1))


class TwoPictures(OnePicture):
    """Two pictures, each between its own marks."""

    grid = SeriesGrid(pixels=144, side=9, merge=_MERGE, after=(_END,), frames=2, between=(_END, _START))

    @property
    def text_start(self) -> int:
        """See `Vlm.text_start`."""
        return len(self.before) + 2 * self.grid.side + len(self.grid.between)

    def visual_positions(self, index: torch.Tensor) -> torch.Tensor:
        """See `Vlm.visual_positions`; the words between the pictures count on by one each."""
        side, tokens = self.grid.side, self.grid.side**2
        step = tokens + len(self.grid.between)
        picture, place = index // step, index % step
        start = len(self.before) + picture * (side + len(self.grid.between))
        between = place >= tokens
        word = start + side + place - tokens
        axes = (torch.zeros_like(index), place // side, place % side)
        return torch.stack([torch.where(between, word, start + axis) for axis in axes])


class Film(View):
    """Frames in pairs, each pair a moment of its own."""

    grid = SeriesGrid(
        pixels=FILM_SIZE, side=FILM_SIZE // PATCH_SIZE // _MERGE, merge=_MERGE, after=(_END,), frames=FILM_FRAMES // 2
    )

    def _tiles(self, images: np.ndarray) -> torch.Tensor:
        frames = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float()
        return _tile(((frames / 255 - PIXEL_MEAN) / PIXEL_STD).reshape(-1, 2, *frames.shape[2:]))

    def visual_positions(self, index: torch.Tensor) -> torch.Tensor:
        """See `Vlm.visual_positions`: time, row, column."""
        side = self.grid.side
        place = index % side**2
        return len(self.before) + torch.stack([index // side**2, place // side, place % side])
