"""What a scorer sees of a model while it runs.

Axes: B samples (images at a `vision` site), V visual tokens still alive (padded at the end, see `valid`),
N keys of the attention block, H query heads, Hkv key/value heads, R query rows, d head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtprune.plan import Site

__all__ = ["AttentionView", "Memory", "Queries", "TextView", "TokenView", "TransitionView"]

Memory = dict[str, Tensor]
"""Per-token running signals of one call, each [B, V] (or [B, V, d], d numbers a token); the engine gathers them when
tokens are dropped. In a tower that merges c patches into a token `observe` sees and returns [B, V * c], the patches of
each token side by side, and a cut sees their mean."""

Queries = Literal["last", "cls", "mean", "instruction", "all"]
"""Which query rows an attention view holds: the last prompt token, the tower's CLS token, the mean of real tokens (in a
tower those of one image, crop or frame, also in blocks that attend in windows), the prompt's tokens behind its last
image, all tokens of the call."""

PROMPT_ROWS: tuple[Queries, ...] = ("last", "instruction", "all")
"""Those that lie in the prompt, and not in a tower."""


@dataclass(frozen=True)
class AttentionView:
    """Signals of one attention block that has just run, for `Scorer.observe`.

    Attributes:
        block: index of the tower block or decoder layer.
        query: [B, H, R, d] the rows asked for by `Scorer.queries`, after RoPE.
        key, value: [B, Hkv, N, d] all keys and values, after RoPE.
        scaling: factor of the logits, usually d ** -0.5.
        real: [B, N], or [B, R, N] for "instruction" and "all": True at keys that a row sees (not at padding, later
            tokens, nor outside its sliding window), or None if it sees all.
        column: [B, V] where each alive visual token lies among the N keys.
        valid: [B, V] False at padding of the V axis.
        query_value: [B, Hkv, R, d] values at the query rows.
        has_cls: the query row is a tower's CLS token (else, in a tower, the mean of all real queries).
        softcap: bound c of the logits, which the model takes as c tanh(logit / c), or None.
        rows: [B, R] False at padding of the R axis, or None if there is none.
        first: keys before this one come from earlier calls (a cache).
        every_query: [B, H, N - first, d] the queries of all rows of the call, in a tower of all rows of a unit, where
            those at padding may hold anything.
    """

    block: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    real: Tensor | None
    column: Tensor
    valid: Tensor
    query_value: Tensor
    has_cls: bool
    softcap: float | None = None
    rows: Tensor | None = None
    first: int = 0
    every_query: Tensor | None = None

    def visual(self, states: Tensor) -> Tensor:
        """[B, Hkv, N, d] keys or values -> [B, Hkv, V, d] at the alive visual tokens."""
        index = self.column[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
        return states.gather(2, index)


@dataclass(frozen=True)
class TransitionView:
    """What a sublayer of a decoder layer has just made of its tokens, for `Scorer.observe_transition`.

    Attributes:
        layer: index of the decoder layer.
        part: which sublayer.
        before: [B, M, D] its normalised input, as the sublayer gets it.
        after: [B, M, D] its output before it is added to the residual stream.
        real: [B, M] False at padding.
        column: [B, V] where each alive visual token lies among the M rows.
        valid: [B, V] False at padding of the V axis.
    """

    layer: int
    part: Literal["attention", "mlp"]
    before: Tensor
    after: Tensor
    real: Tensor
    column: Tensor
    valid: Tensor


@dataclass(frozen=True)
class TextView:
    """The text tokens of a call, in order.

    Attributes:
        hidden: [B, R, D] their states; the last real one is the prompt's last token.
        real: [B, R] False at padding of the R axis, which lies at the end.
        behind: [B, R] True behind the last image.
    """

    hidden: Tensor
    real: Tensor
    behind: Tensor


@dataclass(frozen=True)
class TokenView:
    """What a scorer sees when its stage cuts.

    Attributes:
        site: where the cut is made.
        hidden: [B, V, D] states of the alive visual tokens; in a tower the mean of a token's patches.
        valid: [B, V] False at padding of the V axis.
        original: [B, V] index of the token among the sample's original visual tokens, increasing.
        grid, row, col: [B, V] grid of the sample (an image, or a crop or frame of one), and the cell on it.
        grids: for each sample, (rows, cols) of each grid.
        keep: [B] how many tokens must survive.
        memory: what `observe` has accumulated.
        text_key: for each sample a tuple of ints that identifies its prompt (its token ids); () in a tower, and unless
            the scorer sets `reads_prompt`.
        text: the text tokens, None unless the scorer sets `reads_text`.
        images: for each sample and grid the index of its image in the sample.
        frames: for each sample and grid the index of its video frame, None in a still image; () where all are stills,
            and in a tower, which sees each frame by itself.
        size: [B, V] how many original tokens each one stands for, fp32, 1 at padding; None if none was merged.
    """

    site: Site
    hidden: Tensor
    valid: Tensor
    original: Tensor
    grid: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[tuple[int, int], ...], ...]
    keep: Tensor
    memory: Memory
    text_key: tuple[tuple[int, ...], ...]
    text: TextView | None = None
    images: tuple[tuple[int, ...], ...] = ()
    frames: tuple[tuple[int | None, ...], ...] = ()
    size: Tensor | None = None
