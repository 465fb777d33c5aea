"""Which pixels the features cover that a model has encoded before it is called.

`generate` encodes images and videos first and then calls the model with the features alone: sizes are gone by then. The
features of an image keep their identity on that way (beams repeat them, nothing copies them), so a book that is written
when they are made, and looked up when they arrive, knows the grids of each.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from vtprune.hooks.families.base import Family, Modality

__all__ = ["Encoding", "remember_grids"]

Encoding = Callable[[Modality, Mapping[str, Any]], AbstractContextManager[None]]
"""Called with what is about to be encoded, and the arguments by name."""


def remember_grids(root: nn.Module, family: Family, encoding: Encoding | None) -> Callable[[], None]:
    """Write the family's book whenever `root` encodes images or videos.

    Args:
        root: see `Parts`.
        family: the model's.
        encoding: is entered, with what is encoded, while that is done; None if nobody wants to know.

    Returns:
        what takes the effect back.
    """
    before: dict[str, Any] = {}
    for modality in family.modalities() if family.images_differ or encoding is not None else ():
        name = f"get_{modality.name}_features"
        before[name] = vars(root).get(name)
        setattr(root, name, _watched(getattr(root, name), modality, family, encoding or _nobody))

    def undo() -> None:
        for name, method in before.items():
            if method is None:
                # the method of the class shows again
                del vars(root)[name]
            else:
                setattr(root, name, method)

    return undo


def _nobody(modality: Modality, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _watched(encode: Callable[..., Any], modality: Modality, family: Family, encoding: Encoding) -> Callable[..., Any]:
    signature = inspect.signature(encode)

    # generate() reads the signature to find out which arguments to pass
    @functools.wraps(encode)
    def watched(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        # some releases name the pixels of videos as those of images: they come first all the same
        arguments.setdefault(modality.pixels, next(iter(arguments.values()), None))
        arguments.update(arguments.pop("kwargs", {}))
        with encoding(modality, arguments):
            output = encode(*args, **kwargs)
        if family.images_differ and getattr(output, "pooler_output", None) is not None:
            family.remember(modality, output, arguments)
        return output

    return watched
