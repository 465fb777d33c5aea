"""Checkpoints of predictors: safetensors and a JSON config in the hub's usual form, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vtprune.errors import CheckpointError
from vtprune.predictors.fingerprint import Fingerprint

__all__ = ["Predictor", "load_predictor", "shipped_weights"]

P = TypeVar("P", bound="Predictor")

_CONFIG, _WEIGHTS, _KIND = "config.json", "model.safetensors", "vtprune_predictor"
_SHIPPED = "tiny:"
_CARD = """---
{{ card_data }}
---

Weights of a token-pruning method of [vtprune](https://pypi.org/project/vtprune/), trained by `vtprune train`. The
model that they belong to stands in `config.json` under `fingerprint`; on any other one they are refused.
"""


class Predictor(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vtprune",
    tags=["token-pruning", "vision-language"],
    model_card_template=_CARD,
):
    """Base of the learned modules. `save_pretrained`, `from_pretrained` and `push_to_hub` are the hub's own.

    Attributes:
        kind: the method that uses it.
        fingerprint: the model that it was trained for.
        knobs: of the method, which it was trained with and means nothing without.
    """

    kind: ClassVar[str] = ""

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        super().__init__()
        self.fingerprint = Fingerprint.from_dict(fingerprint)
        self.knobs: dict[str, Any] = {}

    def _save_pretrained(self, save_directory: Path) -> None:
        arguments: Any = self._hub_mixin_config or {}
        config = {_KIND: self.kind, **arguments}
        (save_directory / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(
        cls: type[P],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> P:
        found = (config or {}).get(_KIND)
        if found != cls.kind:
            what = f"weights of {found!r}" if found else f"no {_CONFIG} of a predictor"
            raise CheckpointError(f"{model_id} holds {what}, expected those of {cls.kind!r}.")
        path = Path(model_id) / _WEIGHTS
        try:
            if not path.is_file():
                # there is no other format to fall back to: pickles are never opened
                path = Path(
                    hf_hub_download(
                        model_id,
                        _WEIGHTS,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
            predictor = cls(**model_kwargs)
            predictor.load_state_dict(load_file(path))
        except (EntryNotFoundError, HFValidationError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{model_id} does not hold the weights of {cls.kind!r}: {error}") from error
        return predictor.float().eval()


def shipped_weights(kind: str, fingerprint: Fingerprint) -> str | None:
    """Name of the weights of `kind` that ship for this very model, such as `tiny:llava`; None if there are none."""
    for config in sorted(_tiny().glob(f"*/predictors/{kind}/{_CONFIG}")):
        known = Fingerprint.from_dict(json.loads(config.read_text(encoding="utf-8"))["fingerprint"])
        if not known.differences(fingerprint):
            return _SHIPPED + config.parts[-4]
    return None


def load_predictor(cls: type[P], weights: str, device: torch.device | str = "cpu") -> P:
    """The predictor in a folder, in a repository of the hub, or shipped with the package (`tiny:llava`); kept loaded.

    Raises:
        CheckpointError: if there is none, it is of another kind, or its files are damaged.
    """
    folder = Path(weights)
    if weights.startswith(_SHIPPED):
        folder = _tiny() / weights.removeprefix(_SHIPPED) / "predictors" / cls.kind
        weights = str(folder)
    if not folder.is_dir() and (folder.is_absolute() or weights.count("/") != 1):
        raise CheckpointError(
            f"weights of {cls.kind!r} must be a folder that `vtprune train` wrote or the name of a repository on the "
            f"hub (user/name), got {weights!r}, which is neither."
        )
    file = folder / _WEIGHTS
    stamp = file.stat().st_mtime_ns if file.is_file() else 0
    return _loaded(cls, weights, stamp, torch.device(device))


@lru_cache(maxsize=16)
def _loaded(cls: type[P], weights: str, stamp: int, device: torch.device) -> P:
    try:
        return cls.from_pretrained(weights).to(device)
    except (OSError, HfHubHTTPError, json.JSONDecodeError) as error:
        raise CheckpointError(f"weights of {cls.kind!r} cannot be read from {weights}: {error}") from error


def _tiny() -> Path:
    return Path(__file__).parent.parent / "tiny"
