"""Draws what each method keeps: `python docs/figures.py` writes `docs/assets/kept_*.png`.

One scene of the embedded LLaVA's own examples, one question, and what is left of its 256 visual tokens after each cut.
The answers under the pictures are the model's, whatever they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import vtprune
from vtprune.images import load_example

_ASSETS = Path(__file__).parent / "assets"
_EXAMPLE = 1
_SIDE, _GAP, _TEXT = 256, 16, 58
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Figure:
    """One method at one budget."""

    file: str
    title: str
    method: Any
    keep: int | float
    basis: str


def figures() -> list[Figure]:
    """TransPrune gets half, as its first layers see everything; the budget of GemFilter counts what survives."""
    gemfilter: Any = vtprune.GemFilter  # type: ignore[attr-defined]
    return [
        Figure("kept_flowcut.png", "FlowCut", "flowcut", 16, "average"),
        Figure("kept_transprune.png", "TransPrune", "transprune", 0.5, "average"),
        Figure("kept_gemfilter.png", "GemFilter", gemfilter(layer=3), 32, "final"),
    ]


def draw(figure: Figure, model: Any, processor: Any) -> Image.Image:
    """The picture with its question, then one panel a stage of the plan."""
    image, question = load_example(_EXAMPLE)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    shown = image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)

    def answer() -> str:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    panels = [(shown, question, f"unpruned: {answer()}")]
    with vtprune.prune(model, figure.method, figure.keep, basis=figure.basis) as session:
        pruned = answer()
        report = session.report
    for stage, kept in enumerate(report.kept):
        (drawing,) = vtprune.draw_kept(report, [shown], stage=stage)
        count = f"{len(kept.indices[0])} of {report.visual_tokens[0]} tokens"
        last = stage == len(report.kept) - 1
        panels.append((drawing.picture, f"{figure.title}, {kept.site}", f"{count}: {pruned}" if last else count))
    return _beside(panels)


def _beside(panels: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """Panels in a row, each with two centred lines below it."""
    sheet = Image.new("RGB", (len(panels) * (_SIDE + _GAP) + _GAP, _SIDE + 2 * _GAP + _TEXT), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for place, (picture, above, below) in enumerate(panels):
        left = _GAP + place * (_SIDE + _GAP)
        sheet.paste(picture, (left, _GAP))
        middle, top = left + _SIDE // 2, _SIDE + _GAP + 10
        pen.text((middle, top), above, _INK, font, anchor="ma")
        pen.text((middle, top + 24), below, _INK, font, anchor="ma")
    return sheet


def main() -> None:
    """Write every figure."""
    model, processor = vtprune.load_tiny("llava")
    _ASSETS.mkdir(exist_ok=True)
    for figure in figures():
        sheet = draw(figure, model, processor)
        sheet.save(_ASSETS / figure.file, optimize=True)


if __name__ == "__main__":
    main()
