"""What the training code asks of a network: how pictures become visual tokens, and where tokens stand."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtprune.tiny import vocabulary
from vtprune.tiny.vocabulary import PREFIX

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 128, 4, 4
WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, HIDDEN = 160, 4, 2, 12, 320
# what the decoders of all networks share; each adds its own rotary settings
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": vocabulary.PAD,
    "bos_token_id": vocabulary.BOS,
    "eos_token_id": vocabulary.EOS,
}


@dataclass(frozen=True)
class TokenGrid:
    """The visual tokens of one picture.

    Attributes:
        pixels: side of the picture as the tower sees it.
        side: tokens a side.
        merge: patches a side of one token.
        after: token ids between the picture and the question.
    """

    pixels: int
    side: int
    merge: int
    after: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.side**2

    @property
    def cell(self) -> int:
        """Pixels a side of one token."""
        return self.pixels // self.side

    @property
    def center_classes(self) -> int:
        """Not the centre of an object, or the centre lies in this patch of the token."""
        return 1 + self.merge**2


class Encoded(NamedTuple):
    """Tower output: cells [B, V, F], what the first matrix of the projector reads, and a summary [B, D_vision]."""

    cells: torch.Tensor
    summary: torch.Tensor


class Vlm(nn.Module, ABC):
    """A Hugging Face model, `self.hf`, opened for training layer by layer.

    Attributes:
        name: under which it ships.
        title: in the model card.
        grid: its visual tokens.
        before: token ids before the picture.
        image_word: the placeholder, in the place of `vocabulary.IMAGE`.
        extra_words: words behind those of `vocabulary.WORDS`.
        stored_in_int8: whether it ships in int8 or in fp16.
        warm_start: whether it starts from the shipped tiny LLaVA.
        places_from_rotary: whether visual tokens learn where they stand from rotary positions alone.
        query_name: which query ranks patches in the tower.
        vision: names below `hf` of the tower and of what else stands before `Encoded.cells`.
        projector: names below `hf` of the matrices that `project` uses.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    grid: ClassVar[TokenGrid]
    before: ClassVar[tuple[int, ...]] = PREFIX
    image_word: ClassVar[str] = "<image>"
    extra_words: ClassVar[tuple[str, ...]] = ()
    stored_in_int8: ClassVar[bool] = True
    warm_start: ClassVar[bool] = True
    places_from_rotary: ClassVar[bool] = False
    query_name: ClassVar[str] = "CLS attention"
    vision: ClassVar[tuple[str, ...]] = ("model.vision_tower",)
    projector: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)

    def __init__(self) -> None:
        super().__init__()
        self.hf: Any = self.build()

    @classmethod
    def words(cls) -> list[str]:
        """The vocabulary in the order of ids."""
        words = [*vocabulary.WORDS, *cls.extra_words]
        words[vocabulary.IMAGE] = cls.image_word
        return words

    @abstractmethod
    def build(self) -> Any:
        """The untrained model, with random weights from torch's global generator."""

    @abstractmethod
    def build_processor(self) -> Any:
        """The processor that ships with the model."""

    @abstractmethod
    def vision_layers(self) -> nn.ModuleList:
        """The layers of the tower."""

    @abstractmethod
    def encode(self, images: np.ndarray) -> Encoded:
        """Run the tower on [B, 128, 128, 3] uint8 pictures."""

    @abstractmethod
    def project(self, cells: torch.Tensor) -> torch.Tensor:
        """[B, V, F] -> visual tokens [B, V, D] as the decoder sees them."""

    def see(self, images: np.ndarray) -> torch.Tensor:
        """Visual tokens [B, V, D] of [B, 128, 128, 3] uint8 pictures."""
        return self.project(self.encode(images).cells)

    @abstractmethod
    def tower_attention(self, images: np.ndarray) -> torch.Tensor:
        """Attention [B, V] of the query `query_name` to each token's patches, last tower layer, mean over heads."""

    def scale_projector(self, cells: torch.Tensor) -> None:
        """Fit the projector to its input, once, before it trains; nothing to do where it starts with a norm."""

    def compile_layers(self) -> None:
        """Compile each transformer layer on its own: small graphs, quick to build."""
        for layer in (*self.vision_layers(), *self.decoder.layers):
            layer.compile(dynamic=False)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """[B, 128, 128, 3] uint8 -> [B, 3, P, P] float32, resized and normalised as the shipped processor does."""
        side = self.grid.pixels
        if images.shape[1] != side:
            resized = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in images]
            images = np.stack([np.asarray(one) for one in resized])
        return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD).contiguous()

    # decoder

    @property
    def decoder(self) -> Any:
        """The text model."""
        return self.hf.model.language_model

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Word vectors."""
        return self.hf.get_input_embeddings()(ids)

    @property
    def text_start(self) -> int:
        """Position of the first token behind the picture."""
        return len(self.before) + self.grid.tokens

    def visual_positions(self, index: torch.Tensor) -> torch.Tensor:
        """Rotary positions [A, B, V] of the visual tokens `index` [B, V]; A axes."""
        return (len(self.before) + index)[None]

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [B, S, head width], at `positions` [A, B, S]."""
        return self.decoder.rotary_emb(hidden, positions if len(positions) > 1 else positions[0])

    def heads(
        self, layer: int, hidden: torch.Tensor, positions: torch.Tensor, heads: int, key_value_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [B, heads, S, W] and keys [B, key_value_heads, S, W] of one decoder layer's input.

        Recomputed from the layer's input, so that the layer itself may run fused and compiled.
        """
        block = self.decoder.layers[layer]
        attention, width = block.self_attn, block.self_attn.head_dim
        normed = block.input_layernorm(hidden)
        sides = []
        for linear, count in ((attention.q_proj, heads), (attention.k_proj, key_value_heads)):
            bias = None if linear.bias is None else linear.bias[: count * width]
            rows = nn.functional.linear(normed, linear.weight[: count * width], bias)
            sides.append(rows.view(*rows.shape[:2], count, width).transpose(1, 2))
        return apply_rotary_pos_emb(*sides, *self.rotary(hidden, positions))
