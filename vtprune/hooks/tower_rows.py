"""The physical rows of a vision tower that shrinks, and what the host's arguments become when they do.

Axes: U units, M rows of the longest unit (CLS included), R rows of all of them, V alive cells, c patches of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.errors import HostContractError
from vtprune.hooks.alive import Alive, merge_states
from vtprune.hooks.units import Packing, Unit, table
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.rules import Merge

__all__ = ["TowerRows"]

# where the sequences end, and under which name the host says how long the longest is
_BOUNDS = {"cu_seqlens": "max_seqlen", "cu_seq_lens_q": "max_length_q", "cu_seq_lens_k": "max_length_k"}


class TowerRows:
    """Which rows the tower still has.

    Attributes:
        rows: [U, M] which of its unit's first rows each row is.
        cell: c.
        pruned: a row has left.
    """

    def __init__(self, units: Sequence[Unit], prefix: int, packing: Packing, device: torch.device) -> None:
        self._prefix, self._packing = prefix, packing
        self.cell = units[0].rows.shape[1]
        self._whole = [prefix + unit.patches for unit in units]
        self._had = [unit.cells for unit in units]
        self._seats = table([unit.rows for unit in units], device) + prefix
        self.rows = Alive.all_of(self._whole, device)
        self.pruned = False
        # what the host's arguments become; it hands the same objects to every block
        self._ready: dict[int, tuple[Any, Any]] = {}

    @property
    def packed(self) -> bool:
        """All units lie in one sequence."""
        return self._packing != "padded"

    @property
    def total(self) -> int:
        """Rows that a block runs on, padding included."""
        return sum(self.rows.counts) if self.packed else len(self._whole) * max(self.rows.counts)

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        if self._seats.device != device:
            self._seats = self._seats.to(device)
            self.rows = self.rows.to(device)

    def check(self, hidden: Tensor) -> None:
        """Refuse states that are not those of the units.

        Raises:
            HostContractError: with both sizes.
        """
        found = hidden.numel() // hidden.shape[-1]
        if found != self.total:
            raise HostContractError(
                f"the vision tower runs on states of shape {tuple(hidden.shape)}, but {len(self._whole)} image(s), "
                f"crops or frames of this call make {self.total} rows. Check that pixels and sizes fit the config; "
                "otherwise please report it with your transformers version."
            )

    # which rows make which cells

    def columns(self, cells: Alive) -> Tensor:
        """[U, V * c] which of its unit's rows hold the patches of each alive cell."""
        seats = self._seats_of(cells)
        if not self.pruned:
            return seats
        place = torch.zeros(len(self._whole), max(self._whole), dtype=torch.long, device=seats.device)
        now = self.rows.original
        place.scatter_(1, now, torch.arange(now.shape[1], device=now.device).expand_as(now))
        return place.gather(1, seats)

    def patches(self, valid: Tensor) -> Tensor:
        """[U, V] -> [U, V * c]: the same for each patch of a cell."""
        return valid.repeat_interleave(self.cell, 1)

    def states(self, hidden: Tensor, cells: Alive) -> Tensor:
        """[U, V, D] states of the alive cells: the mean of their patches."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        # units without rows point behind the last one
        index = (self.columns(cells) + self._starts(self.rows.counts)).clamp(max=len(flat) - 1)
        return flat[index].unflatten(1, (-1, self.cell)).mean(2)

    def merge(self, cells: Alive, hidden: Tensor, merge: Merge) -> Tensor:
        """The same states once the rows of survivors hold what was merged into them, patch by patch of a cell."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = self.columns(cells) + self._starts(self.rows.counts)
        there = self.patches(cells.valid)
        states = flat[index.clamp(max=len(flat) - 1)].unflatten(1, (-1, self.cell)).flatten(2)
        merged = merge_states(states, merge, cells).unflatten(2, (self.cell, -1)).flatten(1, 2)
        return flat.index_copy(0, index[there], merged[there]).view(hidden.shape)

    def keep(self, cells: Alive, hidden: Tensor) -> Tensor:
        """Drop all rows but CLS and those of `cells`; the states that are left.

        Patches of no cell leave their unit with its first cell, so that no unit depends on its neighbours.
        """
        counts = [
            whole if 0 < had == n else self._prefix + n * self.cell
            for whole, had, n in zip(self._whole, self._had, cells.counts, strict=True)
        ]
        stay = torch.zeros(len(self._whole), max(self._whole), dtype=torch.int32, device=hidden.device)
        stay[:, : self._prefix] = 1
        untouched = [n == whole for n, whole in zip(counts, self._whole, strict=True)]
        stay[torch.tensor(untouched, device=hidden.device)] = 1
        stay.scatter_add_(1, self._seats_of(cells), self.patches(cells.valid).int())
        kept = (stay.gather(1, self.rows.original) > 0) & self.rows.valid
        starts = self._starts(self.rows.counts)
        self.rows, index = self.rows.keep(kept, counts)
        self.pruned = True
        self._ready.clear()
        if not self.packed:
            return keep_tokens([hidden], index)[0]
        left = (index + starts)[self.rows.valid]
        return hidden.reshape(-1, hidden.shape[-1])[left].view(*hidden.shape[:-2], -1, hidden.shape[-1])

    def full(self, hidden: Tensor) -> Tensor:
        """States of the rows that are left -> of all rows the tower began with, zeros where one left."""
        source = hidden if self.packed else hidden[self.rows.valid]
        length = sum(self._whole) if self.packed else len(self._whole) * max(self._whole)
        flat = hidden.new_zeros(length, hidden.shape[-1])
        flat = flat.index_copy(0, self._first(), source.reshape(-1, hidden.shape[-1]))
        lead = hidden.shape[:-2] if self.packed else (len(self._whole),)
        return flat.view(*lead, -1, hidden.shape[-1])

    # what attention gets

    def real(self) -> Tensor | None:
        """[U, M] False at padding; None if there is none."""
        if all(n == self.rows.original.shape[1] for n in self.rows.counts):
            return None
        # a unit that lost all its rows must stay finite, though nobody reads it
        empty = torch.tensor([n == 0 for n in self.rows.counts], device=self.rows.original.device)
        return self.rows.valid | empty[:, None]

    def spread(self, states: Tensor) -> Tensor:
        """Queries, keys or values as the tower has them -> [U, H, M, d]."""
        if not self.packed or len(self._whole) == 1:
            return states
        index = self._starts(self.rows.counts) + torch.arange(max(self.rows.counts), device=states.device)
        return states[0][:, index.clamp(max=states.shape[2] - 1)].transpose(0, 1)

    def arguments(self, rest: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The host's arguments of a block, cut to the rows that are left. Its states come first and are not in `rest`.

        Raises:
            HostContractError: if nothing says where the units of one sequence end.
        """
        if not self.packed:
            return rest, named
        changed = dict(named)
        for name, value in named.items():
            if name in _BOUNDS and value is not None:
                changed[name] = bounds = self._once(value, self._bounds)
                longest = _BOUNDS[name]
                if named.get(longest) is not None:
                    changed[longest] = int((bounds[1:] - bounds[:-1]).max())
            elif name == "position_embeddings" and value is not None:
                changed[name] = tuple(self._once(angles, self._angles) for angles in value)
            elif name == "position_ids" and value is not None:
                changed[name] = value.index_select(-1, self._first().to(value.device))
        if self._packing == "mask":
            if rest and rest[0] is not None:
                return (self._once(rest[0], self._block_mask), *rest[1:]), changed
            if named.get("cu_seq_lens_q") is None:
                raise HostContractError(
                    "the vision tower got neither a mask nor cu_seq_lens_q, so that nothing tells its images apart "
                    "once rows have left. Use the sdpa or eager attention backend, or a newer transformers."
                )
        return rest, changed

    def pairs(self, named: dict[str, Any]) -> int:
        """Products of a query and a key that a block computes, from its arguments as they now are."""
        if not self.packed:
            return len(self._whole) * max(self.rows.counts) ** 2
        bounds = next((named[name] for name in _BOUNDS if named.get(name) is not None), None)
        if bounds is None:
            return self.total**2
        return sum(n * n for n in self._once(bounds, _lengths))

    # helpers

    def _seats_of(self, cells: Alive) -> Tensor:
        index = cells.original[..., None].expand(-1, -1, self.cell)
        return self._seats.gather(1, index).flatten(1)

    def _starts(self, lengths: list[int]) -> Tensor:
        """[U, 1] where each unit begins in flattened states of that many rows a unit."""
        device = self.rows.original.device
        if not self.packed:
            return torch.arange(len(lengths), device=device)[:, None] * max(lengths)
        each = torch.tensor(lengths, device=device)
        return (each.cumsum(0) - each)[:, None]

    def _first(self) -> Tensor:
        """[rows that are left] where each was when the tower began, flattened."""
        return (self.rows.original + self._starts(self._whole))[self.rows.valid]

    def _once(self, value: Any, make: Any) -> Any:
        known = self._ready.get(id(value))
        if known is None:
            known = self._ready[id(value)] = (value, make(value))
        return known[1]

    def _angles(self, angles: Tensor) -> Tensor:
        return angles.index_select(-2, self._first().to(angles.device))

    def _block_mask(self, mask: Tensor) -> Tensor:
        first = self._first().to(mask.device)
        return mask.index_select(-2, first).index_select(-1, first)

    def _bounds(self, bounds: Tensor) -> Tensor:
        left = torch.zeros(sum(self._whole), dtype=torch.long, device=bounds.device)
        left[self._first().to(bounds.device)] = 1
        ends = functional.pad(left.cumsum(0), (1, 0))[bounds.long()]
        # a segment that lost all its rows is none
        return torch.unique_consecutive(ends).to(bounds.dtype)


def _lengths(bounds: Tensor) -> list[int]:
    return (bounds[1:] - bounds[:-1]).tolist()
