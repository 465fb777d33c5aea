"""Shrink layers of a KV cache after the fact: keep the same tokens of their keys and values.

    out[b, h, m] = tensor[b, h, index[b, m]]          or index[b, h, m], where each head keeps its own

Axes: B samples, H key heads, N tokens before, M tokens after, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import KernelError, ShapeError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

__all__ = ["compact_cache", "compact_cache_reference"]


def compact_cache(
    tensors: Sequence[Tensor], index: Tensor, *, in_place: bool = False, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """Keep the tokens `index` of keys and values, in the order in which `index` names them.

    Cost: one read and one write of the survivors. Differentiable, unless in place.

    Args:
        tensors: keys and values of one layer or of several, each [B, H, N, d]; d and dtype may differ.
        index: [B, M] int64 token numbers in [0, N), or [B, H, M] with a choice for each head. Not checked on a GPU.
        in_place: move the survivors to the front of the memory they lie in, and return views of it. Nothing is
            allocated with "triton", and caches of fixed size stay where they are; what lies behind the survivors is
            left as it was. No token may come from in front of its new place: index[..., m] >= m, which holds for
            increasing numbers. (Ragged batches: survivors in front, anything from behind them as padding.)
        impl: "auto", "triton" (all tensors in one launch), "torch" or "reference".

    Returns:
        One [B, H, M, d] for each tensor: new memory, or the front of the old.

    Raises:
        KernelError: if "triton" is asked for where it cannot run, or a tensor in place requires a gradient.
        ShapeError: if shapes or dtypes do not fit, or the order of `index` rules out in place. On a GPU the order is
            checked without waiting for it, so that a wrong one fails the stream.
        UnknownNameError: if `impl` is not known.
    """
    table = {
        "triton": (_triton, _triton_in_place),
        "torch": (_compact_torch, _torch_in_place),
        "reference": (compact_cache_reference, _reference_in_place),
    }
    run, shift = pick(impl, table, *tensors, index)
    _check(tensors, index)
    if not in_place:
        return tuple(run(tensors, index))
    _check_in_place(tensors, index)
    shift(tensors, index)
    return tuple(t[:, :, : index.shape[-1]] for t in tensors)


def _check(tensors: Sequence[Tensor], index: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() not in (2, 3):
        raise ShapeError(f"index must be int64 [B, M] or [B, H, M], got {index.dtype} {list(index.shape)}.")
    lead = {tuple(t.shape[:3]) for t in tensors if t.dim() == 4}
    if any(t.dim() != 4 for t in tensors) or len(lead) != 1:
        raise ShapeError(
            f"tensors must be [B, H, N, d] with the same B, H and N, got {[list(t.shape) for t in tensors]}. Compact "
            "layers that hold different tokens in calls of their own."
        )
    (batch, heads, _) = lead.pop()
    if tuple(index.shape[:-1]) not in ((batch,), (batch, heads)):
        raise ShapeError(f"index must be [{batch}, M] or [{batch}, {heads}, M], got {list(index.shape)}.")


def _check_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise KernelError(
            "in_place=True writes into its inputs, and one of them requires a gradient. Use in_place=False, or "
            "torch.no_grad()."
        )
    for tensor in tensors:
        if any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ShapeError(
                f"in_place=True needs tensors whose elements have memory of their own, got {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}. Use in_place=False."
            )
    legal = (index >= torch.arange(index.shape[-1], device=index.device)).all()
    message = "in_place=True needs index[..., m] >= m, got a token from in front of its new place. Sort index."
    if index.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(legal, message)  # type: ignore[attr-defined]
    elif not legal:
        raise ShapeError(message)


def compact_cache_reference(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """One sample, head and token at a time; arguments and result as in `compact_cache`."""
    out = []
    for tensor in tensors:
        samples = []
        for b in range(tensor.shape[0]):
            heads = []
            for h in range(tensor.shape[1]):
                numbers = index[b, h] if index.dim() == 3 else index[b]
                heads.append(torch.stack([tensor[b, h, n] for n in numbers]) if len(numbers) else tensor[b, h, :0])
            samples.append(torch.stack(heads))
        out.append(torch.stack(samples))
    return out


def _reference_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    for tensor, kept in zip(tensors, compact_cache_reference(tensors, index), strict=True):
        tensor[:, :, : index.shape[-1]] = kept


def _compact_torch(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    batch, heads, length, _ = tensors[0].shape
    index = index[:, None].expand(-1, heads, -1) if index.dim() == 2 else index
    start = torch.arange(batch * heads, device=index.device).reshape(batch, heads, 1) * length
    rows = (start + index).flatten()
    sample = torch.arange(batch, device=index.device)[:, None, None]
    head = torch.arange(heads, device=index.device)[:, None]
    # as in `keep_tokens`: whole rows where that needs no copy of all N first
    return [
        t.view(batch * heads * length, t.shape[3]).index_select(0, rows).view(batch, heads, -1, t.shape[3])
        if t.is_contiguous()
        else t[sample, head, index]
        for t in tensors
    ]


def _torch_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    # one tensor after the other, so that only one copy is alive at a time
    for tensor in tensors:
        tensor[:, :, : index.shape[-1]] = _compact_torch([tensor], index)[0]


# see `keep_tokens` on why only Triton goes through an operator
@torch.library.custom_op("vtprune::compact_cache", mutates_args=())
def _operator(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return _launch(tensors, index) if runs_triton((*tensors, index)) else _compact_torch(tensors, index)


@_operator.register_fake
def _(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [t.new_empty(*t.shape[:2], index.shape[-1], t.shape[3]) for t in tensors]


def _save(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: list[Tensor]) -> None:
    tensors, index = inputs
    ctx.save_for_backward(index)
    ctx.shapes = [t.shape for t in tensors]


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[list[Tensor], None]:
    (index,) = ctx.saved_tensors
    index = index[:, None, :, None] if index.dim() == 2 else index[..., None]
    wanted = zip(grads, ctx.shapes, strict=True)
    return [g.new_zeros(shape).scatter_add(2, index.expand_as(g), g) for g, shape in wanted], None


_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("vtprune::compact_cache_", mutates_args=("tensors",))
def _operator_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    if runs_triton((*tensors, index)):
        _launch_in_place(tensors, index)
    else:
        _torch_in_place(tensors, index)


def _triton(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return _operator(list(tensors), index)


def _triton_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    _operator_in_place(list(tensors), index)


def _launch(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    from vtprune.kernels.keep_tokens_triton import gather_rows

    return gather_rows(tensors, index, 2)


def _launch_in_place(tensors: Sequence[Tensor], index: Tensor) -> None:
    from vtprune.kernels.compact_cache_triton import shift_rows

    shift_rows(tensors, index)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Keys and values of one layer, which keeps a quarter; heads choose by themselves."""
    batch, heads, length, width = (2, 3, 37, 6) if size == "odd" else (1, 8, 4096, 128)
    pair = [torch.rand(batch, heads, length, width, device=device).to(dtype) for _ in range(2)]
    index = torch.rand(batch, heads, length, device=device).argsort(2)[:, :, : length // 4].sort(2)[0]
    return {"tensors": pair, "index": index}


def _least(tensors: Sequence[Tensor], index: Tensor) -> int:
    return 2 * sum(index.numel() * t.shape[3] * t.element_size() for t in tensors) + nbytes(index)


def _moved(tensors: Sequence[Tensor], index: Tensor) -> int:
    return _least(tensors, index) + (len(tensors) - 1) * nbytes(index)


KERNEL = Kernel(
    run=compact_cache,
    example=_example,
    operator="vtprune::compact_cache",
    operands=lambda tensors, index: (tensors, index),
    launch=_launch,
    shape="B 1, H 8, N 4096 to 1024, d 128; keys and values, a choice a head",
    least=_least,
    moved=_moved,
    gradients=("tensors",),
    others={"in place": _launch_in_place},
    exact=True,
)
