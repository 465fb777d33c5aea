"""The state of one call of the model: a decode step over a pruned cache, or a prefill that prunes.

Both answer the same two questions for each group of decoder layers that holds the same tokens: which 2-D mask do its
keys have, and which position ids do its queries have. A prefill also shortens the hidden states between groups.

Axes: B samples, N positions of this call, M physical rows the current group still has, V alive visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import HostContractError, InputError
from vtprune.hooks.cache import CacheRecord, Group, physical_length
from vtprune.hooks.families.base import Parts, Prompt
from vtprune.hooks.masks import Masks
from vtprune.kernels.keep_tokens import keep_tokens

__all__ = ["GroupInputs", "Step", "check_per_token", "keep_angles", "padding_mask", "token_positions"]

_KNOWN = frozenset(
    {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache", "inputs_embeds",
     "hidden_states", "input_ids", "visual_pos_masks"}
)  # fmt: skip


def check_per_token(arguments: dict[str, Any], length: int, where: str) -> None:
    """Refuse keyword arguments that carry a token axis and that nobody would gather.

    Raises:
        HostContractError: naming the argument, so that a change in transformers is an error and not a wrong answer.
    """
    for name, value in arguments.items():
        if name not in _KNOWN and isinstance(value, Tensor) and value.ndim and length in value.shape:
            raise HostContractError(
                f"{where} was passed {name!r} of shape {tuple(value.shape)}, which has a token axis of {length} that "
                f"vtprune does not know. Known per-token arguments: {', '.join(sorted(_KNOWN))}. Please report it with "
                "your transformers version."
            )


def token_positions(position: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """[..., B, N] position ids of a call's own tokens; M-RoPE has an axis in front.

    Args:
        position: what the host passes on, or None.
        past: logical positions before this call.
        embeds: [B, N, D] the tokens.

    Raises:
        InputError: if there is not one position a token.
    """
    batch, length = embeds.shape[:2]
    if position is None:
        position = torch.arange(past, past + length, device=embeds.device)[None]
    if position.shape[-1] != length:
        # what M-RoPE models of transformers 5.16 to 5.23 make of a cache, a 2-D mask and no position_ids
        raise InputError(
            f"position_ids hold {position.shape[-1]} positions for the {length} token(s) of this call; pass one each. "
            "If you passed none, the model counted them from attention_mask: pass position_ids, or leave the "
            "mask out where nothing is padded."
        )
    return position.expand(*position.shape[:-2], batch, -1)


def keep_angles(angles: Tensor, index: Tensor) -> Tensor:
    """[B or 1, N, d] cos or sin -> [B, M, d]; with an axis in front where the host merges M-RoPE only later."""
    if angles.ndim == 4:
        return torch.stack([keep_angles(axis, index) for axis in angles])
    return keep_tokens([angles.expand(index.shape[0], -1, -1)], index)[0]


def padding_mask(arguments: dict[str, Any], prompt: Prompt, parts: Parts) -> Tensor | None:
    """[B, L] the host's 2-D mask over logical positions, or None if nothing is padding.

    Args:
        arguments: of the text model, which some roots hand ready masks of more axes instead.
        prompt: the call as its root got it.
        parts: of the model; says whether its family knows what those masks hold.

    Raises:
        HostContractError: if it does not.
    """
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    if mask is not None and not parts.ready_masks:
        raise HostContractError(
            f"{type(parts.root).__name__} hands its text model a ready {type(mask).__name__} of masks, and nobody "
            "knows whether they are causal. Please report it with your transformers version."
        )
    return prompt.attention_mask


@dataclass
class GroupInputs:
    """What the layers of one group get instead of the host's tensors.

    Attributes:
        attention_mask: in the backend's own form, or None.
        position_ids: [B, M], [axes, B, M] under M-RoPE, or the host's.
        position_embeddings: (cos, sin), each [B, M, d], or as the host has them under M-RoPE.
    """

    attention_mask: Any
    position_ids: Tensor | None
    position_embeddings: tuple[Tensor, Tensor]


class Step:
    """A call that adds tokens to a pruned cache and drops none: decode steps, later text turns, assisted decoding."""

    def __init__(self, parts: Parts, record: CacheRecord, prompt: Prompt) -> None:
        if record.batch != prompt.batch:
            raise InputError(
                f"the cache holds a pruned conversation of {record.batch} row(s), but the call has {prompt.batch}. "
                "Expand the batch before the prompt is processed, not after."
            )
        self._parts, self._record, self._prompt = parts, record, prompt
        # what is added is text, which belongs to no block
        self._masks = Masks(parts, None)
        self._position = torch.empty(0, dtype=torch.long)
        self._ready: dict[tuple[int, int | None], GroupInputs] = {}

    def text(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Mask and positions of the first group; called before the text model runs."""
        embeds, cache = arguments["inputs_embeds"], arguments["past_key_values"]
        batch, length = embeds.shape[:2]
        first = self._record.groups[0]
        logical = int(cache.get_seq_length())
        mask = padding_mask(arguments, self._prompt, self._parts)
        self._masks.begin(cache, mask, logical, self._record.length)
        self._position = token_positions(arguments.get("position_ids"), logical, embeds)
        changed = dict(arguments)
        if first.columns is not None:
            physical = physical_length(cache, 0) + length
            changed["attention_mask"] = first.mask(mask, physical, self._record.length, batch, embeds.device)
        if first.lag is not None:
            changed["position_ids"] = self._position - first.lag[:, None].to(self._position.device)
        return changed

    def layer(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """What decoder layer `index` runs on; None leaves it as the host has it."""
        group = self._record.group_of(index)
        if group.first == 0 and (group.columns is None or self._masks.plain):
            return None
        key = (group.first, self._masks.window(index))
        if key not in self._ready:
            self._ready[key] = self._prepare(index, group, hidden, arguments)
        return hidden, {**arguments, **vars(self._ready[key])}

    def text_output(self, hidden: Tensor) -> Tensor:
        """[B, N, D] what the text model returns; nothing was dropped."""
        return hidden

    def _prepare(self, index: int, group: Group, hidden: Tensor, arguments: dict[str, Any]) -> GroupInputs:
        embeddings, position = arguments["position_embeddings"], arguments.get("position_ids")
        if group.lag is not None and group.lag is not self._record.groups[0].lag:
            position = (self._position - group.lag[:, None].to(self._position.device)).to(hidden.device)
            embeddings = self._parts.rotary(hidden, position_ids=position)
        return GroupInputs(self._masks.of(index, group, hidden), position, embeddings)
