"""A small convolutional net: from what the instruction attends to, to what the answer will depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtprune.errors import ShapeError
from vtprune.predictors.checkpoint import Predictor

__all__ = ["RelevanceNet", "relative_attention"]

# of the mean attention; a token below a thousandth of it counts as not attended to
_FLOOR = 1e-3


def relative_attention(attention: Tensor, valid: Tensor) -> Tensor:
    """log((a / mean a + 0.001) / 1.001): 0 at a token that gets its even share, whatever V and the sum are.

    Args:
        attention: [B, V], not negative.
        valid: [B, V] False at padding, which may hold anything.

    Returns:
        [B, V] fp32, 0 at padding, and all 0 in a sample that gets no attention.
    """
    given = attention.float().masked_fill(~valid, 0.0)
    mean = given.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(mean > 0, given / mean.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return ((share + _FLOOR) / (1 + _FLOOR)).log().masked_fill(~valid, 0.0)


class RelevanceNet(Predictor):
    """Depthwise-separable 1-D convolutions along the visual tokens, as they stand in the sequence (arXiv 2506.01097).

    Each layer is a convolution of each channel by itself, a linear map between channels and GELU; a linear map to one
    number a token follows. Tokens outside the sequence count as zeros, so a sample does not depend on what it is padded
    with. The paper gives the channels below; kernel, activation, head and how the input is scaled are not published.
    Here the input is `relative_attention`.

    Args:
        fingerprint: of the model, see `Fingerprint.to_dict`.
        channels: of each layer.
        kernel: odd, tokens that each convolution reads.
    """

    kind: ClassVar[str] = "relevance"

    def __init__(
        self, fingerprint: Mapping[str, Any], channels: Sequence[int] = (32, 64, 128, 256, 512), kernel: int = 5
    ) -> None:
        super().__init__(fingerprint)
        if not channels or min(channels) < 1 or kernel < 1 or kernel % 2 == 0:
            raise ShapeError(
                f"a relevance net needs channels >= 1 and an odd kernel >= 1, got {tuple(channels)} and {kernel}."
            )
        entering = (1, *channels[:-1])
        self.depthwise = nn.ModuleList(nn.Conv1d(c, c, kernel, padding=kernel // 2, groups=c) for c in entering)
        self.pointwise = nn.ModuleList(nn.Conv1d(c, out, 1) for c, out in zip(entering, channels, strict=True))
        self.head = nn.Conv1d(channels[-1], 1, 1)

    def forward(self, attention: Tensor, valid: Tensor) -> Tensor:
        """What the instruction attends to -> logits, whose softmax is the predicted relevance.

        Args:
            attention: [B, V], not negative; its scale does not matter.
            valid: [B, V] False at padding, which lies at the end.

        Returns:
            [B, V] fp32 logits, -inf at padding.
        """
        if not attention.shape[1]:
            return attention.float()
        inside = valid[:, None]
        states = relative_attention(attention, valid)[:, None]
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            # biases make something of padding, which the next convolution must not read
            states = functional.gelu(pointwise(depthwise(states))).masked_fill(~inside, 0.0)
        return self.head(states)[:, 0].masked_fill(~valid, float("-inf"))
