"""The models that the demo offers, each loaded when it is first asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from vtprune.budget import Geometry

__all__ = ["EMBEDDED", "Loaded", "Models"]

EMBEDDED = ("tiny:llava", "tiny:qwen2_vl", "tiny:internvl", "tiny:qwen2_vl_plus")


@dataclass(frozen=True)
class Loaded:
    """A model that is never run itself: every question gets copies of its modules over the same weights.

    So questions that are asked at once, or given up in the middle, cannot leave anything behind for the next one.
    """

    spec: str
    model: Any
    processor: Any
    geometry: Geometry
    reads_videos: bool

    def copy(self) -> Any:
        """Another tree of modules over the same weights."""
        from vtprune.bench.measure import shared_copy

        return shared_copy(self.model)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


class Models:
    """What `vtprune demo --model` named; nobody in a browser can load another one.

    Args:
        specs: as `vtprune.loading.load_model` takes them; the first is the one that the page opens with.
        device, dtype: as there.

    Raises:
        InputError: if there is none, or one has random weights.
    """

    def __init__(self, specs: Sequence[str] = EMBEDDED, device: str | None = None, dtype: str = "auto") -> None:
        if not specs:
            raise InputError("the demo needs at least one model.")
        for spec in specs:
            if spec.startswith("random:"):
                raise InputError(f"{spec!r} has random weights and cannot answer. Use `vtprune bench` for it.")
        self.specs = tuple(dict.fromkeys(specs))
        self._device, self._dtype = device, dtype
        self._loaded: dict[str, Loaded] = {}
        self._locks = {spec: threading.Lock() for spec in self.specs}

    def is_loaded(self, spec: str) -> bool:
        """It need not be waited for."""
        return spec in self._loaded

    def __getitem__(self, spec: str) -> Loaded:
        """The model, loaded if it is not yet.

        Raises:
            UnknownNameError: if this demo does not offer it.
            VtpruneError: if it cannot be loaded or pruned.
        """
        import vtprune
        from vtprune.loading import load_model

        if spec not in self.specs:
            raise UnknownNameError("model of this demo", spec, self.specs)
        with self._locks[spec]:
            if spec not in self._loaded:
                model, processor = load_model(spec, device=self._device, dtype=self._dtype)
                reads = getattr(processor, "video_processor", None) is not None
                self._loaded[spec] = Loaded(spec, model, processor, vtprune.geometry(model), reads)
        return self._loaded[spec]
