"""Labels that are computed once: batch by batch, on one process or many, kept on disk, found again after a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.processes import new_accelerator
from vtprune.train.files import DamagedFileError, read_tensors, write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vtprune.progress import Progress
    from vtprune.train.data import Example

__all__ = ["Labels", "label"]

Labels = dict[str, "Tensor | list[Tensor]"]
"""By name: a tensor whose first axis is the samples, or, where samples differ in shape, a list of one a sample."""


def label(
    examples: Sequence[Example],
    batch_size: int,
    make: Callable[[list[Example]], Mapping[str, Tensor | Sequence[Tensor]]],
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
) -> Labels:
    """What `make` says about all examples, in order, on the CPU and on every process.

    Each batch becomes one file in `folder`, whose name holds the number of the batch and a hash of the settings and of
    its examples. What is there already is not computed again; files of other settings or examples are left alone, and
    one that is cut off or damaged is computed anew. Batches are dealt to the processes in turn, which must see the
    same folder.

    Args:
        examples: what is labelled.
        batch_size: examples a batch; another one is another setting.
        make: called with the examples of a batch. Returns the same names each time, and under each
            either a tensor [B, ...] whose other axes do not depend on the batch, or B tensors.
        folder: of the files.
        settings: all that the labels depend on besides the examples (model, its revision, ...), as JSON can hold it.
        progress: told of the batches, in the main process.
        accelerator: of this process; a new one if None.

    Returns:
        tensors of `make` joined along the samples, lists one after the other.

    Raises:
        InputError: if there is no example, batch_size is below 1, two examples have one key, or `make` returns another
            number of samples than it was given, other names, or tensors that cannot be joined.
    """
    if batch_size < 1 or not examples:
        raise InputError(f"labelling needs examples and a batch size >= 1, got {len(examples)} and {batch_size}.")
    keys = [example.key for example in examples]
    if len(set(keys)) < len(keys):
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise InputError(f"every example needs a key of its own; {twice!r} occurs twice.")
    accelerator = accelerator or new_accelerator("train")
    batches = [list(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
    paths = [_path(Path(folder), index, batch, settings or {}) for index, batch in enumerate(batches)]
    mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
    shown = progress if accelerator.is_main_process else None
    if shown is not None:
        shown.start("labelling", len(mine))
    shards: dict[int, Labels] = {}
    for index in mine:
        found = _read(paths[index])
        if found is None:
            _write(paths[index], make(batches[index]), len(batches[index]))
            found = _read(paths[index])
        if found is not None:
            shards[index] = found
        if shown is not None:
            shown.step("labelling")
    accelerator.wait_for_everyone()
    for index in range(len(batches)):
        shard = shards[index] if index in shards else _read(paths[index])
        if shard is None:
            raise InputError(f"{str(paths[index])!r} is not there; all processes must see one folder. Start again.")
        shards[index] = shard
    return _joined([shards[index] for index in range(len(batches))])


def _path(folder: Path, index: int, batch: Sequence[Example], settings: Mapping[str, Any]) -> Path:
    content = json.dumps([settings, [example.key for example in batch]], sort_keys=True)
    return folder / f"{index:06d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def _write(path: Path, made: Mapping[str, Tensor | Sequence[Tensor]], count: int) -> None:
    stored: dict[str, Tensor] = {}
    for name, value in made.items():
        if len(value) != count:
            raise InputError(f"the label {name!r} has {len(value)} rows for {count} examples; it needs one for each.")
        if isinstance(value, Tensor):
            stored[name] = value
        else:
            stored |= {f"{name}/{row}": tensor for row, tensor in enumerate(value)}
    lists = sorted(name for name, value in made.items() if not isinstance(value, Tensor))
    write_tensors(path, stored, {"count": count, "lists": lists})


def _read(path: Path) -> Labels | None:
    """A file's labels; None if it is not there, or damaged."""
    if not path.exists():
        return None
    try:
        tensors, note = read_tensors(path)
    except DamagedFileError:
        return None
    lists: Labels = {name: [tensors.pop(f"{name}/{row}") for row in range(note["count"])] for name in note["lists"]}
    return {**tensors, **lists}


def _joined(shards: Sequence[Labels]) -> Labels:
    joined: Labels = {}
    for name, first in shards[0].items():
        parts = [shard.get(name) for shard in shards]
        if any(type(part) is not type(first) for part in parts) or any(
            shard.keys() != shards[0].keys() for shard in shards
        ):
            names = sorted({other for shard in shards for other in shard})
            raise InputError(f"batches differ in their labels ({', '.join(names)}); every batch needs the same ones.")
        if isinstance(first, Tensor):
            shapes = {tuple(part.shape[1:]) for part in parts}  # type: ignore[union-attr]
            if len(shapes) > 1:
                raise InputError(
                    f"the label {name!r} has rows of shapes {sorted(shapes)}; return a list of one tensor a sample."
                )
            joined[name] = torch.cat(parts)  # type: ignore[arg-type]
        else:
            joined[name] = [row for part in parts for row in part]  # type: ignore[union-attr]
    return joined
