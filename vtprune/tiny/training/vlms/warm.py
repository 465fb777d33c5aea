"""A start from the shipped tiny LLaVA: its decoder and, where the shapes agree, its tower."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file

from vtprune.tiny import tiny_folder


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    stored = load_file(tiny_folder("llava") / "model.safetensors")
    return {name: weight.float() for name, weight in stored.items()}


def _below(part: str) -> dict[str, torch.Tensor]:
    """Weights whose name contains `part.`, by the rest of their name; key prefixes differ between releases."""
    found = {name.split(part + ".", 1)[1]: w for name, w in _weights().items() if part + "." in name}
    if not found:
        raise KeyError(f"the shipped LLaVA has no weights below {part!r}; its file is damaged.")
    return found


@torch.no_grad()
def adopt_decoder(model: Any) -> None:
    """Copies the decoder, the word vectors and the head; biases and words that LLaVA lacks keep their start."""
    own = dict(model.model.language_model.named_parameters())
    for name, weight in _below("language_model").items():
        # releases differ in a "model." between the text model and its layers
        target = own.get(name.removeprefix("model."))
        if target is not None:
            target[: len(weight)].copy_(weight)
    head = next(weight for name, weight in _weights().items() if name.endswith("lm_head.weight"))
    model.lm_head.weight[: len(head)].copy_(head)
    for name, weight in own.items():
        if name.endswith("bias"):
            weight.zero_()
    words = model.get_input_embeddings().weight
    words[len(head) :].normal_(0, float(words[: len(head)].std()))
    model.lm_head.weight[len(head) :].zero_()


def _clip() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """CLIP's weights, and what the norm before its first layer multiplies by, averaged over positions.

    The towers that start from it have no such norm; the factor goes into their embeddings.
    """
    clip = {name.removeprefix("vision_model."): weight for name, weight in _below("vision_tower").items()}
    return clip, clip["pre_layrnorm.weight"] / clip["embeddings.position_embedding.weight"][1:].std()


@torch.no_grad()
def adopt_into_internvit(tower: Any, side: int) -> None:
    """Copies CLIP's patches, positions (resized to `side` patches a side), CLS and layers; layer scales are one."""
    clip, gain = _clip()
    patches = tower.embeddings.patch_embeddings.projection
    patches.weight.copy_(clip["embeddings.patch_embedding.weight"] * gain[:, None, None, None])
    patches.bias.copy_(clip["pre_layrnorm.bias"])
    table = clip["embeddings.position_embedding.weight"]
    old = round((len(table) - 1) ** 0.5)
    square = table[1:].T.reshape(1, -1, old, old)
    resized = torch.nn.functional.interpolate(square, size=(side, side), mode="bicubic").flatten(2)[0].T
    tower.embeddings.position_embeddings.copy_((torch.cat([table[:1], resized]) * gain)[None])
    tower.embeddings.cls_token.copy_(clip["embeddings.class_embedding"] * gain)
    names = {
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.projection_layer": "self_attn.out_proj",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for index, layer in enumerate(tower.encoder.layer):
        _copy(layer, clip, index, names)
        layer.lambda_1.fill_(1)
        layer.lambda_2.fill_(1)


@torch.no_grad()
def adopt_into_qwen_tower(tower: Any, fresh: int) -> None:
    """Copies CLIP's patch matrix (half of it for each of two equal frames) and layers.

    Places are rotary here, so the queries and keys of the first `fresh` layers, which in the tiny LLaVA read them off
    learned positions, keep their own start.
    """
    clip, gain = _clip()
    kernel = clip["embeddings.patch_embedding.weight"] * gain[:, None, None, None] / 2
    tower.patch_embed.proj.weight.copy_(kernel[:, :, None].expand_as(tower.patch_embed.proj.weight))
    names = {
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for index, block in enumerate(tower.blocks):
        _copy(block, clip, index, names)
        for kind in ("weight", "bias"):
            sides = getattr(block.attn.qkv, kind).chunk(3)
            for number, side in enumerate("qkv"):
                if side == "v" or index >= fresh:
                    sides[number].copy_(clip[f"encoder.layers.{index}.self_attn.{side}_proj.{kind}"])


def _copy(layer: Any, clip: dict[str, torch.Tensor], index: int, names: dict[str, str]) -> None:
    """Weights and biases of CLIP layer `index` into `layer`, by its names for them."""
    for target, source in names.items():
        for kind in ("weight", "bias"):
            getattr(layer.get_submodule(target), kind).copy_(clip[f"encoder.layers.{index}.{source}.{kind}"])
