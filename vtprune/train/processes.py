"""The few things that several training processes do together, and that one does alone just the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtprune.predictors import Predictor
from vtprune.processes import new_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["add_gradients", "my_slice", "same_weights", "save_from_main"]


def my_slice(items: Sequence[int], accelerator: Accelerator) -> Sequence[int]:
    """This process's part of a batch: consecutive, the first processes one more where it does not divide."""
    world, rank = accelerator.num_processes, accelerator.process_index
    size, rest = divmod(len(items), world)
    start = rank * size + min(rank, rest)
    return items[start : start + size + (rank < rest)]


def save_from_main(predictor: Predictor, out: Path, dtype: torch.dtype) -> None:
    """Write the weights of a predictor, in `dtype`, from the main process; the others wait until they are there."""
    accelerator = new_accelerator("train")
    if accelerator.is_main_process:
        predictor.to(dtype).save_pretrained(out)
    accelerator.wait_for_everyone()


@torch.no_grad()
def same_weights(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Overwrite tensors by the main process's."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().to(accelerator.device)))  # type: ignore[arg-type]


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter], loss: float, accelerator: Accelerator) -> float:
    """Sum gradients, and a loss, over the processes; a parameter that no process used keeps no gradient.

    Returns:
        the sum of the losses.
    """
    if accelerator.num_processes == 1:
        return loss
    used = [float(p.grad is not None) for p in parameters]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # one message a step; what is small goes in front
    flat = torch.cat(
        [torch.tensor([loss, *used], dtype=dtype, device=accelerator.device)]
        + [piece.to(accelerator.device, dtype).flatten() for piece in pieces]
    )
    total: Any = accelerator.reduce(flat, "sum")
    sizes = [1 + len(used), *(p.numel() for p in parameters)]
    head, *sums = total.split(sizes)
    for parameter, is_used, value in zip(parameters, head[1:].tolist(), sums, strict=True):
        parameter.grad = value.view_as(parameter).to(parameter) if is_used else None
    return float(head[0])
