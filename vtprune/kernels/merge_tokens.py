"""Average tokens into the survivors that own them.

    out[b, v] = sum_j weight[b, j] hidden[b, j] / sum_j weight[b, j]      over the valid j with owner[b, j] = v

Axes: B samples, V tokens (padded, see `valid`), D model width.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

__all__ = ["merge_tokens", "merge_tokens_reference"]


@overload
def merge_tokens(
    hidden: Tensor,
    owner: Tensor,
    valid: Tensor,
    weight: Tensor | None = None,
    *,
    totals: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def merge_tokens(
    hidden: Tensor,
    owner: Tensor,
    valid: Tensor,
    weight: Tensor | None = None,
    *,
    totals: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def merge_tokens(
    hidden: Tensor,
    owner: Tensor,
    valid: Tensor,
    weight: Tensor | None = None,
    *,
    totals: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted mean of the tokens each row owns; a row that owns nothing keeps its own value.

    Sums in fp32 and casts back. Differentiable in `hidden` and `weight`. With "torch" on CUDA the order of the sums is
    not fixed, so that runs may differ in the last bit of fp32; "triton" adds up in the order of the tokens.
    Cost: one pass over the V rows.

    Args:
        hidden: [B, V, D].
        owner: [B, V] int64, on the V axis, the row that each token is averaged into.
        valid: [B, V] bool, False at padding, which counts nowhere whatever it holds.
        weight: [B, V] not negative, or None for equal weights. A row whose weights are all 0 keeps its own value.
        totals: also return what each row's weights add up to: the number of its tokens, or in ToMe its new size.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [B, V, D] in the dtype of `hidden`; with `totals` also [B, V] fp32, through which no gradient flows.

    Raises:
        KernelError: if "triton" is asked for where it cannot run.
        ShapeError: if shapes or dtypes do not fit.
        UnknownNameError: if `impl` is not known.
    """
    table = {"triton": _merge_tokens_triton, "torch": _merge_tokens_torch, "reference": merge_tokens_reference}
    run = pick(impl, table, hidden, owner, valid)
    if hidden.dim() != 3:
        raise ShapeError(f"hidden must be [B, V, D], got {list(hidden.shape)}.")
    legal = list(hidden.shape[:2])
    if owner.dtype != torch.int64 or list(owner.shape) != legal:
        raise ShapeError(f"owner must be int64 {legal}, got {owner.dtype} {list(owner.shape)}.")
    if valid.dtype != torch.bool or list(valid.shape) != legal:
        raise ShapeError(f"valid must be bool {legal}, got {valid.dtype} {list(valid.shape)}.")
    if weight is not None and list(weight.shape) != legal:
        raise ShapeError(f"weight must be {legal}, got {list(weight.shape)}.")
    merged, total = run(hidden, owner, valid, weight)
    return (merged, total.detach()) if totals else merged


def merge_tokens_reference(
    hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One owner at a time; arguments and result as in `merge_tokens` with `totals`."""
    samples, sizes = [], hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
    for b in range(hidden.shape[0]):
        rows = []
        for v in range(hidden.shape[1]):
            mine = valid[b] & (owner[b] == v)
            share = torch.ones_like(hidden[b, mine, 0]).float() if weight is None else weight[b, mine].float()
            total = share.sum()
            sizes[b, v] = total.detach()
            mean = (share[:, None] * hidden[b, mine].float()).sum(0) / total
            rows.append(mean.to(hidden.dtype) if total > 0 else hidden[b, v])
        samples.append(torch.stack(rows))
    return torch.stack(samples), sizes


def _shares(valid: Tensor, weight: Tensor | None) -> Tensor:
    return valid.float() if weight is None else weight.float().masked_fill(~valid, 0.0)


def _merge_tokens_torch(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, width = hidden.shape
    share = _shares(valid, weight)
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
    total = total.reshape(batch, length)
    return mean.where(total[:, :, None] > 0, hidden), total


# see `keep_tokens` on why only Triton goes through an operator; `share` is what `_shares` makes of valid and weight
@torch.library.custom_op("vtprune::merge_tokens", mutates_args=())
def _operator(hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_triton((hidden, owner, valid)):
        return _merge_tokens_torch(hidden, owner, valid, share)
    return _launch(hidden, owner, valid, share)


@_operator.register_fake
def _(hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), share.new_empty(share.shape)


@torch.library.custom_op("vtprune::merge_tokens_backward", mutates_args=())
def _gradients(
    grad: Tensor, hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    if runs_triton((hidden, owner, valid)):
        return _launch_backward(grad, hidden, owner, valid, share, total)
    target, counts = _targets(owner, valid, total)
    there = target[:, :, None].expand_as(hidden)
    whole = total.gather(1, target).where(counts, 1.0)[:, :, None]
    above = (grad.gather(1, there).float() / whole).masked_fill(~counts[:, :, None], 0.0)
    state = hidden.float().masked_fill(~counts[:, :, None], 0.0)
    passed = grad.float().masked_fill((total > 0)[:, :, None], 0.0)
    return (above * share[:, :, None] + passed).to(hidden.dtype), (above * state).sum(2)


@_gradients.register_fake
def _(
    grad: Tensor, hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), share.new_empty(share.shape)


def _targets(owner: Tensor, valid: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] whose mean each token enters, itself at padding, and whether it does."""
    target = owner.where(valid, torch.arange(owner.shape[1], device=owner.device).expand_as(owner))
    return target, valid & (total.gather(1, target) > 0)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, Tensor]:
    hidden, owner, valid, share, total = ctx.saved_tensors
    d_hidden, dots = _gradients(grad, hidden, owner, valid, share, total)
    # the product of the owner's gradient with its mean is the mean of the products, which no rounded mean enters
    target, counts = _targets(owner, valid, total)
    mean = torch.zeros_like(dots).scatter_add(1, target, share * dots) / total.where(total > 0, 1.0)
    return d_hidden, None, None, (dots - mean.gather(1, target)).masked_fill(~counts, 0.0)


_operator.register_autograd(_backward, setup_context=_save)


def _merge_tokens_triton(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return _operator(hidden, owner, valid, _shares(valid, weight))


def _launch(hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    from vtprune.kernels.merge_tokens_triton import merge

    return merge(hidden, owner, valid, share)


def _launch_backward(*operands: Tensor) -> tuple[Tensor, Tensor]:
    from vtprune.kernels.merge_tokens_triton import merge_gradients

    return merge_gradients(*operands)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Four tokens merge into one in the mean, as if pooled; the samples end in padding."""
    batch, length, width = (2, 19, 12) if size == "odd" else (4, 576, 4096)
    valid = torch.arange(length, device=device) < torch.arange(length, length - batch, -1, device=device)[:, None]
    owner = torch.randint(0, length // 4, (batch, length), device=device)
    return {
        "hidden": (torch.rand(batch, length, width, device=device) - 0.4).to(dtype),
        "owner": owner,
        "valid": valid,
        "weight": torch.rand(batch, length, device=device) + 0.1,
    }


def _least(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor) -> int:
    return 2 * nbytes(hidden) + nbytes(owner, valid, weight)


def _moved(hidden: Tensor, owner: Tensor, valid: Tensor, weight: Tensor) -> int:
    # what owns nothing reads itself, three of four; each of the blocks of a row reads its members' numbers and weights
    alone = nbytes(hidden) * 3 // 4
    return 2 * nbytes(hidden) + alone + owner.numel() * (16 * -(-hidden.shape[2] // 512) + 4)


KERNEL = Kernel(
    run=merge_tokens,
    example=_example,
    operator="vtprune::merge_tokens",
    operands=lambda hidden, owner, valid, weight: (hidden, owner, valid, _shares(valid, weight)),
    launch=_launch,
    shape="B 4, V 576, D 4096",
    least=_least,
    moved=_moved,
    gradients=("hidden", "weight"),
    others={"backward": lambda hidden, *rest: _launch_backward(hidden, hidden, *rest, rest[2])},
)
