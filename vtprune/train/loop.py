"""The one training loop of all predictors: resumable to the bit, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtprune.errors import InputError, VtpruneError
from vtprune.processes import from_main, new_accelerator
from vtprune.train.config import LoopConfig
from vtprune.train.log import RunLog
from vtprune.train.processes import add_gradients, my_slice, same_weights
from vtprune.train.state import RunState, load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vtprune.progress import Progress

__all__ = ["LoopConfig", "LoopResult", "own_seed", "settings_of", "train_loop"]

# where and how often a run notes how it is doing does not change what comes out
_NOT_SETTINGS = ("micro_batch", "save_every", "log_every")


@dataclass(frozen=True)
class LoopResult:
    """How a run ended.

    Attributes:
        best_loss: smallest held-out loss; the module holds the weights that reached it.
        best_epoch: after which epoch; 0 if training never made the untrained module better.
        history: one row an epoch, the untrained module first: `step`, `epoch`, `lr`, `train_loss` and the held-out
            figures (`held_out_loss`, ...).
    """

    best_loss: float
    best_epoch: int
    history: tuple[dict[str, Any], ...]


def train_loop(
    module: nn.Module,
    train_size: int,
    loss: Callable[[Sequence[int]], Tensor],
    held_out: Callable[[], float | Mapping[str, float]],
    config: LoopConfig,
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
) -> LoopResult:
    """Train the parameters of `module` that require gradients; go on where an interrupted run in `folder` stopped.

    The order of the samples is drawn from the seed and the epoch. A run that was interrupted anywhere and started again
    ends with the same weights, to the bit, as one that was not. Of a batch each process takes a slice, and gradients
    are averaged over the samples, so the number of processes changes only the rounding; a loss that draws random
    numbers draws others in each process, the same ones in each run. The global random state is left as it was.

    Args:
        module: on its device; in the end it holds the weights with the smallest held-out loss. It trains in train mode
            and is left in eval mode.
        train_size: number of training samples.
        loss: mean loss, with gradients, of the samples at these places (ints in [0, train_size)).
        held_out: held-out loss of the module as it is, or figures with one called "loss". Called in eval mode and
            without gradients, on every process (the main process's figures count), also before the first step.
        config: of the run.
        folder: where the state (`state.safetensors`) and the log (`log.csv`) are kept.
        settings: what else the result depends on (model, data, ...), as JSON can hold it: a run is only continued with
            the same settings.
        progress: told of the steps, in the main process.
        accelerator: of this process; a new one if None.

    Raises:
        InputError: if the folder holds a run with other settings, or nothing can be trained.
        DamagedFileError: if its state is damaged.
        VtpruneError: if accelerate is not installed, or a loss is not finite.
    """
    if train_size < 1:
        raise InputError(f"training needs at least one sample, got {train_size}.")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(
            f"{type(module).__name__} has no parameter that requires gradients, so nothing can be trained."
        )
    run = _Run(
        module, train_size, loss, held_out, config, Path(folder), accelerator or new_accelerator("train"), progress
    )
    return run.train(dict(settings or {}))


def settings_of(config: Any) -> dict[str, Any]:
    """A trainer's settings but those of the loop, which `train_loop` knows itself; for its `settings`."""
    return {name: value for name, value in asdict(config).items() if name != "loop"}


@contextmanager
def own_seed(seed: int) -> Iterator[None]:
    """What is drawn inside on the CPU comes from `seed`, and the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class _Run:
    """One call of `train_loop`."""

    def __init__(
        self,
        module: nn.Module,
        train_size: int,
        loss: Callable[[Sequence[int]], Tensor],
        held_out: Callable[[], float | Mapping[str, float]],
        config: LoopConfig,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress | None,
    ) -> None:
        self.module, self.loss, self.held_out, self.config = module, loss, held_out, config
        self.size, self.folder, self.accelerator = train_size, folder, accelerator
        self.progress = progress if accelerator.is_main_process else None
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.epoch_steps = math.ceil(train_size / config.batch_size)
        self.steps = config.epochs * self.epoch_steps
        self.optimizer = _optimizer(self.parameters, config)
        self.state = RunState()
        self.settings: dict[str, Any] = {}
        self.log: RunLog | None = None

    def train(self, settings: dict[str, Any]) -> LoopResult:
        self.settings = _all_settings(self.module, self.size, self.config, settings)
        stored = load_state(self.folder, self.module, self.optimizer, self.settings)
        self.accelerator.wait_for_everyone()
        same_weights([*self.module.parameters(), *self.module.buffers()], self.accelerator)
        with _own_random_numbers(self.accelerator.device):
            if stored is None:
                self._end_of_epoch()
            else:
                self.state = stored
                self._open_log(list(stored.history[0]))
            if self.progress is not None:
                self.progress.start("training", self.steps)
                self.progress.step("training", self.state.step)
            while not self._finished():
                self._epoch()
        self.module.load_state_dict(self.state.best)
        self.module.eval()
        return LoopResult(self.state.best_loss, self.state.best_epoch, tuple(self.state.history))

    def _finished(self) -> bool:
        patience = self.config.patience
        return self.state.epoch >= self.config.epochs or (patience is not None and self.state.patience_used >= patience)

    def _epoch(self) -> None:
        state, config = self.state, self.config
        draws = torch.Generator().manual_seed(_mixed(config.seed, state.epoch))
        order = torch.randperm(self.size, generator=draws).tolist()
        self.module.train()
        first = state.step - state.epoch * self.epoch_steps
        for place in range(first, self.epoch_steps):
            self._step(order[place * config.batch_size : (place + 1) * config.batch_size])
            if place + 1 == self.epoch_steps:
                break
            if state.step % config.log_every == 0:
                self._append(self._row({}))
            if config.save_every is not None and state.step % config.save_every == 0:
                self._save()
        state.epoch += 1
        self._end_of_epoch()

    def _step(self, batch: Sequence[int]) -> None:
        state, config = self.state, self.config
        lr = config.lr_at(state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _seed_all(_mixed(config.seed, state.step, self.accelerator.process_index), self.accelerator.device)
        self.optimizer.zero_grad(set_to_none=True)
        mine, mean = my_slice(batch, self.accelerator), 0.0
        size = config.micro_batch or max(1, len(mine))
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            # a mean over the part, weighted by its share of the whole batch
            value = self.loss(part) * (len(part) / len(batch))
            value.backward()
            mean += value.item()
        mean = add_gradients(self.parameters, mean, self.accelerator)
        if not math.isfinite(mean):
            raise VtpruneError(
                f"the training loss of step {state.step + 1} is {mean}. Use a smaller learning rate than "
                f"{config.lr:g}; the last stored state is untouched."
            )
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        state.step += 1
        state.loss_sum += mean * len(batch)
        state.loss_count += len(batch)
        if self.progress is not None:
            self.progress.step(f"epoch {state.epoch + 1} of {config.epochs}, loss {mean:.4g}")

    def _end_of_epoch(self) -> None:
        """Measure the held-out loss, log it, keep the best weights, store the state."""
        state = self.state
        same_weights(list(self.module.buffers()), self.accelerator)
        row = self._row(self._measure())
        if self.log is None:
            self._open_log(list(row))
        if row["held_out_loss"] < state.best_loss:
            state.best_loss, state.best_epoch, state.patience_used = row["held_out_loss"], state.epoch, 0
            state.best = {name: value.detach().to("cpu", copy=True) for name, value in self.module.state_dict().items()}
        else:
            state.patience_used += 1
        state.history.append(row)
        # the row first: a row without a state is dropped when the run goes on, a state without its row would miss it
        self._append(row)
        self._save()

    def _measure(self) -> dict[str, float]:
        self.module.eval()
        _seed_all(_mixed(self.config.seed, self.state.step), self.accelerator.device)
        with torch.no_grad():
            found = self.held_out()
        figures = {"loss": found} if isinstance(found, (int, float)) else dict(found)
        figures = from_main({name: float(value) for name, value in figures.items()}, self.accelerator)
        if "loss" not in figures or not math.isfinite(figures["loss"]):
            raise VtpruneError(
                f"held_out() must return a finite loss, or figures with one called 'loss', got {figures} after epoch "
                f"{self.state.epoch}."
            )
        return {f"held_out_{name}": value for name, value in figures.items()}

    def _row(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """A row of the log; the training loss is the mean over the samples since the row before."""
        state = self.state
        mean = state.loss_sum / state.loss_count if state.loss_count else None
        state.loss_sum, state.loss_count = 0.0, 0
        lr = self.config.lr_at(state.step - 1, self.steps) if state.step else 0.0
        # a row within an epoch names the epoch that runs, from 1
        epoch = state.epoch if figures else state.epoch + 1
        return {"step": state.step, "epoch": epoch, "lr": lr, "train_loss": mean, **figures}

    def _open_log(self, columns: Sequence[str]) -> None:
        if self.accelerator.is_main_process:
            self.log = RunLog(self.folder, columns, self.state.step if self.state.history else -1)

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.append(row)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            save_state(self.folder, self.state, self.module, self.optimizer, self.settings)


def _optimizer(parameters: Sequence[nn.Parameter], config: LoopConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


def _all_settings(module: nn.Module, size: int, config: LoopConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    loop = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    return {**settings, "loop": loop, "train_size": size, "module": {"class": type(module).__name__, "shapes": shapes}}


def _mixed(*numbers: int) -> int:
    """A seed that says all of these apart."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return mixed


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves the global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _seed_all(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
