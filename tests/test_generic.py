"""The generic family: what it serves, what it refuses and why, and that its dry call proves something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import CASES, CLIP, IMAGE, LAYERS, TEXT, Case, Row
from generic_models import GENERIC, MORE, VipLlava
from oracle import hidden_keys, masked
from PIL import Image
from torch import nn
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.hooks.cache import CacheRecord
from vtprune.hooks.families.llava import Llava
from vtprune.hooks.prefill import Prefill
from vtprune.tiny import tiny_folder

MODEL = VipLlava()
TINY = {**TEXT, "num_hidden_layers": 2}


def prompt(case: Case = MODEL) -> dict[str, Any]:
    """Two images apart, none, one."""
    first, second, third = (("image", size) for size in case.sizes)
    return case.batch(Row((first, second), 3, 5, 0), Row((), 2, 9, 2), Row((third,), 6, 2, 3))


@pytest.mark.parametrize("case", MORE, ids=[case.name for case in MORE])
@pytest.mark.parametrize("method", ["fastv", "divprune"])
@torch.no_grad()
def test_models_without_a_family_equal_masked_oracle(case: Case, method: str) -> None:
    model, inputs = case.model(), prompt(case)
    with vtprune.prune(model, method, 0.5) as session:
        logits, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*GENERIC, "llava", "qwen2_vl"])
def test_it_serves_what_no_other_family_does(name: str) -> None:
    geometry = vtprune.geometry(CASES[name].config())
    assert (geometry.family == "generic") == (name in GENERIC)
    assert (geometry.notes == ()) == (name not in GENERIC)


@torch.no_grad()
def test_geometry_is_assumed_and_said_to_be() -> None:
    model = MODEL.model()
    with vtprune.prune(model, "uniform", 0.5) as session:
        model(**prompt())
        report = session.report
    assert report.layout is not None
    square = report.layout.grids[2][0]
    assert (square.rows, square.cols, square.assumed) == (4, 4, True)
    assert len(report.layout.images[0]) == 2
    assert "note: which pixels a visual token covers is assumed" in report.summary()
    assert report.to_dict()["notes"] == list(report.notes)
    (drawing,) = vtprune.draw_kept(report, [Image.new("RGB", (32, 32))], sample=2)
    assert drawing.assumed


@torch.no_grad()
def test_placeholders_that_make_no_square_are_a_row() -> None:
    images, film = CASES["emu3"], CASES["perception_lm"]
    for case, medium, cols in ((images, ("image", None), 20), (film, ("video", 4), 64)):
        model = case.model()
        with vtprune.prune(model, "uniform", 0.5) as session:
            model(**case.batch(Row((medium,))))
            layout = session.report.layout
        assert layout is not None
        assert [(g.rows, g.cols) for g in layout.grids[0]] == [(1, cols)]


def test_flops_of_experts_are_said_to_be_counted_as_dense() -> None:
    with vtprune.prune(CASES["aria"].model(), "uniform", 0.5) as session:
        assert "FLOPs are counted for a dense decoder" in session.geometry.notes[1]
    with vtprune.prune(MODEL.model(), "uniform", 0.5) as session:
        assert len(session.geometry.notes) == 1


def _invoke(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments).output


def test_a_plan_from_a_config_says_what_it_does_not_know(tmp_path: Path) -> None:
    MODEL.config().save_pretrained(tmp_path)
    output = _invoke("plan", "--model", str(tmp_path), "--keep", "50%")
    assert "generic, 4 layers" in output
    assert "note  known from the config alone: the number of visual tokens is an example" in output
    CASES["llava"].config().save_pretrained(tmp_path)
    assert "note" not in _invoke("plan", "--model", str(tmp_path), "--keep", "50%")
    config = MODEL.config()
    config.text_config = transformers.Cohere2Config(**{**TINY, "num_hidden_layers": 4})
    config.save_pretrained(tmp_path)
    refused = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--keep", "50%"])
    assert refused.exit_code == 2
    assert "do not attend to everything (sliding_attention)" in " ".join(refused.stderr.split())


@pytest.mark.skipif(not (tiny_folder("llava") / "config.json").is_file(), reason="no embedded checkpoint in this tree")
def test_a_trained_model_passes_its_dry_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llava, "model_types", ())
    output = _invoke("run", "--model", "tiny:llava", "--method", "fastv", "--keep", "50%")
    assert "note: which pixels a visual token covers is assumed" in output
    assert "kept at layer[1]" in output


# what is refused, and why


def _with_text(text: Any) -> Any:
    config = MODEL.config()
    config.text_config = text
    return transformers.VipLlavaForConditionalGeneration(config)


def _mllama() -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


def _blip2() -> Any:
    query = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "encoder_hidden_size": 32}
    text = transformers.LlamaConfig(**TINY)
    config = transformers.Blip2Config(
        vision_config=CLIP, qformer_config=query, text_config=text.to_dict(), image_token_index=IMAGE
    )
    return transformers.Blip2ForConditionalGeneration(config)


def _opt() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 64}
    return _with_text(transformers.OPTConfig(vocab_size=100, **sizes))


def _chameleon() -> Any:
    vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 16, "num_embeddings": 9}
    config = transformers.ChameleonConfig(**TINY, vq_config=vq, vocabulary_map={"<image>": IMAGE})
    return transformers.ChameleonForConditionalGeneration(config)


def _compressed_cache() -> Any:
    sizes = {**TINY, "num_key_value_heads": 4}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    return _with_text(transformers.DeepseekV3Config(**sizes, **latent, first_k_dense_replace=2))


def _mrope() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return _with_text(transformers.LlamaConfig(**TINY, rope_parameters=rope))


def _convolutions() -> Any:
    return _with_text(transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]))


def _windows() -> Any:
    return _with_text(transformers.Cohere2Config(**{**TINY, "num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_mllama, "MllamaTextModel.forward takes cross_attention_states, .* nobody would shorten"),
        (_blip2, r"Blip2ForConditionalGeneration has a generate\(\) of its own"),
        (_opt, "the config of its 'opt' decoder has no num_key_value_heads, no intermediate_size"),
        (_chameleon, "ChameleonModel has no language_model and no text_model"),
        (_compressed_cache, "the cache held .* bytes where its config says .* something else than keys and values"),
        (_mrope, r"its rotary positions have several axes \(mrope_section\)"),
        (_convolutions, r"layers that do not attend to everything \(conv\)"),
        (_windows, r"layers that do not attend to everything \(sliding_attention\)"),
    ],
)
def test_models_off_the_contract_are_refused_with_a_reason(build: Callable[[], Any], reason: str) -> None:
    model = build().eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(vtprune.UnsupportedModelError, match=reason):
        vtprune.prune(model, "uniform", 0.5)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


# the dry call


class _Mixing(modeling_llama.LlamaDecoderLayer):
    """Adds to every token the mean of all earlier ones, hidden or not."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        steps = torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return super().forward(hidden_states + hidden_states.cumsum(1) / steps, **kwargs)


def test_a_decoder_that_mixes_tokens_elsewhere_is_refused() -> None:
    model = MODEL.model()
    model.model.language_model.layers[2].__class__ = _Mixing
    with pytest.raises(vtprune.UnsupportedModelError, match=r"at layer\[1\] \(prompt\) failed: .* differs from hiding"):
        vtprune.prune(model, "fastv", 0.5)


class _Counting(nn.Module):
    """Rotary positions counted by row, whatever position ids say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.inner(hidden, torch.arange(hidden.shape[1])[None] + position_ids[:, :1] * 0)


def test_a_site_that_is_not_exact_is_refused_and_another_served() -> None:
    model = MODEL.model()
    text = model.model.language_model
    text.rotary_emb = _Counting(text.rotary_emb)
    with pytest.raises(vtprune.UnsupportedModelError, match=r"its dry call at input \(prompt\) failed"):
        vtprune.prune(model, "uniform", 0.5)
    with pytest.raises(vtprune.UnsupportedModelError, match=r"its dry call at input, layer\[1\] \(prompt\) failed"):
        vtprune.prune(model, ["uniform", "fastv"], [8, 4])
    vtprune.prune(model, "fastv", 0.5).remove()


def test_a_decode_step_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets by how much the positions of a compacted prompt lag."""
    remembers = Prefill.record

    def forgets(self: Prefill) -> CacheRecord:
        record = remembers(self)
        for group in record.groups:
            group.lag = None
        return record

    monkeypatch.setattr(Prefill, "record", forgets)
    vtprune.prune(MODEL.model(), "fastv", 0.5).remove()
    with pytest.raises(vtprune.UnsupportedModelError, match=r"at layer\[1\] \(decode step\) failed"):
        vtprune.prune(MODEL.model(), vtprune.FastV(positions="compact"), 0.5)


def test_a_dry_call_that_cannot_tell_is_refused() -> None:
    model = MODEL.model()
    for layer in model.model.language_model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(vtprune.UnsupportedModelError, match=r"proves nothing: .* hiding other tokens by 0 only"):
        vtprune.prune(model, "uniform", 0.5)


def test_attention_that_cannot_be_read_is_refused_to_methods_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        @staticmethod
        def get_interface(*_: Any) -> Any:
            return modeling_llama.eager_attention_forward

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Own)
    model = MODEL.model("eager")
    with pytest.raises(vtprune.UnsupportedModelError, match="fastv reads the decoder's attention, which this model"):
        vtprune.prune(model, "fastv", 0.5)
    vtprune.prune(model, "uniform", 0.5).remove()


class _Broken(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")


def test_a_dry_call_that_breaks_is_refused() -> None:
    model = MODEL.model()
    model.model.language_model.layers[1].__class__ = _Broken
    with pytest.raises(vtprune.UnsupportedModelError, match="its dry call failed with RuntimeError: no such kernel"):
        vtprune.prune(model, "uniform", 0.5)


def test_ready_masks_that_nobody_knows_are_refused() -> None:
    model = MODEL.model()

    def ready(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": {"full_attention": None}}

    model.model.language_model.register_forward_pre_hook(ready, with_kwargs=True)
    with pytest.raises(vtprune.UnsupportedModelError, match="VipLlavaModel hands its text model a ready dict of masks"):
        vtprune.prune(model, "uniform", 0.5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_dry_call_leaves_the_model_as_it_was(fails: bool) -> None:
    model = MODEL.model()
    if fails:
        model.model.language_model.layers[2].__class__ = _Mixing
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), id(vars(m).get("config"))) for m in model.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(vtprune.UnsupportedModelError):
            vtprune.prune(model, "fastv", 0.5)
    else:
        vtprune.prune(model, "fastv", 0.5).remove()
    assert [module.training for module in model.modules()] == modes
    assert [
        (len(m._forward_pre_hooks), len(m._forward_hooks), id(vars(m).get("config"))) for m in model.modules()
    ] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [MODEL, CASES["aria"]], ids=["vipllava", "aria"])
def test_half_precision_is_proved_within_its_rounding(case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    for method in ("uniform", vtprune.FastV(positions="compact"), vtprune.FastV(layer=LAYERS - 1)):
        vtprune.prune(model, method, keep=0.9 if method != "uniform" else 0.5).remove()
    layer = model.model.language_model.layers[2]
    if case is MODEL:
        layer.__class__ = _Mixing
        with pytest.raises(vtprune.UnsupportedModelError, match=f"is rounding in {dtype}"):
            vtprune.prune(model, "uniform", 0.5)


def test_keeping_everything_needs_no_proof() -> None:
    model = MODEL.model()
    model.model.language_model.layers[1].__class__ = _Broken
    vtprune.prune(model, "uniform", 1.0).remove()


def test_a_second_session_is_refused_as_ever() -> None:
    model = MODEL.model()
    with vtprune.prune(model, "uniform", 0.5), pytest.raises(vtprune.VtpruneError, match="is already pruned by"):
        vtprune.prune(model, "uniform", 0.5)
