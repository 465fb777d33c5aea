"""Many exits of one batch for little more than one call: what exits leave alone is computed once.

All visual tokens that leave behind layer l change nothing up to layer l. So the outputs of the layers are kept from one
full call, and a call that exits behind l is handed layer l's output instead of running the tower and layers 0 to l;
behind it only text is left.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Replay"]

_ENCODERS = ("get_image_features", "get_video_features")


class Replay:
    """Of one model and one batch. Use it as a context; the model is left as it was.

    Args:
        model: not pruned while the context opens and closes.
    """

    def __init__(self, model: Any) -> None:
        self._root, self._layers = model.base_model, list(model.get_decoder().layers)
        self._outputs: list[Any] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Replay:
        root = getattr(self._root, "model", self._root)
        for name in _ENCODERS:
            if hasattr(root, name):
                self._stack.callback(_instead(root, name, _once(getattr(root, name))))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._outputs = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The full call."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs.append(output)

        self._outputs = []
        handles = [layer.register_forward_hook(note) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def from_layer(self, layer: int) -> Iterator[None]:
        """Calls whose layers 0 to `layer` do what they did in the full call."""
        known = self._outputs[layer]
        with contextlib.ExitStack() as stack:
            for index, module in enumerate(self._layers[: layer + 1]):
                run = _given(known) if index == layer else _unchanged(known)
                stack.callback(_instead(module, "forward", run))
            yield


def _once(encode: Callable[..., Any]) -> Callable[..., Any]:
    """The first result, again and again: a batch has one set of pixels."""
    known: list[Any] = []

    @functools.wraps(encode)
    def encoded(*args: Any, **kwargs: Any) -> Any:
        if not known:
            known.append(encode(*args, **kwargs))
        return known[0]

    return encoded


def _given(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _unchanged(like: Any) -> Callable[..., Any]:
    """A layer that does nothing, in the form in which the host's layers return their states."""

    def run(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(like, Tensor) else (states, *like[1:])

    return run


def _instead(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put `method` on the instance; returns what takes it off again."""
    before = vars(owner).get(name)
    object.__setattr__(owner, name, method)

    def undo() -> None:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)

    return undo
