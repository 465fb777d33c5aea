"""Average tokens into the survivors that own them.

    out[b, v] = sum_j weight[b, j] hidden[b, j] / sum_j weight[b, j]      over the valid j with owner[b, j] = v

Axes: B samples, V tokens (padded, see `valid`), D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import pick

__all__ = ["merge_tokens", "merge_tokens_reference"]


def merge_tokens(
    hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Weighted mean of the tokens each row owns; a row that owns nothing keeps its own value.

    Sums in fp32 and casts back. Differentiable in `hidden` and `weight`. On CUDA the order of the sums is not fixed,
    so that runs may differ in the last bit of fp32. Cost: one pass over the V rows.

    Args:
        hidden: [B, V, D].
        owner: [B, V] int64, on the V axis, the row that each token is averaged into.
        valid: [B, V] bool, False at padding, which counts nowhere whatever it holds.
        weight: [B, V] not negative, or None for equal weights. A row whose weights are all 0 keeps its own value.
        impl: "auto", "torch" or "reference".

    Returns:
        [B, V, D] in the dtype of `hidden`.

    Raises:
        ShapeError: if shapes or dtypes do not fit.
        UnknownNameError: if `impl` is not known.
    """
    run = pick(impl, {"torch": _merge_tokens_torch, "reference": merge_tokens_reference}, auto="torch")
    if hidden.dim() != 3:
        raise ShapeError(f"hidden must be [B, V, D], got {list(hidden.shape)}.")
    legal = list(hidden.shape[:2])
    if owner.dtype != torch.int64 or list(owner.shape) != legal:
        raise ShapeError(f"owner must be int64 {legal}, got {owner.dtype} {list(owner.shape)}.")
    if valid.dtype != torch.bool or list(valid.shape) != legal:
        raise ShapeError(f"valid must be bool {legal}, got {valid.dtype} {list(valid.shape)}.")
    if weight is not None and list(weight.shape) != legal:
        raise ShapeError(f"weight must be {legal}, got {list(weight.shape)}.")
    return run(hidden, owner, valid, weight)


def merge_tokens_reference(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """One owner at a time; arguments and result as in `merge_tokens`."""
    samples = []
    for b in range(hidden.shape[0]):
        rows = []
        for v in range(hidden.shape[1]):
            mine = valid[b] & (owner[b] == v)
            share = torch.ones_like(hidden[b, mine, 0]).float() if weight is None else weight[b, mine].float()
            total = share.sum()
            mean = (share[:, None] * hidden[b, mine].float()).sum(0) / total
            rows.append(mean.to(hidden.dtype) if total > 0 else hidden[b, v])
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def _merge_tokens_torch(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None) -> Tensor:
    batch, length, width = hidden.shape
    share = valid.float() if weight is None else weight.float().masked_fill(~valid, 0.0)
    # NaN times a weight of 0 is NaN, so padding is blanked and not only weighted away
    states = hidden.float().masked_fill(~valid[:, :, None], 0.0) * share[:, :, None]
    # padding owns itself: what its entry of `owner` holds is nobody's promise
    own = torch.arange(length, device=owner.device).expand_as(owner)
    target = owner.where(valid, own) + torch.arange(batch, device=owner.device)[:, None] * length
    # whole rows on a flat axis: index_add took 1.2 ms where scatter_add took 9.5 ms ([4, 640, 512], one core)
    sums = states.new_zeros(batch * length, width).index_add(0, target.flatten(), states.flatten(0, 1))
    total = share.new_zeros(batch * length).index_add(0, target.flatten(), share.flatten())
    mean = sums / total.where(total > 0, 1.0)[:, None]
    mean = mean.reshape(batch, length, width).to(hidden.dtype)
    return mean.where(total.reshape(batch, length, 1) > 0, hidden)
