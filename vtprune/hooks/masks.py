"""The attention masks of layers from which rows are missing.

The host counts windows and blocks by row. Where rows were dropped, a row's original position decides instead, so that
every query sees what it sees in the unpruned prompt, less what was dropped. Dropping brings rows only closer: the rows
that a sliding cache layer still holds always include those in the window.

Axes: B samples, N logical positions, P physical columns, Q queries of this call, K keys that a layer's attention gets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vtprune.errors import InputError
from vtprune.hooks.cache import Group, physical_length
from vtprune.hooks.families.base import Parts
from vtprune.hooks.windows import Blocks

__all__ = ["Masks"]

_BACKENDS = ("sdpa", "eager")


class Masks:
    """Masks of one call's decoder layers.

    Attributes:
        plain: every query sees all earlier tokens in every layer, as the host's own masks have it.
    """

    def __init__(self, parts: Parts, blocks: Blocks | None) -> None:
        """Raises InputError if the attention backend takes no mask of its own for windows or blocks."""
        self._windows, self._blocks = parts.windows, blocks
        self._config: Any = parts.text_model.config
        self.plain = not any(parts.windows) and blocks is None
        backend = self._config._attn_implementation
        if not self.plain and backend not in _BACKENDS:
            raise InputError(
                f"attention {backend!r} counts sliding windows by row and has no two-way blocks, which is wrong where "
                f"tokens were dropped. Load the model with attn_implementation set to {' or '.join(_BACKENDS)}."
            )

    def begin(self, cache: Any, mask: Tensor | None, past: int, length: int) -> None:
        """Note the call.

        Args:
            cache: the KV cache, or None.
            mask: [B, N] the host's mask over logical positions, or None.
            past: logical positions before this call.
            length: logical length at the end of the last prefill, which may be this call.
        """
        self._cache, self._mask, self._past, self._length = cache, mask, past, length

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None if it sees everything."""
        return self._windows[layer] if self._windows else None

    def of(self, layer: int, group: Group, hidden: Tensor) -> Any:
        """The mask for layer `layer` of `group`, which is about to run on `hidden` [B, Q, D], in the backend's form."""
        batch, queries = hidden.shape[:2]
        physical = physical_length(self._cache, layer) + queries
        if self._sees_all(layer, physical, group):
            # one query sees every key: without padding it needs no mask in any backend
            if group.dense and queries == 1:
                return None
            return create_causal_mask(
                config=self._config,
                inputs_embeds=hidden,
                attention_mask=group.mask(self._mask, physical, self._length, batch, hidden.device),
                past_key_values=self._cache,
                layer_idx=layer,
            )
        keys = physical if self._cache is None else int(self._cache.get_mask_sizes(queries, layer)[0])
        columns = group.columns_to(physical, self._length, batch, hidden.device)
        see = self.visible(layer, group, columns[:, -queries:], keys, physical)[:, None]
        if self._config._attn_implementation == "eager":
            return hidden.new_zeros(()).where(see, torch.finfo(hidden.dtype).min)
        return see

    def _sees_all(self, layer: int, physical: int, group: Group) -> bool:
        window = self.window(layer)
        logical = self._length + physical - group.length
        return self._blocks is None and (window is None or logical <= window)

    def row(self, layer: int, group: Group, query: Tensor, keys: int) -> Tensor | None:
        """[B, K] which keys of a layer that has just run one query sees; None if it sees all.

        Args:
            layer: decoder layer.
            group: its group.
            query: [B, 1] position of the query in this call.
            keys: K; they are the last ones of the layer.
        """
        if self._sees_all(layer, group.length, group):
            return group.mask(self._mask, group.length, self._length, len(query), query.device)
        return self.visible(layer, group, query + self._past, keys, group.length)[:, 0]

    def rows(self, layer: int, group: Group, queries: Tensor, keys: int) -> Tensor:
        """[B, Q, K] which keys of a layer some of its queries see; the arguments are those of `row`, for [B, Q]."""
        return self.visible(layer, group, queries + self._past, keys, group.length)

    def visible(self, layer: int, group: Group, queries: Tensor, keys: int, physical: int) -> Tensor:
        """[B, Q, K] which keys each query sees.

        Args:
            layer: decoder layer.
            group: its group.
            queries: [B, Q] logical positions.
            keys: K; they are the last ones of the layer.
            physical: P, columns of the layer, this call's included.
        """
        batch, device, window = len(queries), queries.device, self.window(layer)
        columns = group.columns_to(physical, self._length, batch, device)[:, -keys:]
        real = group.mask(self._mask, physical, self._length, batch, device)
        query, key = queries[:, :, None], columns[:, None, :]
        see = key <= query
        near = key > query - window if window is not None else torch.ones_like(see)
        if self._blocks is None:
            see = see & near
        else:
            mine, theirs = self._block_of(queries)[:, :, None], self._block_of(columns)[:, None, :]
            same = (mine == theirs) & (mine >= 0)
            inside = self._blocks.within_window
            see = (see | same) & near if inside else (see & near) | (same & self._held(layer, key))
        return see if real is None else see & real[:, None, -keys:]

    def _block_of(self, columns: Tensor) -> Tensor:
        """[B, n] block of each logical position, -1 where there is none."""
        ids = self._blocks.ids.to(columns.device)  # type: ignore[union-attr]
        known = (columns >= 0) & (columns < ids.shape[1])
        return ids.gather(1, columns.clamp(0, ids.shape[1] - 1)).masked_fill(~known, -1)

    def _held(self, layer: int, key: Tensor) -> Tensor:
        """True where the unpruned cache would still hold a key for this call."""
        window = self.window(layer)
        # a cache made without the config grows its layers as they come and lets none slide
        slides = self._cache is not None and list(self._cache.is_sliding)[layer : layer + 1] == [True]
        if window is None or not slides:
            return torch.ones_like(key, dtype=torch.bool)
        return key > self._past - window
