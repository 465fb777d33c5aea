"""Sources of small packages with the interface of the libraries that `vtprune bench --against` times."""

from __future__ import annotations

KVPRESS = """
from contextlib import contextmanager
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
    ALL_ATTENTION_FUNCTIONS[name] = lambda *args, function=function, **kwargs: function(*args, **kwargs)

class SnapKVPress:
    def __init__(self, compression_ratio):
        self.ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        layers = model.model.language_model.layers
        hooks = [layer.self_attn.register_forward_hook(self.cut, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def cut(self, module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        assert kwargs["cache_position"][-1] + 1 == layer.keys.shape[2]
        n = int(layer.keys.shape[2] * (1 - self.ratio))
        layer.keys, layer.values = layer.keys[:, :, :n].contiguous(), layer.values[:, :, :n].contiguous()
"""
SPARSEVLM = """
import torch

def sparsevlm_generate(model, processor, inputs, n_vis, keep_n_vis, max_new_tokens, target_layer, device):
    with torch.no_grad():
        out = model(**inputs, use_cache=True, output_attentions=True)
    rows = inputs["input_ids"].shape[1]
    assert out.attentions[target_layer].shape[-1] == rows
    kept = rows - n_vis + keep_n_vis
    for layer in out.past_key_values.layers:
        layer.keys, layer.values = layer.keys[:, :, :kept].contiguous(), layer.values[:, :, :kept].contiguous()
    mask = torch.ones(1, kept + 1, dtype=torch.long, device=device)
    start = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": out.past_key_values, "attention_mask": mask}
    return model.generate(**start, max_new_tokens=max_new_tokens, use_cache=True)
"""
ANGELSLIM = {
    "__init__.py": "",
    "compressor/__init__.py": "",
    "compressor/token_compressor/base/config.py": """
from dataclasses import dataclass

@dataclass
class DataRequirements:
    inputs_embeds: bool

@dataclass
class StrategyConfig:
    strategy: str
    params: dict

@dataclass
class TokenCompressorConfig:
    requirements: DataRequirements
    strategies: dict
""",
    "compressor/token_compressor/adapter.py": """
class UniversalPruningAdapter:
    def __init__(self, model, strategy_config, raw_map_data):
        plan = strategy_config.strategies["global"]
        assert strategy_config.requirements.inputs_embeds and plan.strategy == "divprune"
        self.model, self.ratio = model, plan.params["ratio"]
        for entry in raw_map_data:
            part = model.get_submodule(entry["path"])
            assert type(part).__name__ == entry["wrapper_class"].removeprefix("Prunable_")
            assert entry["wrapper_module"] == ".models.llava"

    def wrap_model(self):
        print("wrapped")
        self.hook = self.model.model.language_model.register_forward_pre_hook(self.cut, with_kwargs=True)

    def cut(self, module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            print("pruning")
            n = kwargs["inputs_embeds"].shape[1] - round(16 * self.ratio)
            kwargs = {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, :n], "attention_mask": None}
        return args, {**kwargs, "position_ids": None}

    def unwrap_model(self):
        print("unwrapped")
        self.hook.remove()
""",
}
FILES: dict[str, dict[str, str]] = {
    "kvpress": {"__init__.py": KVPRESS},
    "sparsevlm": {"__init__.py": SPARSEVLM},
    "angelslim": ANGELSLIM,
}
VERSIONS = {"kvpress": "0.5.5", "sparsevlm": "0.1.3", "angelslim": "0.5.0"}
