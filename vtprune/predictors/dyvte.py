"""Exit gates: has the text taken all it needs from the image by this layer?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from vtprune.errors import ShapeError
from vtprune.predictors.checkpoint import Predictor

__all__ = ["ExitGates"]


class ExitGates(Predictor):
    """A two-layer gate without biases behind each decoder layer but the last: GELU(x W1) W2 (arXiv 2411.19628, eq. 3).

    The paper also has a gate behind the last layer, where nothing is left to save. Its width of 2048 makes half a
    billion parameters for a 7B model; `width` is free here.

    Args:
        fingerprint: of the model, see `Fingerprint.to_dict`.
        layers, hidden: of its decoder, L and D.
        width: W, units between the two linear layers.
        read: which text the mean is taken over, see `DyVTE`.
    """

    kind: ClassVar[str] = "dyvte"

    def __init__(
        self,
        fingerprint: Mapping[str, Any],
        layers: int,
        hidden: int,
        width: int = 2048,
        read: Literal["behind", "all"] = "behind",
    ) -> None:
        super().__init__(fingerprint)
        self.knobs = {"read": read}
        if min(layers - 1, hidden, width) < 1:
            raise ShapeError(f"gates need layers >= 2, hidden and width >= 1, got {layers}, {hidden} and {width}.")
        self.down = nn.ModuleList(nn.Linear(2 * hidden, width, bias=False) for _ in range(layers - 1))
        self.up = nn.ModuleList(nn.Linear(width, 2, bias=False) for _ in range(layers - 1))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """[B, 2D] what the text holds after decoder layer `layer` -> [B, 2] logits of staying and of leaving."""
        return self.up[layer](functional.gelu(self.down[layer](features)))
