"""Views as the engine makes them, from samples that can be batched, padded and poisoned at will."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, VisionGeometry
from vtprune.contract import AttentionView, Memory, Scorer, TextView, TokenView, TransitionView
from vtprune.plan import Site
from vtprune.scorers.learned import LearnedScorer

HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 4, 2, 8, 16
# LLaVA-1.5-7B
LLAVA = Geometry(
    family="llava",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    intermediate=11008,
    visual_tokens=576,
    vision=VisionGeometry(24, 22, 1024, 16, 4096, True, 576, 588, (1024, 4096, 4096)),
)


@dataclass(frozen=True)
class Sample:
    """One prompt: its images, which of their tokens are left, and the seed of its content.

    `images` and `frames` say of each grid to which image it belongs and which video frame it shows; without them each
    grid is a still image.
    """

    grids: tuple[tuple[int, int], ...]
    seed: int = 0
    text: int = 5
    gone: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    frames: tuple[int | None, ...] = ()

    @property
    def total(self) -> int:
        return sum(r * c for r, c in self.grids)

    @property
    def alive(self) -> list[int]:
        return [i for i in range(self.total) if i not in self.gone]

    def normal(self, what: str, *shape: int) -> Tensor:
        digest = hashlib.sha256(f"{what}/{self.seed}".encode()).digest()
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def _pad(rows: Sequence[Tensor], fill: float, left: bool = False) -> Tensor:
    """Stack along a new batch axis, padded on axis -2 with `fill`."""
    length = max(r.shape[-2] for r in rows)
    out = []
    for r in rows:
        block = r.new_full((*r.shape[:-2], length - r.shape[-2], r.shape[-1]), fill)
        out.append(torch.cat([block, r] if left else [r, block], -2))
    return torch.stack(out)


def token_view(
    samples: Sequence[Sample],
    keep: Sequence[int],
    memory: Memory | None = None,
    *,
    site: str = "input",
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
) -> TokenView:
    """A view of several samples; what lies in the padding is `poison`."""
    width = max((len(s.alive) for s in samples), default=0)
    original, grid, row, col = (torch.zeros(len(samples), width, dtype=torch.long) for _ in range(4))
    valid = torch.zeros(len(samples), width, dtype=torch.bool)
    hidden = []
    for b, s in enumerate(samples):
        cells = [(i, r, c) for i, (rows, cols) in enumerate(s.grids) for r in range(rows) for c in range(cols)]
        for v, token in enumerate(s.alive):
            original[b, v], valid[b, v] = token, True
            grid[b, v], row[b, v], col[b, v] = (torch.tensor(n) for n in cells[token])
        hidden.append(s.normal("hidden", s.total, WIDTH)[s.alive])
    return TokenView(
        site=Site.parse(site),
        hidden=_pad(hidden, poison).to(dtype),
        valid=valid,
        original=original,
        grid=grid,
        row=row,
        col=col,
        grids=tuple(s.grids for s in samples),
        keep=torch.tensor(list(keep)),
        memory={} if memory is None else memory,
        text_key=tuple((s.seed, s.text) for s in samples),
        text=text_view(samples, dtype=dtype, poison=poison),
        images=tuple(s.images or tuple(range(len(s.grids))) for s in samples),
        frames=tuple(s.frames or (None,) * len(s.grids) for s in samples),
    )


def text_view(samples: Sequence[Sample], *, dtype: torch.dtype, poison: float) -> TextView:
    """The text of each sample, two tokens of it before the images."""
    length = max((s.text for s in samples), default=0)
    hidden = _pad([s.normal("text", s.text, WIDTH) for s in samples], poison).to(dtype)
    real = torch.arange(length) < torch.tensor([s.text for s in samples])[:, None]
    return TextView(hidden, real, real & (torch.arange(length) >= 2))


def attention_view(
    samples: Sequence[Sample],
    *,
    block: int = 1,
    has_cls: bool = False,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
) -> AttentionView:
    """A block's signals, left-padded: CLS and then patches with `has_cls`, else visual tokens and then text."""
    queries, keys, values, query_values, columns, everyone = [], [], [], [], [], []
    lengths = [len(s.alive) + (1 if has_cls else s.text) for s in samples]
    for s, n in zip(samples, lengths, strict=True):
        keys.append(s.normal(f"key{block}", KEY_HEADS, n, HEAD_DIM))
        values.append(s.normal(f"value{block}", KEY_HEADS, n, HEAD_DIM))
        queries.append(s.normal(f"query{block}", HEADS, 1, HEAD_DIM))
        everyone.append(s.normal(f"every{block}", HEADS, n, HEAD_DIM))
        query_values.append(values[-1][:, :1] if has_cls else values[-1][:, -1:])
        first = max(lengths) - n + int(has_cls)
        columns.append(torch.arange(first, first + len(s.alive))[:, None])
    return AttentionView(
        block=block,
        query=torch.stack(queries).to(dtype),
        key=_pad(keys, poison, left=True).to(dtype),
        value=_pad(values, poison, left=True).to(dtype),
        scaling=HEAD_DIM**-0.5,
        real=torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]),
        column=_pad(columns, 0)[:, :, 0].long(),
        valid=token_view(samples, [1] * len(samples)).valid,
        query_value=torch.stack(query_values).to(dtype),
        has_cls=has_cls,
        every_query=None if has_cls else _pad(everyone, poison, left=True).to(dtype),
    )


def transition_view(
    samples: Sequence[Sample],
    layer: int,
    part: Literal["attention", "mlp"],
    *,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
) -> TransitionView:
    """What a sublayer does, left-padded: visual tokens and then text."""
    lengths = [len(s.alive) + s.text for s in samples]
    states = [
        [s.normal(f"{what}{layer}{part}", n, WIDTH) for s, n in zip(samples, lengths, strict=True)]
        for what in ("before", "after")
    ]
    columns = [torch.arange(len(s.alive))[:, None] + max(lengths) - n for s, n in zip(samples, lengths, strict=True)]
    return TransitionView(
        layer=layer,
        part=part,
        before=_pad(states[0], poison, left=True).to(dtype),
        after=_pad(states[1], poison, left=True).to(dtype),
        real=torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]),
        column=_pad(columns, 0)[:, :, 0].long(),
        valid=token_view(samples, [1] * len(samples)).valid,
    )


def seen(
    scorer: Scorer,
    samples: Sequence[Sample],
    keep: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
) -> TokenView:
    """The view of a scorer's stage once it has observed what it asks for."""
    memory: Memory = {}
    if scorer.reads_input:
        memory = scorer.prepare(token_view(samples, keep, dtype=dtype, poison=poison))
    if scorer.queries is not None:
        for block in range(3 if scorer.accumulates else 1):
            has_cls = scorer.queries == "cls"
            view = attention_view(samples, block=block, has_cls=has_cls, dtype=dtype, poison=poison)
            memory = scorer.observe(view, memory)
    if scorer.reads_transitions:
        parts: list[Literal["attention", "mlp"]] = ["attention", "mlp"]
        for part in parts:
            view = transition_view(samples, 0, part, dtype=dtype, poison=poison)
            memory = scorer.observe_transition(view, memory)
    site = "vision[2]" if scorer.queries == "cls" else "input"
    if isinstance(scorer, LearnedScorer):
        site = str(scorer.plan(LLAVA, Budget(1.0)).stages[0].site)
    return token_view(samples, keep, memory, site=site, dtype=dtype, poison=poison)
