"""Which visual tokens are still there: the book that tower stages and decoder stages share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.choice import Choice, choose
from vtprune.contract import AttentionView, Memory, Scorer, TextView, TokenView
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.layout import Layout
from vtprune.plan import Site, Stage
from vtprune.report import Kept
from vtprune.rules import Merge, own_index
from vtprune.stopwatch import scoring

__all__ = ["Alive", "Cut", "cut_counts", "make_cut", "merge_states", "observe_all", "record_cut", "token_view"]


@dataclass
class Alive:
    """Visual tokens still alive, a row for each sample (in the decoder) or image (in a tower).

    Attributes:
        original: [B, V] index among the row's original visual tokens, increasing; padded at the end.
        counts: alive tokens of each row.
        memory: running signals of the scorers, by scorer name: [B, V, ...], or [B, V, c, ...] where a token is made of
            c patches.
        patches: c, 1 if `memory` has no such axis.
        size: [B, V] how many original tokens each one stands for, fp32; None if none was merged.
    """

    original: Tensor
    counts: list[int]
    memory: dict[str, Memory] = field(default_factory=dict)
    size: Tensor | None = None
    patches: int = 1

    @classmethod
    def all_of(cls, counts: Sequence[int], device: torch.device) -> Alive:
        """Every token of every row."""
        width = max(counts, default=0)
        return cls(torch.arange(width, device=device).expand(len(counts), width), list(counts))

    def to(self, device: torch.device) -> Alive:
        """The same on another device."""
        if self.original.device == device and not self.memory:
            return self
        memory = {name: {key: signal.to(device) for key, signal in mine.items()} for name, mine in self.memory.items()}
        size = None if self.size is None else self.size.to(device)
        return Alive(self.original.to(device), self.counts, memory, size, self.patches)

    @property
    def valid(self) -> Tensor:
        """[B, V] False at padding of the V axis."""
        width = self.original.shape[1]
        device = self.original.device
        if all(n == width for n in self.counts):
            return torch.ones(self.original.shape, dtype=torch.bool, device=device)
        return torch.arange(width, device=device)[None] < torch.tensor(self.counts, device=device)[:, None]

    def keep(self, kept: Tensor, counts: list[int]) -> tuple[Alive, Tensor]:
        """The tokens marked in `kept` [B, V], `counts` of them a row.

        Returns:
            the survivors, and [B, V'] the index of each on the old V axis.
        """
        width = max(counts, default=0)
        index = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :width]
        memory = {
            name: dict(zip(signals, keep_tokens(list(signals.values()), index), strict=True))
            for name, signals in self.memory.items()
        }
        size = None if self.size is None else self.size.gather(1, index)
        return Alive(self.original.gather(1, index), counts, memory, size, self.patches), index

    def absorb(self, owner: Tensor) -> Alive:
        """The same tokens once each stands for those that `owner` [B, V] gives it too."""
        before = torch.ones_like(self.original, dtype=torch.float32) if self.size is None else self.size
        before = before.masked_fill(~self.valid, 0.0)
        size = torch.zeros_like(before).scatter_add(1, owner.where(self.valid, own_index(owner)), before)
        return dataclasses.replace(self, size=size.clamp(min=1.0))


@dataclass(frozen=True)
class Cut:
    """What one stage decided.

    Attributes:
        alive: the survivors.
        index: [B, V'] index of each survivor on the old V axis.
        merge: who stands for whom, on the old V axis; None if tokens are dropped.
        scores: [B, V] what the scorer returned, or None if nobody wants to know, or it selects directly.
        before: alive tokens of each row before the cut.
    """

    alive: Alive
    index: Tensor
    merge: Merge | None
    scores: Tensor | None
    before: Alive


def cut_counts(stage: Stage, totals: Sequence[int], alive: Sequence[int]) -> list[int]:
    """Survivors (or, if the stage is adaptive, the target) of each row: never more than are alive."""
    return [min(stage.count(total), now) for total, now in zip(totals, alive, strict=True)]


@scoring()
@torch.no_grad()
def observe_all(scorers: Sequence[Scorer], view: AttentionView, alive: Alive, patches: int = 1) -> None:
    """Let scorers read a block. Choices are indices, so no gradient passes through what they are made from.

    Args:
        scorers: who reads.
        view: what there is to read, [B, V * patches].
        alive: whose memory takes it.
        patches: rows of the block that make one token; scorers see each of them, and a cut their mean.
    """
    for scorer in scorers:
        before = alive.memory.get(scorer.name, {})
        if patches > 1:
            before = {name: signal.flatten(1, 2) for name, signal in before.items()}
        after = scorer.observe(view, before)
        if patches > 1:
            after = {name: signal.unflatten(1, (-1, patches)) for name, signal in after.items()}
        alive.memory[scorer.name] = after
    alive.patches = patches


@scoring()
@torch.no_grad()
def make_cut(
    stage: Stage,
    alive: Alive,
    hidden: Tensor,
    keep: list[int],
    layout: Layout | None,
    grids: Sequence[Sequence[tuple[int, int]]],
    text_key: tuple[tuple[int, ...], ...],
    text: TextView | None,
    want_scores: bool,
) -> Cut:
    """Let the stage's scorer choose the survivors.

    Args:
        stage: the stage that cuts.
        alive: tokens before the cut.
        hidden: [B, V, D] their states.
        keep: survivors asked of each row (the target, if the stage is adaptive).
        layout: the decoder's layout, or None in a tower, where a row is one image, crop or frame of `grids[b][0]`.
        grids: for each row, (rows, cols) of its images.
        text_key, text: see `TokenView`.
        want_scores: also return the scores.

    Raises:
        PlanError: if a rule keeps another number of tokens than asked.
    """
    view = token_view(stage.site, stage.scorer, alive, hidden, keep, layout, grids, text_key, text)
    choice: Choice = choose(stage, view, keep)
    after = alive if choice.merge is None else alive.absorb(choice.merge.owner)
    after, index = after.keep(choice.kept, choice.counts)
    scores = None if choice.scores is None or not want_scores else choice.scores.float()
    return Cut(after, index, choice.merge, scores, alive)


def merge_states(hidden: Tensor, merge: Merge, alive: Alive) -> Tensor:
    """[B, V, D] states of tokens `alive` before a cut -> the same once survivors hold what was merged into them."""
    weight = alive.size if merge.weight is None else merge.weight
    if merge.summed:
        mean, total = merge_tokens(hidden, merge.owner, alive.valid, weight, totals=True)
        merged = (mean.float() * total[..., None]).to(hidden.dtype).where((total > 0)[..., None], hidden)
    else:
        merged = merge_tokens(hidden, merge.owner, alive.valid, weight)
    if merge.near is None or merge.share is None:
        return merged
    return _with_shares(hidden, merged, merge.kept & alive.valid, merge.near, merge.share)


def _with_shares(hidden: Tensor, merged: Tensor, kept: Tensor, near: Tensor, share: Tensor) -> Tensor:
    """`merged` [B, V, D] plus, where `kept`, the states `hidden` of `near` weighted by `share` (see `Merge`)."""
    at = kept.flatten().nonzero()[:, 0]
    if not len(at):
        return merged
    first = at.div(kept.shape[1], rounding_mode="floor") * kept.shape[1]
    index, flat = near.flatten(0, 1)[at] + first[:, None], hidden.flatten(0, 1)
    # adds up k rows a survivor without laying them side by side
    taken = functional.embedding_bag(
        index, flat.float(), per_sample_weights=share.flatten(0, 1)[at].float(), mode="sum"
    )
    own = merged.flatten(0, 1)
    return own.index_copy(0, at, (own[at].float() + taken).to(own.dtype)).view_as(merged)


def record_cut(site: Site, alive: Alive, cut: Cut | None, text: tuple[Tensor, ...] | None = None) -> Kept:
    """What a stage at `site` left `alive`; `cut` is None if it dropped nothing, `text` as in `Kept`."""

    def split(values: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        return tuple(row[:n] for row, n in zip(values.to(alive.original.device), counts, strict=True))

    record = Kept(site, split(alive.original, alive.counts), text=text)
    if cut is None:
        return record
    before = split(cut.before.original, cut.before.counts)
    if cut.scores is not None:
        record = dataclasses.replace(record, scores=split(cut.scores, cut.before.counts), alive=before)
    if cut.merge is not None:
        owners = split(cut.before.original.gather(1, cut.merge.owner.where(cut.before.valid, 0)), cut.before.counts)
        record = dataclasses.replace(record, merged=_merged(before, owners, record.indices))
    return record


def _merged(before: tuple[Tensor, ...], owners: tuple[Tensor, ...], indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each sample [2, n] the tokens that left into another, and which: `Kept.merged`."""
    pairs = []
    for token, owner, kept in zip(before, owners, indices, strict=True):
        gone = (token != owner) & torch.isin(owner, kept)
        pairs.append(torch.stack([token[gone], owner[gone]]))
    return tuple(pairs)


def token_view(
    site: Site,
    scorer: Scorer,
    alive: Alive,
    hidden: Tensor,
    keep: list[int],
    layout: Layout | None,
    grids: Sequence[Sequence[tuple[int, int]]],
    text_key: tuple[tuple[int, ...], ...],
    text: TextView | None,
) -> TokenView:
    """What a scorer sees; arguments as in `make_cut`."""
    original = alive.original
    if layout is None:
        cols = torch.tensor([row[0][1] for row in grids], device=original.device)[:, None].clamp(min=1)
        grid, row, col = torch.zeros_like(original), original // cols, original % cols
    else:
        grid, row, col = (t.gather(1, original) for t in (layout.grid, layout.row, layout.col))
    return TokenView(
        site=site,
        hidden=hidden,
        valid=alive.valid,
        original=original,
        grid=grid,
        row=row,
        col=col,
        grids=tuple(tuple(g) for g in grids),
        keep=torch.tensor(keep, device=original.device),
        memory={
            name: signal.mean(2) if alive.patches > 1 else signal
            for name, signal in alive.memory.get(scorer.name, {}).items()
        },
        text_key=text_key,
        text=text,
        images=((0,),) * len(keep) if layout is None else layout.images,
        frames=() if layout is None else tuple(tuple(g.frame for g in sample) for sample in layout.grids),
        size=alive.size,
    )
