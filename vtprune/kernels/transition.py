"""How a sublayer changes the length and the direction of each token, in one read of what enters and what leaves it.

    magnitude[b, n] = ||after[b, n]|| / max(||before[b, n]||, tiny)
    cosine[b, n] = before[b, n] . after[b, n] / max(||before[b, n]|| ||after[b, n]||, 1e-8)

Axes: B samples, N tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.errors import ShapeError
from vtprune.kernels import Kernel, Size, nbytes, pick
from vtprune.kernels.guard import runs_triton

__all__ = ["EPSILON", "TINY", "transition", "transition_reference"]

# what the cosine is divided by is never smaller, as in torch's own cosine similarity
EPSILON = 1e-8
# nor the norm in front of the sublayer
TINY = torch.finfo(torch.float32).tiny


def transition(before: Tensor, after: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Magnitude ratio and cosine of each token's state before and after a sublayer. TransPrune reads them.

    Sums in fp32. Cost: one read of both inputs with "triton"; "torch" reads them once for each of its three sums.

    Args:
        before: [B, N, D] what goes into the sublayer.
        after: [B, N, D] what comes out of it.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        magnitude and cosine, each [B, N] fp32. A token of zeros has cosine 0.

    Raises:
        KernelError: if "triton" is asked for where it cannot run.
        ShapeError: if the shapes differ.
        UnknownNameError: if `impl` is not known.
    """
    table = {"triton": _transition_triton, "torch": _transition_torch, "reference": transition_reference}
    run = pick(impl, table, before, after)
    if before.dim() != 3 or before.shape != after.shape:
        raise ShapeError(
            f"before and after must both be [B, N, D], got {list(before.shape)} and {list(after.shape)}. Pass what "
            "goes into the sublayer and what comes out of it."
        )
    return run(before, after)


def transition_reference(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time, in fp64; arguments and result as in `transition`."""
    batch, length, _ = before.shape
    magnitude, cosine = torch.zeros(2, batch, length, dtype=torch.float64, device=before.device)
    magnitude, cosine = list(magnitude.flatten()), list(cosine.flatten())
    for i, (x, y) in enumerate(zip(before.double().flatten(0, 1), after.double().flatten(0, 1), strict=True)):
        one, two = (x * x).sum().sqrt(), (y * y).sum().sqrt()
        magnitude[i] = two / max(one, one.new_tensor(TINY))
        cosine[i] = (x * y).sum() / max(one * two, one.new_tensor(EPSILON))
    shape = (batch, length)
    return torch.stack(magnitude).float().reshape(shape), torch.stack(cosine).float().reshape(shape)


def _transition_torch(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(before, dim=-1, dtype=torch.float32).clamp(min=TINY)
    length = torch.linalg.vector_norm(after, dim=-1, dtype=torch.float32)
    inner = torch.einsum("bnd,bnd->bn", before.float(), after.float())
    return length / norm, inner / (norm * length).clamp(min=EPSILON)


# see `keep_tokens` on why only Triton goes through an operator
@torch.library.custom_op("vtprune::transition", mutates_args=())
def _operator(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(before, after) if runs_triton((before, after)) else _transition_torch(before, after)


@_operator.register_fake
def _(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = before.new_empty(before.shape[:2], dtype=torch.float32)
    return magnitude, torch.empty_like(magnitude)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, d_magnitude: Tensor, d_cosine: Tensor) -> tuple[Tensor, Tensor]:
    before, after, magnitude, cosine = ctx.saved_tensors
    x, y = before.float(), after.float()
    norm = torch.linalg.vector_norm(x, dim=-1).clamp(min=TINY)
    length = magnitude * norm
    product = norm * length
    # the cosine of nearly nothing is divided by a constant, and a vector of zeros has no direction to grow in
    clamped, still = product < EPSILON, length.clamp(min=TINY)
    turn = d_cosine / product.clamp(min=EPSILON)
    bend = (d_cosine * cosine).masked_fill(clamped, 0.0)
    stretch = d_magnitude * magnitude
    to_before = turn[..., None] * y - ((stretch + bend) / norm.square())[..., None] * x
    to_after = turn[..., None] * x + ((stretch - bend) / still.square())[..., None] * y
    return to_before.to(before.dtype), to_after.to(after.dtype)


_operator.register_autograd(_backward, setup_context=_save)


def _transition_triton(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    return _operator(before, after)


def _launch(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    from vtprune.kernels.transition_triton import measure

    return measure(before, after)


def _example(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    shape = (2, 19, 37) if size == "odd" else (1, 2880, 4096)
    return {name: (torch.rand(shape, device=device) - 0.4).to(dtype) for name in ("before", "after")}


def _least(before: Tensor, after: Tensor) -> int:
    return nbytes(before, after) + 2 * 4 * before.shape[:2].numel()


KERNEL = Kernel(
    run=transition,
    example=_example,
    operator="vtprune::transition",
    operands=lambda before, after: (before, after),
    launch=_launch,
    shape="B 1, N 2880, D 4096",
    least=_least,
    moved=_least,
    gradients=("before", "after"),
)
