"""Which positions the decoder layers of a prefill hold, group by group.

Axes: B samples, N positions of this call, M physical rows that are left, P columns of a layer's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.hooks.cache import CacheRecord, Group, physical_length, record_of
from vtprune.hooks.rows import Rows

__all__ = ["Groups"]


class Groups:
    """The groups of one call, in order of their first layer.

    Attributes:
        known: groups so far.
        old: what earlier calls left in the cache, or None.
        past: logical positions before this call.
        shift: [B, N] by how much the position of each token of this call moves down ("compact"), or None.
    """

    def __init__(self, cache: Any, past: int, position: Tensor, mask: Tensor | None) -> None:
        """`position` [..., B, N] are position ids of the call's tokens; `mask` [B, L] is False at padding, or None."""
        self._cache, self._position, self._mask = cache, position, mask
        self.known: list[Group] = []
        self.old = record_of(cache)
        self.past = past
        self.shift: Tensor | None = None
        self._lag: Tensor | None = None

    @property
    def newest(self) -> Group:
        """The group that layers run in now."""
        return self.known[-1]

    @property
    def lags_alike(self) -> bool:
        """The newest group's position ids lag behind as the first's do."""
        return self.known[-1].lag is self.known[0].lag

    def close_up(self, gone: Tensor) -> None:
        """Move tokens down over those that are `gone` [B, N], in the groups that are opened from now on."""
        self.shift, self._lag = gone.cumsum(1), gone.sum(1)

    def open(self, first: int, rows: Rows, pruned: bool) -> Group:
        """Book the columns that the layers from `first` on will hold; `pruned` if a row of this call has left."""
        old = None if self.old is None else self.old.group_of(first)
        lag = self._lag
        if old is not None and old.lag is not None:
            lag = old.lag if lag is None else old.lag.to(lag.device) + lag
        length = physical_length(self._cache, first) + rows.length
        if old is not None:
            past_dense = old.dense
        else:
            past_dense = self._mask is None or self.past == 0 or bool(self._mask[:, : self.past].all())
        dense = rows.dense and past_dense
        if not pruned and (old is None or old.columns is None):
            group = Group(first, None, length, lag, dense)
        else:
            known = Group(0, None, self.past, None, True) if old is None else old
            logical = self.past if self.old is None else self.old.length
            batch, device = rows.position.shape[0], rows.position.device
            past = known.columns_to(length - rows.length, logical, batch, device)
            new = (rows.position + self.past).masked_fill(~rows.filled, -1)
            group = Group(first, torch.cat([past, new], 1), length, lag, dense)
        self.known.append(group)
        return group

    def positions(self, rows: Rows) -> Tensor:
        """[..., B, M] position ids of the rows in the newest group."""
        position = self._position if self.shift is None else self._position - self.shift
        position = position.gather(-1, rows.position.expand(*position.shape[:-2], -1, -1))
        old = None if self.old is None else self.old.group_of(self.newest.first)
        return position if old is None or old.lag is None else position - old.lag[:, None].to(position.device)

    def record(self, length: int, batch: int) -> CacheRecord:
        """What the cache must remember; `length` is N."""
        return CacheRecord(self.past + length, self.known, batch)
