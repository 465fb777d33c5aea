"""Which model a predictor was trained for: enough of its shape and weights to tell it from another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Fingerprint"]

_VALUES = 16
# bf16 and fp16 copies of a model are still that model
_ROUNDING = 0.02


@dataclass(frozen=True)
class Fingerprint:
    """Of a vision-language model.

    Attributes:
        architecture: class name.
        layers, hidden: of the decoder.
        revision: commit of the checkpoint on the hub, None if it came from elsewhere.
        values: some of the word embeddings, () if they cannot be read (weights that are offloaded).
    """

    architecture: str
    layers: int
    hidden: int
    revision: str | None = None
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Of a loaded `transformers` model."""
        text = model.config.get_text_config()
        weight = model.get_input_embeddings().weight.detach()
        values: tuple[float, ...] = ()
        if weight.device.type != "meta":
            # fixed cells of the first rows, so that words added at the end change nothing
            cells = [((7 + 5 * i) % min(64, weight.shape[0]), (3 + 31 * i) % weight.shape[1]) for i in range(_VALUES)]
            values = tuple(float(weight[row, column]) for row, column in cells)
        return cls(
            architecture=type(model).__name__,
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            revision=getattr(model.config, "_commit_hash", None),
            values=values,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_dict`."""
        return cls(**{**data, "values": tuple(data["values"])})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "values": list(self.values)}

    def __str__(self) -> str:
        at = f" at {self.revision[:8]}" if self.revision else ""
        return f"{self.architecture}{at}, {self.layers} layers of width {self.hidden}"

    def differences(self, other: Fingerprint) -> list[str]:
        """What tells the two models apart, in words; [] if nothing does. Unknown revisions and values say nothing."""
        found = [
            f"{name} {mine!r} and {theirs!r}"
            for name in ("architecture", "layers", "hidden")
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        if self.revision and other.revision and self.revision != other.revision:
            found.append(f"revision {self.revision[:8]} and {other.revision[:8]}")
        if self.values and other.values:
            scale = max(map(abs, self.values))
            if any(abs(a - b) > _ROUNDING * scale for a, b in zip(self.values, other.values, strict=True)):
                found.append("the weights themselves")
        return found
