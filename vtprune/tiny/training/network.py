"""A network with what only training needs: label heads on the tower, symbol tokens, and how both start."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
from torch import nn

from vtprune.tiny.training.packing import COLOR_CLASSES, KIND_CLASSES, NAMES, NO_REGION
from vtprune.tiny.training.recipe import READ_HEADS
from vtprune.tiny.training.symbols import SYMBOL_SPREAD, SymbolTokens
from vtprune.tiny.training.vlms import Vlm, vlm_class
from vtprune.tiny.training.vlms.base import HEADS, VISION_WIDTH, WIDTH
from vtprune.tiny.training.warm_symbols import llava_symbols
from vtprune.tiny.vocabulary import ASKED_COLORS, ASKED_KINDS, COLORS, COLUMNS, KINDS, ROWS, WORD_IDS

_WORD_SPREAD = 1.2
_COPY_GAIN, _ANSWER_GAIN = 0.5, 0.3


class Trainee(nn.Module):
    """The network `vlm` of this name, heads for the renderer's labels, and the symbol tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vlm: Vlm = vlm_class(name)()
        grid = self.vlm.grid
        width = VISION_WIDTH * grid.merge**2
        self.patch_kind = nn.Linear(width, KIND_CLASSES)
        self.patch_color = nn.Linear(width, COLOR_CLASSES)
        self.patch_region = nn.Linear(width, NO_REGION)
        self.patch_center = nn.Linear(width, grid.center_classes)
        self.class_names = nn.Linear(VISION_WIDTH, NAMES)
        self.symbols = SymbolTokens(grid, not self.vlm.places_from_rotary)
        # reads row and column of a visual token off the decoder, where nothing else tells them
        self.place = nn.Linear(WIDTH, 2 * grid.side) if self.vlm.places_from_rotary else None
        with torch.no_grad():
            if self.vlm.warm_start:
                self._adopt_symbols()
            else:
                self._share_words()
                self._init_copying_heads()

    def _share_words(self) -> None:
        """Words, symbols and answers start from the same vectors: "red" asked, seen and said."""
        embed = self.vlm.hf.get_input_embeddings().weight
        kind, color, region, _ = self.symbols.tables()
        for target, words in ((kind, KINDS[:ASKED_KINDS]), (color, COLORS[:ASKED_COLORS])):
            rows = embed[[WORD_IDS[word] for word in words]]
            target[1 : len(words) + 1] = rows * (SYMBOL_SPREAD / _WORD_SPREAD)
        for place in range(NO_REGION):
            row, column = WORD_IDS[ROWS[place // 3]], WORD_IDS[COLUMNS[place % 3]]
            region[place] = (embed[row] + embed[column]) * (SYMBOL_SPREAD / _WORD_SPREAD / math.sqrt(2))
        self.vlm.hf.lm_head.weight.add_(nn.functional.normalize(embed, dim=1) * _ANSWER_GAIN)

    def _init_copying_heads(self) -> None:
        """The taught heads of all layers start by copying kind, colour and region of what they look at.

        The same copy in every layer: an answer read at layer 7 then arrives in the form in which one read at layer 1
        does, and what decodes it is learnt once for all kinds of question. Without it each layer needs to learn its
        own copy from its one kind of question (dev after 500 steps: 88 % for one kind, 15 % for the deeper ones).
        """
        kind, color, region, _ = self.symbols.tables()
        content = torch.cat([kind[1:], color[1:], region[:NO_REGION]])
        width = WIDTH // HEADS
        basis = torch.linalg.svd(content, full_matrices=False).Vh[:width]
        for layer in self.vlm.decoder.layers:
            attention = layer.self_attn
            attention.v_proj.weight[:width] = basis
            for head in range(READ_HEADS):
                attention.o_proj.weight[:, head * width : (head + 1) * width] = _COPY_GAIN * basis.T

    def _adopt_symbols(self) -> None:
        """Symbols start as the shipped LLaVA's visual tokens of the same labels, which its decoder can read."""
        known = llava_symbols()
        for own, theirs in zip(self.symbols.tables()[:3], known[:3], strict=True):
            own.copy_(theirs)
        center = self.symbols.tables()[3]
        center[0] = known[3][0]
        center[1:] = known[3][1] + 0.3 * center[1:]
        if self.symbols.places:
            for own, theirs in ((self.symbols.row, known[4]), (self.symbols.column, known[5])):
                resized = nn.functional.interpolate(theirs.T[None], size=len(own), mode="linear")
                own.copy_(resized[0].T)
