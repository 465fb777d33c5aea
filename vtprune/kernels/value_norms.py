"""L1 norms of the values that chosen tokens carry, over the mean of the heads or over all of them side by side.

    norm[b, v] = sum_d | mean_h value[b, h, column[b, v], d] |      "head_mean": signs of heads may cancel
    norm[b, v] = sum_hd | value[b, h, column[b, v], d] |            "all_heads"

Axes: B samples, H key heads, N keys, V visual tokens, d head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vtprune.errors import ShapeError, UnknownNameError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

__all__ = ["ValueNorm", "value_norms", "value_norms_reference"]

ValueNorm = Literal["head_mean", "all_heads"]
_NORMS = ("head_mean", "all_heads")


def value_norms(value: Tensor, column: Tensor, norm: ValueNorm = "head_mean", *, impl: str = "auto") -> Tensor:
    """How much each token has to give, as FlowCut scores it. Sums in fp32; differentiable in `value`.

    Cost: one read of the chosen values with "triton"; "torch" also writes and reads [B, N, d] sums in between.

    Args:
        value: [B, H, N, d] values of all keys; heads that a group of queries shares count once.
        column: [B, V] int64 where each token lies among the N keys. Not checked on a GPU.
        norm: "head_mean" (FlowCut's code) or "all_heads" (its paper).
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [B, V] fp32.

    Raises:
        KernelError: if "triton" is asked for where it cannot run.
        ShapeError: if shapes or dtypes do not fit.
        UnknownNameError: if `norm` or `impl` is not known.
    """
    table = {"triton": _operator, "torch": _value_norms_torch, "reference": value_norms_reference}
    run = pick(impl, table, value, column)
    if norm not in _NORMS:
        raise UnknownNameError("value norm", norm, _NORMS)
    if value.dim() != 4:
        raise ShapeError(f"value must be [B, H, N, d], got {list(value.shape)}.")
    if column.dtype != torch.int64 or column.dim() != 2 or column.shape[0] != value.shape[0]:
        raise ShapeError(f"column must be int64 [{value.shape[0]}, V], got {column.dtype} {list(column.shape)}.")
    return run(value, column, norm)


def value_norms_reference(value: Tensor, column: Tensor, norm: str = "head_mean") -> Tensor:
    """One token at a time; arguments and result as in `value_norms`."""
    samples = []
    for b in range(value.shape[0]):
        tokens = [value[b, :, n].float() for n in column[b]]
        if norm == "head_mean":
            tokens = [token.mean(0) for token in tokens]
        samples.append(torch.stack([token.abs().sum() for token in tokens]) if tokens else value.new_zeros(0).float())
    return torch.stack(samples)


def _value_norms_torch(value: Tensor, column: Tensor, norm: str) -> Tensor:
    wide = value.mean(1, dtype=torch.float32) if norm == "head_mean" else value.transpose(1, 2).flatten(2)
    return wide.gather(1, column[:, :, None].expand(-1, -1, wide.shape[2])).float().abs().sum(-1)


# see `keep_tokens` on why only Triton goes through an operator
@torch.library.custom_op("vtprune::value_norms", mutates_args=())
def _operator(value: Tensor, column: Tensor, norm: str) -> Tensor:
    return _launch(value, column, norm) if runs_triton((value, column)) else _value_norms_torch(value, column, norm)


@_operator.register_fake
def _(value: Tensor, column: Tensor, norm: str) -> Tensor:
    return value.new_empty(column.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    value, column, ctx.norm = inputs
    ctx.save_for_backward(value, column)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    value, column = ctx.saved_tensors
    each = grad.new_zeros(value.shape[0], value.shape[2]).scatter_add(1, column, grad)[:, None, :, None]
    sign = value.sign().float()
    if ctx.norm == "head_mean":
        sign = value.mean(1, keepdim=True, dtype=torch.float32).sign() / value.shape[1]
    # the sign of NaN, which tokens that were not chosen may hold, is 0
    return (each * sign).expand(value.shape).to(value.dtype), None, None


_operator.register_autograd(_backward, setup_context=_save)


def _launch(value: Tensor, column: Tensor, norm: str) -> Tensor:
    from vtprune.kernels.value_norms_triton import norms

    return norms(value, column, norm)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The patches of a vision tower behind CLS."""
    batch, heads, length, width = (2, 3, 21, 10) if size == "odd" else (4, 16, 577, 64)
    value = (torch.rand(batch, heads, length, width, device=device) - 0.5).to(dtype)
    column = torch.arange(length - 1, 0, -1, device=device).expand(batch, -1)
    return {"value": value, "column": column, "norm": "head_mean"}


def _least(value: Tensor, column: Tensor, norm: str) -> int:
    return value.shape[1] * column.numel() * value.shape[3] * value.element_size() + nbytes(column) + 4 * column.numel()


KERNEL = Kernel(
    run=value_norms,
    example=_example,
    operator="vtprune::value_norms",
    operands=lambda value, column, norm: (value, column, norm),
    launch=_launch,
    shape="B 4, H 16, N 577, V 576, d 64",
    least=_least,
    moved=_least,
    gradients=("value",),
    others={"all heads": lambda value, column, norm: _launch(value, column, "all_heads")},
)
