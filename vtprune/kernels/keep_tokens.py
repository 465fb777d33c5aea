"""Gather the same token rows from several tensors at once.

    out[b, ..., m, ...] = tensor[b, ..., index[b, m], ...]

Axes: B samples, N tokens before, M tokens after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

__all__ = ["keep_tokens", "keep_tokens_reference"]


def keep_tokens(tensors: Sequence[Tensor], index: Tensor, dim: int = 1, *, impl: str = "auto") -> tuple[Tensor, ...]:
    """Keep the tokens `index` of every tensor, in the order in which `index` names them.

    Differentiable: the gradient of a token that is kept more than once is the sum over its copies. Moves whole rows:
    on one CPU core `index_select` over flattened rows took 0.18 ms where `gather` with an expanded index took 2.2 ms
    ([1, 640, 4096] fp32 to 128 tokens). Cost: one read and one write of the survivors.

    Args:
        tensors: each [B, ..., N, ...] with the tokens on axis `dim`, of any dtype: hidden states [B, N, D], ids [B, N],
            masks. A tensor of batch 1 (shared rotary tables [1, N, d]) is read by every sample.
        index: [B, M] int64 token numbers in [0, N), on any device. Not checked on a GPU, where reading it would stall
            the stream; torch itself raises on a CPU.
        dim: the token axis, at least 1.
        impl: "auto", "triton" (all tensors in one launch), "torch" or "reference".

    Returns:
        One tensor [B, ..., M, ...] for each input, with memory of its own.

    Raises:
        KernelError: if "triton" is asked for where it cannot run.
        ShapeError: if a shape or the dtype of `index` does not fit.
        UnknownNameError: if `impl` is not known.
    """
    table = {"triton": _keep_tokens_triton, "torch": _keep_tokens_torch, "reference": keep_tokens_reference}
    run = pick(impl, table, *tensors)
    if index.dim() != 2 or index.dtype != torch.int64:
        raise ShapeError(f"index must be int64 [B, M], got {index.dtype} {list(index.shape)}. Use index.long().")
    lengths = set()
    for tensor in tensors:
        if dim < 1 or tensor.dim() <= dim:
            raise ShapeError(
                f"dim must be in [1, {tensor.dim() - 1}] for a tensor {list(tensor.shape)}, got {dim}. "
                "Axis 0 is the batch."
            )
        if tensor.shape[0] not in (1, index.shape[0]):
            raise ShapeError(
                f"tensor {list(tensor.shape)} must have batch 1 or {index.shape[0]} (the batch of index), "
                f"got {tensor.shape[0]}."
            )
        lengths.add(tensor.shape[dim])
    if len(lengths) > 1:
        raise ShapeError(f"tensors must hold the same number of tokens on axis {dim}, got {sorted(lengths)}.")
    return run(tensors, index, dim)


def keep_tokens_reference(tensors: Sequence[Tensor], index: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
    """One sample and one token at a time; arguments and result as in `keep_tokens`."""
    kept = []
    for tensor in tensors:
        samples = []
        for b, numbers in enumerate(index.tolist()):
            sample = tensor[b if tensor.shape[0] > 1 else 0]
            rows = [sample.select(dim - 1, n) for n in numbers]
            samples.append(torch.stack(rows, dim - 1) if rows else sample.narrow(dim - 1, 0, 0))
        kept.append(torch.stack(samples))
    return tuple(kept)


def _keep_tokens_torch(tensors: Sequence[Tensor], index: Tensor, dim: int) -> tuple[Tensor, ...]:
    return tuple(_keep_rows(tensor, index, dim) for tensor in tensors)


def _keep_rows(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    index, batch, length = index.to(tensor.device), index.shape[0], tensor.shape[dim]
    between, after = tensor.shape[1:dim], tensor.shape[dim + 1 :]
    sample = torch.arange(batch, device=index.device)
    if not tensor.is_contiguous():
        # flattening would copy all N rows first; indexing reads only the M that stay
        moved = tensor.expand(batch, *tensor.shape[1:]).movedim(dim, 1)
        return moved[sample[:, None], index].movedim(1, dim)
    groups = math.prod(between)
    if tensor.shape[0] == 1:
        sample = torch.zeros_like(sample)
    group = torch.arange(groups, device=index.device)
    start = (sample[:, None] * groups + group) * length
    rows = (start[:, :, None] + index[:, None, :]).flatten()
    kept = tensor.reshape(tensor.shape[0] * groups * length, *after).index_select(0, rows)
    return kept.reshape(batch, *between, index.shape[1], *after)


# Only Triton goes through an operator. On a CPU the operator's call alone adds 65 to 85 us, medians of 300 on one core:
# 120 to 181 us for 20 of 40 rows of 64 fp32, 249 to 320 us for 128 of 640 rows of 4096; and torch.compile reads the
# torch path as it is.
@torch.library.custom_op("vtprune::keep_tokens", mutates_args=())
def _operator(tensors: Sequence[Tensor], index: Tensor, dim: int) -> list[Tensor]:
    if not runs_triton(tensors):
        return list(_keep_tokens_torch(tensors, index, dim))
    return _launch(tensors, index, dim)


@_operator.register_fake
def _(tensors: Sequence[Tensor], index: Tensor, dim: int) -> list[Tensor]:
    return [t.new_empty(index.shape[0], *t.shape[1:dim], index.shape[1], *t.shape[dim + 1 :]) for t in tensors]


def _save(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor, int], output: list[Tensor]) -> None:
    tensors, index, ctx.dim = inputs
    ctx.save_for_backward(index)
    ctx.shapes = [t.shape if t.is_floating_point() and t.requires_grad else None for t in tensors]


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[list[Tensor | None], None, None]:
    (index,) = ctx.saved_tensors
    wanted = zip(grads, ctx.shapes, strict=True)
    return [None if s is None else scatter_rows(g, index, s, ctx.dim) for g, s in wanted], None, None


_operator.register_autograd(_backward, setup_context=_save)


def scatter_rows(grad: Tensor, index: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The gradient of `keep_tokens`: [B, ..., M, ...] added up at `index` [B, M] of zeros of `shape`."""
    batch, between = grad.shape[0], math.prod(shape[1:dim])
    sample = torch.zeros_like(index[:, :1]) if shape[0] == 1 else torch.arange(batch, device=index.device)[:, None]
    group = torch.arange(between, device=index.device)
    rows = ((sample * between + group) * shape[dim])[:, :, None] + index[:, None, :]
    full = grad.new_zeros(shape[0] * between * shape[dim], *shape[dim + 1 :])
    return full.index_add(0, rows.flatten(), grad.reshape(rows.numel(), *shape[dim + 1 :])).reshape(shape)


def _keep_tokens_triton(tensors: Sequence[Tensor], index: Tensor, dim: int) -> tuple[Tensor, ...]:
    return tuple(_operator(list(tensors), index.to(tensors[0].device), dim))


def _launch(tensors: Sequence[Tensor], index: Tensor, dim: int) -> list[Tensor]:
    from vtprune.kernels.keep_tokens_triton import gather_rows

    return gather_rows(tensors, index, dim)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What a cut in a decoder layer gathers: states, cos and sin, position ids, mask."""
    batch, length, kept, width, head = (3, 37, 11, 20, 6) if size == "odd" else (4, 640, 128, 4096, 128)
    floats = [torch.rand(b, length, w, device=device).to(dtype) for b, w in ((batch, width), (1, head), (1, head))]
    ids = torch.arange(length, device=device).expand(batch, length)
    index = torch.rand(batch, length, device=device).argsort(1)[:, :kept].sort(1)[0]
    return {"tensors": [*floats, ids, ids % 3 > 0], "index": index}


def _least(tensors: Sequence[Tensor], index: Tensor) -> int:
    written = [t.shape[2:].numel() * t.element_size() * index.numel() for t in tensors]
    read = [w // index.shape[0] if t.shape[0] == 1 else w for t, w in zip(tensors, written, strict=True)]
    return sum(written) + sum(read) + nbytes(index)


def _moved(tensors: Sequence[Tensor], index: Tensor) -> int:
    # every tile reads the indices of its rows
    row = [t.shape[2:].numel() * t.element_size() for t in tensors]
    return sum(2 * w * index.numel() + -(-w // 8192) * nbytes(index) for w in row)


KERNEL = Kernel(
    run=keep_tokens,
    example=_example,
    operator="vtprune::keep_tokens",
    operands=lambda tensors, index: (tensors, index, 1),
    launch=_launch,
    shape="B 4, N 640 to 128; states 4096, cos and sin 128, ids, mask",
    least=_least,
    moved=_moved,
    gradients=("tensors",),
    exact=True,
)
