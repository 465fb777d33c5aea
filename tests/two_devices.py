"""A second device that needs no hardware: tensors that say they lie on it, and operators that refuse to mix devices.

The numbers lie on the CPU, so results must be equal bit for bit; what is tested is that nothing meets a tensor of the
other device, and that is an error here as it is on real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# a device type that torch knows and that no build initialises when it is named
OTHER = torch.device("lazy:0")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._local_scalar_dense.default)
# real devices take indices from the CPU as well
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Elsewhere(Tensor):
    """A tensor that says it lies on `OTHER`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        self: Any = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=OTHER
        )
        self.held = held
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and (t.ndim or t.device.type != "cpu")]
    if there and here and func not in (*_MOVES, *_INDEXED):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {OTHER} and cpu")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        wrap = torch.device(asked) == OTHER
    elif func is torch.ops.aten.copy_.default:
        wrap = isinstance(args[0], Elsewhere)
    else:
        wrap = bool(there)
    args, kwargs = tree_map_only(Elsewhere, lambda t: t.held, (args, kwargs))
    out = func(*args, **kwargs)
    if not wrap:
        return out
    if func.__name__.split(".")[0].endswith("_") and not func.__name__.startswith("_"):
        return next(t for t in there)
    return tree_map_only(Tensor, Elsewhere, out)


class _Factories(TorchDispatchMode):
    """Makes and moves tensors onto `OTHER`; without it torch would look for the hardware."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` makes its result without the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == OTHER:
            return func(*args, **{**kwargs, "device": "cpu"}).to(OTHER)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """`OTHER` exists inside."""
    with _Factories(), _Literals():
        yield OTHER
