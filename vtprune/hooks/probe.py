"""Read q, k and v of single attention modules, whatever attention backend the user runs.

transformers looks its attention function up by `module.config._attn_implementation`. A probed module gets a copy of
its config that names our function; ours shows the tensors to an observer and then calls the user's own backend. No
layer runs twice, no attention map is asked for, and every other module keeps its config object.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Observer", "attach_probe"]

Observer = Callable[[Tensor, Tensor, Tensor, float, float | None], Tensor | None]
"""Called with query [B, H, M, d], key [B, Hkv, N, d], value [B, Hkv, N, d] (after RoPE and cache), the scaling, and the
soft cap of the logits or None. Returns what shall be added to the logits, [B, 1, 1, N], or None."""

_NAME = "vtprune_probe"
_probes: weakref.WeakKeyDictionary[nn.Module, tuple[Observer, Any]] = weakref.WeakKeyDictionary()


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    observer, theirs = _probes[module]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = observer(query, key, value, scaling, kwargs.get("softcap"))
    if bias is not None:
        attention_mask = _with_bias(attention_mask, bias)
    base = theirs._attn_implementation
    # eager functions live in each modeling file and are passed to HF's lookup as its default
    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)  # type: ignore[arg-type]
    # flash functions read module.config themselves and must find the user's there; a stand-in over the same weights has
    # it, while the module itself, which other threads may be calling, is left alone
    stand_in = copy.copy(module)
    stand_in.config = theirs
    return function(stand_in, query, key, value, attention_mask, **kwargs)


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """The mask of the sdpa or eager backend, boolean, added or None, and `bias` in one."""
    if mask is None:
        return bias
    return bias.where(mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def attach_probe(module: nn.Module, observer: Observer) -> Callable[[], None]:
    """Show every attention call of `module` to `observer`.

    Returns:
        a function that puts the module's own config object back.
    """
    AttentionInterface.register(_NAME, _probed_attention)
    theirs: Any = module.config
    ours = copy.copy(theirs)
    ours._attn_implementation = _NAME
    _probes[module] = (observer, theirs)
    module.config = ours  # type: ignore[assignment]

    def detach() -> None:
        module.config = theirs
        _probes.pop(module, None)

    return detach
