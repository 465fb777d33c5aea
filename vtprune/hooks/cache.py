"""What a KV cache must remember about a pruned prompt: which logical position each physical column holds.

The record lies on the cache object itself, so it lives and dies with the conversation, and a deep copy of the cache
(prompt reuse) carries it along. Logical positions count every prompt token, dropped or not; they are what `generate`,
attention masks and position ids of the host speak of.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

__all__ = ["CacheRecord", "Group", "peek", "physical_length", "record_of", "write_record"]

_ATTRIBUTE = "_vtprune_record"


@dataclass
class Group:
    """Decoder layers `first` and up (to the next group), which all hold the same tokens.

    Attributes:
        first: first decoder layer of the group.
        columns: [B, P] logical position of each physical column, -1 where the column is padding; None if the first P
            columns are the logical positions 0..P-1 themselves.
        length: P, columns written by the last prefill.
        lag: [B] by how much this group's position ids lag behind logical positions ("compact"), or None.
        dense: every column holds a real token, so no padding mask is ever needed.
    """

    first: int
    columns: Tensor | None
    length: int
    lag: Tensor | None
    dense: bool

    def columns_to(self, physical: int, logical: int, batch: int, device: torch.device) -> Tensor:
        """[B, physical] columns including those that decode steps appended after `logical` prompt positions.

        Drafts that came with the prompt and were rejected are the last ones, and were taken out of the cache again.
        """
        known = self.columns
        if known is None:
            known = torch.arange(self.length, device=device).expand(batch, -1)
        extra = torch.arange(logical, logical + max(0, physical - self.length), device=device).expand(batch, -1)
        return torch.cat([known.to(device)[:, :physical], extra], 1)

    def mask(self, mask: Tensor | None, physical: int, logical: int, batch: int, device: torch.device) -> Tensor | None:
        """[B, physical] 2-D attention mask of this group, or None if nothing needs masking.

        Args:
            mask: [B, L] the host's mask over logical positions, or None.
            physical: columns that the group's keys will have, the present call's included.
            logical: logical length at the end of the last prefill.
            batch, device: of the result.
        """
        if self.dense:
            return None
        columns = self.columns_to(physical, logical, batch, device)
        real = columns >= 0
        if mask is None:
            return real
        return mask.to(device).bool().gather(1, columns.clamp(min=0)) & real


@dataclass
class CacheRecord:
    """One conversation's pruned prompt.

    Attributes:
        length: logical length at the end of the last prefill.
        groups: in order of `first`; the first starts at layer 0.
        batch: rows of the cache.
    """

    length: int
    groups: list[Group]
    batch: int

    def group_of(self, layer: int) -> Group:
        """The group that holds a decoder layer."""
        return [g for g in self.groups if g.first <= layer][-1]


def physical_length(cache: Any, layer: int) -> int:
    """Columns that one layer's cache holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def record_of(cache: Any) -> CacheRecord | None:
    """The record of a cache, or None if nothing was pruned in it (or it was reset since)."""
    record = getattr(cache, _ATTRIBUTE, None)
    if record is None or physical_length(cache, 0) == 0:
        return None
    return record


def _logical_length(cache: Any, layer_idx: int | None = None) -> int:
    # `generate` asks without a layer and means the prompt's length; masks ask for a layer and mean its columns
    record = record_of(cache)
    if layer_idx is not None or record is None:
        return type(cache).get_seq_length(cache, layer_idx or 0)
    return record.length + physical_length(cache, 0) - record.groups[0].length


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    return physical_length(cache, layer_idx)


def peek(cache: Any) -> Any:
    """A cache that holds the same keys and values; what is added to it does not reach `cache`. None stays None."""
    if cache is None:
        return None
    shown = copy.copy(cache)
    # layers replace their tensors when they grow, and never write into them
    shown.layers = [copy.copy(layer) for layer in cache.layers]
    record = record_of(cache)
    if record is not None:
        write_record(shown, record)
    return shown


def write_record(cache: Any, record: CacheRecord) -> None:
    """Tie a record to a cache. If layer 0 was shortened, the cache answers with logical lengths from now on."""
    setattr(cache, _ATTRIBUTE, record)
    if record.groups[0].length != record.length:
        cache.get_seq_length = MethodType(_logical_length, cache)
        cache.get_query_offset = MethodType(_query_offset, cache)
