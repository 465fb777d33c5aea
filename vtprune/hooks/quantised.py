"""Which quantised linears compute a token's output from that token alone, as pruning assumes."""

from __future__ import annotations

from torch import nn

from vtprune.errors import UnsupportedModelError

__all__ = ["check_quantised"]


def check_quantised(root: nn.Module) -> None:
    """Refuse linears whose int8 activations share one scale that is taken from all tokens of the call.

    There a token that is dropped changes the rounding of all others. Weights alone (torchao, GPTQ, AWQ, 4 bit), a fixed
    scale and one scale a token are fine: the latter is exact up to values that lie on the edge of two roundings.

    Raises:
        UnsupportedModelError: naming the first such module.
    """
    for name, module in root.named_modules():
        # told by name, so that no quantiser has to be installed
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") or _one_scale(module):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) quantises its inputs with one scale for all tokens of a call, so a "
                "token that is dropped changes the rounding of all others. Quantise the weights alone (torchao "
                "Int8WeightOnlyConfig), or take one scale a token (granularity PerRow)."
            )


def _one_scale(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    scales = getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None)
    return type(scales).__name__ == "PerTensor" and getattr(weight, "act_quant_scale", None) is None
