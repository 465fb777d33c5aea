"""FlowCut's formulas on plain tensors: the score, its ingredients, and how many patches an early cut drops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["flowcut_drop_count", "flowcut_score", "flowcut_score_mean_query"]


def flowcut_score(
    cls_attention: Tensor, semantic_attention: Tensor | None, norm: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Importance of each patch in one block: (a_j / sum a + s_j / sum s) * ||v_j||_1.

    Args:
        cls_attention: [B, V] attention a of the CLS row to the patches, mean over heads.
        semantic_attention: [B, V] softmax s of value-value products with CLS, mean over heads; None leaves it out.
        norm: [B, V] L1 norms of the values v, from `vtprune.kernels.value_norms`.
        valid: [B, V] patches that count; None is all.

    Returns:
        [B, V] fp32, higher is kept; 0 where not valid.
    """
    share = _shares(cls_attention, valid)
    if semantic_attention is not None:
        share = share + _shares(semantic_attention, valid)
    return flowcut_score_mean_query(share, norm, valid)


def flowcut_score_mean_query(attention: Tensor, norm: Tensor, valid: Tensor | None = None) -> Tensor:
    """The same for a tower without CLS: A_j * ||v_j||_1, A the attention of the mean query.

    Args:
        attention: [B, V].
        norm: [B, V] from `vtprune.kernels.value_norms`.
        valid: [B, V] patches that count; None is all.

    Returns:
        [B, V] fp32, higher is kept; 0 where not valid.
    """
    score = attention.float() * norm.float()
    return score if valid is None else score.masked_fill(~valid, 0.0)


def flowcut_drop_count(
    attention: Tensor, remaining: int, target: Tensor | int, valid: Tensor | None = None, *, epsilon: float = 0.0
) -> Tensor:
    """How many patches to drop now: round((N - T) / sqrt(L) * (1 - e^2)), e the relative entropy of the attention.

    e = H / ln N is near 1 while the attention is spread out (early blocks: drop little) and falls as it concentrates.

    Args:
        attention: [B, V] attention to the patches, normalised here.
        remaining: L >= 1, blocks between this one and the last cut.
        target: T, patches that must be left in the end, an int or [B].
        valid: [B, V] patches that count, N of them a row; None is all.
        epsilon: added inside the logarithm.

    Returns:
        [B] int64 count P >= 0 (round half to even; 0 where N < 2). N - P may fall below T: the caller holds it there.
    """
    share = _shares(attention, valid)
    patches = torch.full_like(share[:, 0], share.shape[1]) if valid is None else valid.sum(1).float()
    # xlogy gives 0 ln 0 = 0, so that padding and patches without attention add nothing
    entropy = -torch.xlogy(share, share + epsilon).sum(1)
    relative = entropy / patches.clamp(min=2.0).log()
    drop = (patches - target) / math.sqrt(remaining) * (1.0 - relative.square())
    return drop.round().clamp(min=0.0).masked_fill(patches < 2, 0.0).long()


def _shares(weights: Tensor, valid: Tensor | None) -> Tensor:
    """[B, V] fp32 `weights` scaled to sum to 1 over the valid patches, 0 elsewhere; all 0 if their sum is 0."""
    weights = weights.float() if valid is None else weights.float().masked_fill(~valid, 0.0)
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total > 0, 1.0)
