"""Attention weights of a few query rows over all keys, averaged over the heads.

    A[b, r, n] = mean_h softmax_n( cap( scaling * query[b, h, r] . key[b, h // G, n] ) )        G = H / Hkv

where cap(x) = c tanh(x / c) in models with soft-capped logits and x in others.

Axes: B samples, H query heads, Hkv key heads, R query rows, N keys, V visual tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

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
        impl: "auto", "triton" (reads the keys once), "torch" or "reference".

    Returns:
        [B, R, V], or [B, R, N] without `column`: weights that sum to 1 over the N keys.

    Raises:
        KernelError: if "triton" is asked for where it cannot run.
        ShapeError: if shapes or dtypes do not fit.
        UnknownNameError: if `impl` is not known.
    """
    table = {"triton": _operator, "torch": _attention_rows_torch, "reference": attention_rows_reference}
    run = pick(impl, table, *(t for t in (query, key, real, column) if t is not None))
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
    batch, heads, rows, _ = query.shape
    weights, _ = _weights(query, key, scaling, real, softcap)
    mean = weights.reshape(batch, heads, rows, key.shape[2]).mean(1)
    if column is None:
        return mean
    return mean.gather(2, column[:, None, :].expand(-1, rows, -1))


def _weights(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """[B, Hkv, G * R, N] weights and logits before the mask, fp32."""
    batch, heads, rows, width = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    if real is not None and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        # a gradient of 0 times NaN in padding would be NaN
        key = key.masked_fill(~_seen(real)[:, None, :, None], 0.0)
    # query heads of one group become rows of one product, so that keys are read once and not repeated
    grouped = (query.float() * scaling).reshape(batch, key_heads, heads // key_heads * rows, width)
    chunks = key.split(length if key.dtype == torch.float32 else _CHUNK, dim=2)
    logits = torch.cat([grouped @ chunk.float().transpose(2, 3) for chunk in chunks], dim=3)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if real is None:
        return logits.softmax(3), logits
    absent = ~real[:, None, None, :]
    if real.dim() == 3:
        # rows lie group by group, as the queries do
        absent = ~real[:, None].repeat(1, 1, heads // key_heads, 1)
    # a finite fill, because a row of -inf alone would give NaN; the second fill makes its zeros exact
    return logits.masked_fill(absent, torch.finfo(torch.float32).min).softmax(3).masked_fill(absent, 0.0), logits


# see `keep_tokens` on why only Triton goes through an operator
@torch.library.custom_op("vtprune::attention_rows", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, column: Tensor | None, softcap: float | None
) -> Tensor:
    if runs_triton([t for t in (query, key, real, column) if t is not None]):
        return _launch(query, key, scaling, real, column, softcap)
    return _attention_rows_torch(query, key, scaling, real, column, softcap)


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, column: Tensor | None, softcap: float | None
) -> Tensor:
    count = key.shape[2] if column is None else column.shape[1]
    return query.new_empty((query.shape[0], query.shape[2], count), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, ctx.scaling, real, column, ctx.softcap = inputs
    ctx.save_for_backward(query, key, real, column)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # plain torch, which computes the weights again: methods that read rows choose tokens, and choices have no gradient
    query, key, real, column = ctx.saved_tensors
    batch, heads, rows, width = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    weights, logits = _weights(query, key, ctx.scaling, real, ctx.softcap)
    if column is not None:
        full = grad.new_zeros(batch, rows, length)
        grad = full.scatter_add(2, column[:, None, :].expand_as(grad), grad)
    to_weights = (grad / heads)[:, None].repeat(1, 1, heads // key_heads, 1)
    to_logits = weights * (to_weights - (weights * to_weights).sum(3, keepdim=True))
    if ctx.softcap is not None:
        to_logits = to_logits * (1.0 - (logits / ctx.softcap).square())
    # what nobody sees may hold NaN, also in the products with a gradient of 0
    to_logits = to_logits.masked_fill(weights == 0, 0.0) * ctx.scaling
    keys = key.float() if real is None else key.float().masked_fill(~_seen(real)[:, None, :, None], 0.0)
    to_query = (to_logits @ keys).reshape(query.shape)
    to_key = to_logits.transpose(2, 3) @ query.float().reshape(batch, key_heads, -1, width)
    return to_query.to(query.dtype), to_key.to(key.dtype), None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


def _seen(real: Tensor) -> Tensor:
    """[B, N] keys that some row sees."""
    return real if real.dim() == 2 else real.any(1)


def _launch(*operands: Any) -> Tensor:
    from vtprune.kernels.attention_rows_triton import mean_weights

    return mean_weights(*operands)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What a decoder layer is asked: few rows, grouped heads, left padding that holds NaN, some keys wanted."""
    batch, heads, groups, rows, length, width = (2, 6, 3, 3, 70, 20) if size == "odd" else (1, 32, 32, 1, 2880, 128)
    query, key = (
        (torch.rand(batch, n, m, width, device=device) * 2 - 1).to(dtype) for n, m in ((heads, rows), (groups, length))
    )
    real = torch.arange(length, device=device) >= 9 * torch.arange(batch, device=device)[:, None]
    key = key.masked_fill(~real[:, None, :, None], float("nan"))
    column = torch.arange(length // 3, length, device=device).expand(batch, -1)
    cap = 3.0 if size == "odd" else None
    return {"query": query, "key": key, "scaling": 0.4, "real": real, "column": column, "softcap": cap}


def _operands(
    query: Tensor, key: Tensor, scaling: float, real: Tensor, column: Tensor, softcap: float | None
) -> tuple[Any, ...]:
    return query, key, scaling, real, column, softcap


def _least(query: Tensor, key: Tensor, real: Tensor, column: Tensor, **_: Any) -> int:
    return nbytes(query, key, real, column) + 4 * query.shape[2] * column.numel()


def _moved(query: Tensor, key: Tensor, real: Tensor, column: Tensor, **_: Any) -> int:
    # logits are written once and read at the columns; each head reads the mask, and spans leave two numbers a row
    rows = query.shape[1] * query.shape[2]
    logits = 4 * rows * (key.shape[0] * key.shape[2] + column.numel())
    spans = 8 * rows * key.shape[0] * min(64, -(-key.shape[2] // 64)) * (1 + -(-column.shape[1] // 64))
    masks = nbytes(real) * (key.shape[1] - 1) + nbytes(column) * (query.shape[2] - 1)
    return _least(query, key, real, column) + logits + spans + masks


KERNEL = Kernel(
    run=attention_rows,
    example=_example,
    operator="vtprune::attention_rows",
    operands=_operands,
    launch=_launch,
    shape="B 1, H 32, R 1, N 2880, V 1920, d 128",
    least=_least,
    moved=_moved,
    gradients=("query", "key"),
)
