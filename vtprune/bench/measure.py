"""What one model and one batch cost: prefill split at the tower, decode steps, live memory, cache bytes."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtprune.bench.timing import interleaved_medians
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.stopwatch import timer

__all__ = ["BareDecoder", "Decoder", "Prefill", "Started", "cache_bytes", "peak_bytes", "shared_copy"]


def shared_copy(model: Any) -> Any:
    """A second module tree over the same weights, so that a session on one leaves the other alone.

    Copy before the first forward pass: from then on transformers may hold hooks that refer to the original.
    """
    weights = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


class Started(NamedTuple):
    """What a prefill leaves: the cache and the first new token [batch, 1]."""

    past_key_values: Any
    token: Tensor


class Prefill:
    """One prefill of a batch, timed as a whole by the caller and at the tower by itself.

    Args:
        model: a model of the bench's own (its `get_image_features` is wrapped on the instance).
        inputs: what the processor returned.

    Attributes:
        tower_s: seconds of tower and projector, one entry a call.
        last: output of the last call.

    Raises:
        UnsupportedModelError: if the model has no `get_image_features`.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        base = model.base_model
        features = getattr(base, "get_image_features", None)
        if features is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no get_image_features(), which is where its prefill is split; "
                "bench needs a Hugging Face image-text-to-text model."
            )
        self.tower_s: list[float] = []
        self.last: Any = None
        self._model, self._inputs = model, inputs

        @wraps(features)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = timer()
            result = features(*args, **kwargs)
            self.tower_s.append(timer() - start)
            return result

        base.get_image_features = timed

    def __call__(self) -> Any:
        with torch.no_grad():
            self.last = self._model(**self._inputs, use_cache=True, logits_to_keep=1)
        return self.last

    def forget(self) -> None:
        """Drop the last output, so that its cache does not count as memory of the next call."""
        self.last = None


class Decoder:
    """Greedy decoding after one prefill, a few steps at a time, as `generate` does it.

    Args:
        model: the model.
        inputs: what the processor returned.
        steps: tokens a call.
        start: the prefill, if it is not the model's own; its cache may hold fewer rows than the prompt has.
    """

    def __init__(
        self, model: Any, inputs: Mapping[str, Tensor], steps: int = 8, start: Callable[[], Started] | None = None
    ) -> None:
        self._model, self._steps = model, steps
        self._mask = prompt = inputs["attention_mask"]
        with torch.no_grad():
            if start is None:
                out = model(**inputs, use_cache=True, logits_to_keep=1)
                self._cache, self._token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            else:
                self._cache, self._token = start()
                self._mask = prompt.new_ones(prompt.shape[0], self._cache.get_seq_length())
        self._ahead = prompt.sum(dim=1, keepdim=True) - self._mask.sum(dim=1, keepdim=True)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            for _ in range(self._steps):
                self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], 1)], dim=1)
                # positions continue from the unpruned length, as in `generate`
                position = self._mask.sum(dim=1, keepdim=True) + self._ahead - 1
                out = self._model(
                    input_ids=self._token,
                    attention_mask=self._mask,
                    position_ids=position,
                    past_key_values=self._cache,
                    use_cache=True,
                )
                self._token = out.logits[:, -1:].argmax(-1)
        return self._token


class BareDecoder:
    """The decoder alone, without pruning, on prompts of any length: what fewer tokens are worth on this machine.

    Small matrices keep a processor less busy, so even a prompt that is short from the start is rarely faster by as much
    as its FLOPs are fewer. That share is no pruning method's fault, and none can beat it.

    Args:
        model: a model of the bench's own.
        batch: samples.
        length: rows of the unpruned prompt.
        rounds: timed calls of each length; the median counts.
    """

    def __init__(self, model: Any, batch: int, length: int, rounds: int) -> None:
        self._decoder = model.get_decoder()
        weight = next(self._decoder.parameters())
        width = model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(batch, length, width, generator=generator)
        self._states = states.to(weight.device, weight.dtype)
        self._length, self._rounds = length, rounds
        self._shares: dict[int, float] = {length: 1.0}

    def ratio(
        self,
        lengths: Sequence[int],
        beside: Sequence[tuple[int, float]] = (),
        progress: Callable[[str], object] | None = None,
    ) -> float:
        """Time of decoder layers as a share of the unpruned prompt's.

        Args:
            lengths: rows that each layer sees.
            beside: what ran only to be asked: rows, and how much of a layer they passed through.
            progress: called after every timed call.
        """
        missing = sorted({*lengths, *(n for n, _ in beside)} - set(self._shares))
        if missing:
            runs = {str(n): partial(self._run, n) for n in (self._length, *missing)}
            times = interleaved_medians(runs, self._rounds, warmup=1, progress=progress)
            full = times[str(self._length)].median_s
            self._shares |= {n: times[str(n)].median_s / full for n in missing}
        total = sum(self._shares[n] for n in lengths) + sum(self._shares[n] * part for n, part in beside)
        return total / len(lengths)

    def _run(self, length: int) -> Any:
        with torch.no_grad():
            return self._decoder(inputs_embeds=self._states[:, :length], use_cache=True)


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of a cache's keys and values, and those that they keep alive.

    The two differ where a tensor is a view of a longer one, as the host's sliding layers are after a prompt.
    """
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(t.nbytes for t in tensors), sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Highest number of bytes that torch holds during `run()` above what it held before: activations and cache.

    On CUDA the allocator's own peak counter. On the CPU the profiler's log of every allocation and release, which is
    exact and repeatable where a process's resident size is not; scratch memory that a math library allocates by
    itself is not in it.

    Raises:
        InputError: on a device of another kind.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise InputError(f"peak memory is measured on cpu and cuda, got {device.type!r}. Pass --device cpu.")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    live = peak = 0
    for event in sorted(memory, key=lambda e: e["args"]["Ev Idx"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
