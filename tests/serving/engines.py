"""vLLM engines in this process, what is asked of them, and what transformers answers with the same selection."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TOKENIZERS_PARALLELISM="false",
)

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vtprune
from vtprune.budget import Budget
from vtprune.integrations.vllm.embedded import export, widened
from vtprune.integrations.vllm.images import ImagePruner
from vtprune.integrations.vllm.settings import Settings, architecture_of
from vtprune.loading import load_config
from vtprune.plan import Plan, Site, Stage
from vtprune.specs import parse_method

ENVIRONMENT = dict(os.environ)
"""For programs of their own: engines leave variables behind in `os.environ` that are theirs alone."""
NEW = 6  # tokens of an answer
KINDS = ("llava", "qwen2_vl", "qwen2_5_vl", "internvl")
# how the processor of each kind is told where an image goes
_MARKS = {
    "llava": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
# what stands between a prompt's last image and the question, which a method that reads text sees as well
_BEHIND = {"llava": "", "qwen2_vl": "<|vision_end|>", "qwen2_5_vl": "<|vision_end|>", "internvl": "</img>"}
_QUESTION = " what color is the circle ? assistant :"
_LONG = " ".join(["is the circle red or blue or green ?"] * 6)


@dataclass(frozen=True)
class Ask:
    """A request: pictures, a budget of its own or None, and text before them."""

    sizes: tuple[tuple[int, int], ...]
    keep: Any = None
    long: bool = False


def picture(size: tuple[int, int]) -> Image.Image:
    """Blocks of noise, the same for one size."""
    wide, high = size
    blocks = np.random.RandomState(wide * 1000 + high).rand(high // 12 + 1, wide // 12 + 1, 3)
    pixels = np.kron(blocks, np.ones((12, 12, 1)))[:high, :wide]
    return Image.fromarray((pixels * 255).astype("uint8"))


def prompt(kind: str, ask: Ask) -> str:
    """What is asked, with a mark for each picture and words between them."""
    marks = " and ".join([_MARKS[kind]] * len(ask.sizes))
    return f"<bos> user : {_LONG + ' ' if ask.long else ''}{marks}{_QUESTION}"


def question(kind: str, processor: Any) -> str:
    """All text behind the last image of `prompt`."""
    asked = _BEHIND[kind] + _QUESTION
    inputs = processor(text=[prompt(kind, Ask(((48, 48),)))], images=[picture((48, 48))], return_tensors="pt")
    words = processor.tokenizer.encode(asked, add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert ids[len(ids) - ids[::-1].index(image) :] == words
    return asked


@lru_cache
def folder(kind: str, root: Path) -> Path:
    """A checkpoint that vLLM serves on a CPU."""
    place = root / kind
    from transformers import AutoModelForImageTextToText, AutoProcessor

    scale = 0.0
    if kind == "qwen2_5_vl":
        from tiny_checkpoints import save_qwen

        model = AutoModelForImageTextToText.from_pretrained(save_qwen(place, kind), dtype=torch.float32)
        scale = 1.6
    else:
        model = AutoModelForImageTextToText.from_pretrained(export(f"tiny:{kind}", place), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # random layers, so that answers depend on the picture; a random head, since the trained ones give words
            # that never occur the same logit
            size = 1.6 if "lm_head" in name else scale
            if value.ndim > 1 and size:
                generator = torch.Generator().manual_seed(value.numel())
                value.normal_(0, size / value[0].numel() ** 0.5, generator=generator)
    widened(model).save_pretrained(place)
    _rename_weights(place / "model.safetensors", kind)
    assert AutoProcessor.from_pretrained(place)
    return place


def _rename_weights(file: Path, kind: str) -> None:
    """Names of all the layouts there are: LLaVA's on the hub, InternVL's as transformers saved it since 4.52. Qwen's is
    saved as on the hub."""
    weights = load_file(file)
    if kind == "llava":
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()
        }
        assert len(set(renamed) - set(weights)) > 50
    elif kind == "internvl":
        part = re.compile(r"^(vision_tower|multi_modal_projector|language_model)(\.model)?\.")
        renamed = {part.sub(r"model.\1.", n): w for n, w in weights.items()}
        renamed["lm_head.weight"] = renamed.pop("model.language_model.lm_head.weight")
        assert not set(renamed) & set(weights)
    else:
        return
    save_file(renamed, file, {"format": "pt"})


@lru_cache(maxsize=1)
def hosts(place: Path) -> tuple[Any, Any]:
    """The same checkpoint in transformers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(place)


def reference_plan(model: Any, method: str, keep: Any, tokens: int) -> Plan:
    """The plan with which transformers does what vLLM does: rows close up where positions have one axis."""
    geometry, scorer = vtprune.hooks.geometry(model), parse_method(method)
    plan = scorer.plan(geometry.for_prompt(tokens, 64, 1), Budget.make(keep))
    if scorer.name == "random":
        # no prompt is known, as in a tower
        plan = Plan((Stage(Site("vision", geometry.vision.feature_block), scorer, plan.stages[0].keep),))
    if geometry.rotary_axes > 1:
        return plan
    if plan.stages[-1].site.kind == "input":
        return Plan((*plan.stages[:-1], dataclasses.replace(plan.stages[-1], positions="compact")))
    return plan + Plan((Stage(Site("input"), parse_method("uniform"), 1.0, positions="compact"),))


def reference(kind: str, place: Path, method: str, default: Any, ask: Ask) -> tuple[list[list[int]], list[int]]:
    """(kept tokens of each picture, the answer's tokens) of transformers."""
    model, processor = hosts(place)
    inputs = processor(text=[prompt(kind, ask)], images=[picture(s) for s in ask.sizes], return_tensors="pt")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    keep = default if ask.keep is None else ask.keep
    if isinstance(keep, int) and keep >= visual:
        keep = 1.0
    plan = reference_plan(model, method, keep, visual)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with vtprune.prune(model, plan) as session, torch.no_grad():
        answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        kept = session.report.kept[-1].indices[0].tolist() if session.report.kept else list(range(visual))
    totals = _tokens(kind, model, inputs, len(ask.sizes), visual)
    starts = [sum(totals[:i]) for i in range(len(totals))]
    return [[k - s for k in kept if s <= k < s + n] for s, n in zip(starts, totals, strict=True)], answer


def _tokens(kind: str, model: Any, inputs: Any, pictures: int, visual: int) -> list[int]:
    if kind.startswith("qwen"):
        cell = model.config.vision_config.spatial_merge_size**2
        return [int(grid.prod()) // cell for grid in inputs["image_grid_thw"]]
    return [visual // pictures] * pictures


@contextlib.contextmanager
def engine(place: Path, method: str, keep: Any, backend: str = "transformers", **options: Any) -> Iterator[Any]:
    """A vLLM engine with the plugin, shut down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    architecture = architecture_of(load_config(str(place)), backend)
    settings: dict[str, Any] = {
        "model": str(place),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 2},
        "hf_overrides": Settings.read({"method": method, "keep": keep}).overrides(architecture),
        **options,
    }
    llm = LLM(**settings)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def worker_model(llm: Any) -> Any:
    """The model of an engine that runs in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model


def vision_side(llm: Any) -> Any:
    """The part of `worker_model` that holds the tower and the `ImagePruner`."""
    model = worker_model(llm)
    return getattr(model, "vision_side", model)


def switch(llm: Any, method: str, keep: Any) -> None:
    """Give a running engine other settings; a start for each method would take minutes."""
    model = worker_model(llm)
    raw = {"method": method, "keep": keep}
    model.config.vtprune = raw
    llm.llm_engine.model_config.hf_config.vtprune = raw
    processor = llm.llm_engine.renderer.mm_processor
    processor.info.__dict__.pop("vtprune", None)
    processor.info.__dict__.pop("geometry", None)
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.reset_prefix_cache()
    encoder = vision_side(llm)
    encoder.pruner.remove()
    encoder.pruner = ImagePruner(encoder.model, Settings.read(raw))


@contextlib.contextmanager
def kept_sets() -> Iterator[list[list[int]]]:
    """What the worker keeps of each picture that is encoded meanwhile."""
    found: list[list[int]] = []
    finish = ImagePruner.finish

    def spying(self: ImagePruner, *given: Any) -> Any:
        pruned = finish(self, *given)
        found.extend(index.tolist() for _, index in pruned)
        return pruned

    ImagePruner.finish = spying
    try:
        yield found
    finally:
        ImagePruner.finish = finish


def answers(llm: Any, kind: str, asks: Sequence[Ask], new: int = NEW, **arguments: Any) -> list[Any]:
    """Greedy answers of vLLM, asked all at once; `arguments` go into the `mm_processor_kwargs` of each request."""
    from vllm import SamplingParams

    requests = []
    for ask in asks:
        request: dict[str, Any] = {
            "prompt": prompt(kind, ask),
            "multi_modal_data": {"image": [picture(size) for size in ask.sizes]},
        }
        own = arguments if ask.keep is None else {**arguments, "vtprune_keep": ask.keep}
        if own:
            request["mm_processor_kwargs"] = own
        requests.append(request)
    greedy = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    return llm.generate(requests, greedy, use_tqdm=False)
