"""Writes the trained weights as a Hugging Face folder, and examples beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.tiny import vocabulary
from vtprune.tiny.scenes import scene_questions
from vtprune.tiny.training.decoder import PIXEL_MEAN, PIXEL_STD
from vtprune.tiny.training.network import build_llava

_TEMPLATE = (
    "<bos> {% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }} "
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
_EXAMPLE_SEED = 7


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer, image processor and chat template of the tiny LLaVA."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary.WORD_IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|\w+|[^\w\s]"), "removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _TEMPLATE
    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": vocabulary.IMAGE_SIZE, "width": vocabulary.IMAGE_SIZE},
        resample=2,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=vocabulary.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=_TEMPLATE,
    )


def load_trained(weights: Path) -> LlavaForConditionalGeneration:
    """The network with the weights of a `joint.pt`, fp32, in eval mode."""
    model = build_llava()
    state = {name.removeprefix("llava."): value for name, value in torch.load(weights).items()}
    model.load_state_dict(state)
    return model.eval()


def export(weights: Path, folder: Path) -> None:
    """Writes `weights` to `folder` in fp16 with config, tokenizer, processor and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load_trained(weights)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
        pad_token_id=vocabulary.PAD,
        max_new_tokens=8,
        do_sample=False,
    )
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    # safetensors writes 0600; everybody who installs the package must be able to read it
    (folder / "model.safetensors").chmod(0o644)


def write_examples(folder: Path, images: int = 3, per_image: int = 4) -> None:
    """Dev scenes as PNG files, with questions and answers in examples.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (image, asked) in enumerate(scene_questions("dev", images, _EXAMPLE_SEED, per_image)):
        name = f"scene_{number}.png"
        image.save(folder / name)
        entries += [
            {"image": name, "question": item.question, "answer": item.answer, "kind": item.kind} for item in asked
        ]
    (folder / "examples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
