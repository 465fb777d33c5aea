"""Where a training run stands: all that an interrupted run needs to go on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vtprune.errors import InputError
from vtprune.train.files import DamagedFileError, read_tensors, write_tensors

__all__ = ["STATE_FILE", "RunState", "load_state", "save_state"]

STATE_FILE = "state.safetensors"
_WEIGHTS, _ADAM, _BEST = "weights/", "adam/", "best/"


@dataclass
class RunState:
    """The figures of a run.

    Attributes:
        epoch: epochs that are done.
        step: optimizer steps that are done, over all epochs.
        best_loss, best_epoch: smallest held-out loss, and after which epoch; 0 is the untrained module.
        patience_used: epochs since then.
        loss_sum, loss_count: training loss since the last row of the log, summed over samples.
        history: one row an epoch, the untrained module first.
        best: weights of the best epoch, on the CPU.
    """

    epoch: int = 0
    step: int = 0
    best_loss: float = float("inf")
    best_epoch: int = 0
    patience_used: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def save_state(
    folder: Path, state: RunState, module: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]
) -> None:
    """Write `STATE_FILE` into `folder`; the former one is replaced once the new one is complete.

    Args:
        folder: of the run.
        state: figures and best weights.
        module: whose weights are stored, buffers included.
        optimizer: Adam or AdamW over parameters of `module`.
        settings: of the run, as JSON can hold them; `load_state` wants the same.
    """
    tensors = {_WEIGHTS + name: value for name, value in module.state_dict().items()}
    tensors |= {_BEST + name: value for name, value in state.best.items()}
    for name, parameter in module.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_ADAM}{kind}/{name}"] = value
    figures = {name: value for name, value in asdict(state).items() if name != "best"}
    write_tensors(folder / STATE_FILE, tensors, {"settings": dict(settings), "figures": figures})


def load_state(folder: Path, module: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]) -> RunState | None:
    """Put what `save_state` wrote into `module` and `optimizer`; None, and nothing happens, if there is no state.

    Raises:
        InputError: if the state belongs to a run with other settings.
        DamagedFileError: if the file is damaged. Neither it nor the module is touched.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    away = "Move it away to start anew, or pass another folder."
    try:
        tensors, note = read_tensors(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"the state of the run in {str(folder)!r} is lost: {error} {away}") from error
    if "figures" not in note or "settings" not in note:
        raise DamagedFileError(f"{str(path)!r} is not the state of a training run. {away}")
    differing = _differing(note["settings"], json.loads(json.dumps(dict(settings))))
    if differing:
        raise InputError(
            f"the run in {str(folder)!r} was started with other settings ({'; '.join(differing)}). Start it with the "
            "same ones to go on, or pass another folder."
        )
    state = RunState(**note["figures"], best=_part(tensors, _BEST))
    module.load_state_dict(_part(tensors, _WEIGHTS))
    parameters = dict(module.named_parameters())
    for entry, value in _part(tensors, _ADAM).items():
        kind, _, name = entry.partition("/")
        # Adam counts its steps on the CPU
        device = "cpu" if kind == "step" else parameters[name].device
        optimizer.state[parameters[name]][kind] = value.to(device)
    return state


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _differing(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`lr 0.1, now 0.2` for each setting that is not the same."""
    found = []
    for name in sorted({*stored, *given}):
        before, now = stored.get(name), given.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differing(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} {before!r}, now {now!r}")
    return found
