"""Attention weights of a few query rows over all keys, averaged over the heads.

    A[b, r, n] = mean_h softmax_n( cap( scaling * query[b, h, r] . key[b, h // G, n] ) )        G = H / Hkv

where cap(x) = c tanh(x / c) in models with soft-capped logits and x in others.

Axes: B samples, H query heads, Hkv key heads, R query rows, N keys, V visual tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import pick

__all__ = ["attention_rows", "attention_rows_reference"]

# keys that are cast to fp32 at once when they come in half precision
_CHUNK = 4096


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    real: Tensor | None,
    column: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """What the rows `query` attend to, in fp32 whatever the inputs' dtype.

    There is no causal mask: the rows that most methods read (the last prompt token, CLS, a mean query) see every key;
    for others `real` says row by row what they see.
    Memory O(H R N); the keys of a group are shared by its query heads and never repeated.

    Args:
        query: [B, H, R, d] after RoPE.
        key: [B, Hkv, N, d] after RoPE; H is a multiple of Hkv.
        scaling: factor of the logits, usually d ** -0.5.
        real: [B, N] or [B, R, N] bool, False at keys that a row does not see (padding), which weigh exactly 0 whatever
            they hold (NaN too); None if all are seen. A row without any gets all zeros.
        column: [B, V] int64 keys to read after the softmax; None reads all N.
        softcap: c, or None.
        impl: "auto", "torch" or "reference".

    Returns:
        [B, R, V], or [B, R, N] without `column`: weights that sum to 1 over the N keys.

    Raises:
        ShapeError: if shapes or dtypes do not fit.
        UnknownNameError: if `impl` is not known.
    """
    run = pick(impl, {"torch": _attention_rows_torch, "reference": attention_rows_reference}, auto="torch")
    _check(query, key, real, column)
    return run(query, key, scaling, real, column, softcap)


def _check(query: Tensor, key: Tensor, real: Tensor | None, column: Tensor | None) -> None:
    shapes = f"query {list(query.shape)} and key {list(key.shape)}"
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ShapeError(f"query must be [B, H, R, d] and key [B, Hkv, N, d] with the same B and d, got {shapes}.")
    if query.shape[1] % key.shape[1]:
        raise ShapeError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}.")
    batch, length = key.shape[0], key.shape[2]
    legal = ((batch, length), (batch, query.shape[2], length))
    if real is not None and (real.dtype != torch.bool or tuple(real.shape) not in legal):
        raise ShapeError(
            f"real must be bool {list(legal[0])} or {list(legal[1])}, got {real.dtype} {list(real.shape)}."
        )
    if column is not None and (column.dtype != torch.int64 or column.dim() != 2 or column.shape[0] != batch):
        raise ShapeError(f"column must be int64 [{batch}, V], got {column.dtype} {list(column.shape)}.")


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    scaling: float,
    real: Tensor | None = None,
    column: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One sample, head and row at a time; arguments and result as in `attention_rows`."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    samples = []
    for b in range(batch):
        means = []
        for r in range(rows):
            present = torch.ones(key.shape[2], dtype=torch.bool, device=key.device)
            if real is not None:
                present = real[b] if real.dim() == 2 else real[b, r]
            keys = key[b].float()[:, present]
            logits = torch.stack([scaling * (keys[h // group] @ query[b, h, r].float()) for h in range(heads)])
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            mean = torch.softmax(logits, 1).mean(0)
            full = mean.new_zeros(key.shape[2]).masked_scatter(present, mean)
            means.append(full if column is None else full[column[b]])
        samples.append(torch.stack(means))
    return torch.stack(samples)


def _attention_rows_torch(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, column: Tensor | None, softcap: float | None
) -> Tensor:
    batch, heads, rows, width = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    # query heads of one group become rows of one product, so that keys are read once and not repeated
    grouped = (query.float() * scaling).reshape(batch, key_heads, heads // key_heads * rows, width)
    chunks = key.split(length if key.dtype == torch.float32 else _CHUNK, dim=2)
    logits = torch.cat([grouped @ chunk.float().transpose(2, 3) for chunk in chunks], dim=3)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if real is None:
        weights = logits.softmax(3)
    else:
        absent = ~real[:, None, None, :]
        if real.dim() == 3:
            # rows lie group by group, as the queries do
            absent = ~real[:, None].repeat(1, 1, heads // key_heads, 1)
        # a finite fill, because a row of -inf alone would give NaN; the second fill makes its zeros exact
        weights = logits.masked_fill(absent, torch.finfo(torch.float32).min).softmax(3).masked_fill(absent, 0.0)
    mean = weights.reshape(batch, heads, rows, length).mean(1)
    if column is None:
        return mean
    return mean.gather(2, column[:, None, :].expand(-1, rows, -1))
