"""Which pixels a token covers, end to end: a spot painted on a picture changes the features of the tokens over it.

The real image processors cut the picture up; the towers' attention is silenced, so that a token sees its own patches
and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_models import CASES, IMAGE, VIDEO
from PIL import Image
from torch import Tensor, nn

from vtprune.hooks.families.base import family_of
from vtprune.layout import Layout

SQUARE = (
    "llava", "video_llava", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma", "paligemma2"
)  # fmt: skip


def processor(name: str) -> Any:
    """The family's image processor, set to the tiny model's sizes."""
    tile = {"height": 32, "width": 32}
    crops = {
        "size": tile,
        "crop_size": tile,
        "image_grid_pinpoints": CASES["llava_next"].config().image_grid_pinpoints,
    }
    qwen = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    made = {
        "llava": lambda: transformers.CLIPImageProcessor(size=tile, crop_size=tile),
        "video_llava": lambda: transformers.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=tile),
        "llava_next": lambda: transformers.LlavaNextImageProcessor(**{**crops, "size": {"shortest_edge": 32}}),
        "llava_next_video": lambda: transformers.LlavaNextImageProcessor(**{**crops, "size": {"shortest_edge": 32}}),
        "llava_onevision": lambda: transformers.LlavaOnevisionImageProcessor(**crops),
        "qwen2_vl": lambda: transformers.Qwen2VLImageProcessor(**qwen),
        "qwen2_5_vl": lambda: transformers.Qwen2VLImageProcessor(**qwen),
        "qwen3_vl": lambda: transformers.Qwen2VLImageProcessor(**qwen),
        "glm4v": lambda: transformers.Glm4vImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 8192}
        ),
        "mistral3": lambda: transformers.PixtralImageProcessor(patch_size=8, size={"longest_edge": 64}),
        "internvl": lambda: transformers.GotOcr2ImageProcessor(size=tile, crop_to_patches=False),
        "gemma3": lambda: transformers.Gemma3ImageProcessor(size=tile),
        "paligemma": lambda: transformers.SiglipImageProcessor(size=tile),
        "paligemma2": lambda: transformers.SiglipImageProcessor(size=tile),
        "idefics3": lambda: transformers.Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        "smolvlm": lambda: transformers.SmolVLMImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
    }
    return made[name]()


def silenced(name: str) -> Any:
    """The tiny model with towers in which no patch sees another."""
    model = CASES[name].model()
    for path, module in model.named_modules():
        is_output = path.rsplit(".", 1)[-1] in ("out_proj", "o_proj", "proj", "projection_layer")
        in_tower = "language_model" not in path and "text_model" not in path
        if isinstance(module, nn.Linear) and is_output and in_tower and ("attn" in path or "attention" in path):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def features(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[tokens, D] of the one picture in `inputs`."""
    names = ("pixel_values", "pixel_values_images", "image_sizes", "image_grid_thw")
    accepted = {k: v for k, v in inputs.items() if k in names}
    output = model.model.get_image_features(**accepted).pooler_output
    return output[0] if len(output) == 1 else torch.cat(list(output))


@pytest.mark.parametrize("spot", [(0.5, 0.25), (0.8, 0.9), (0.1, 0.6)])
@pytest.mark.parametrize("name", sorted(CASES))
@torch.no_grad()
def test_a_spot_changes_the_tokens_over_it(name: str, spot: tuple[float, float]) -> None:
    width, height = (32, 32) if name in SQUARE else (64, 32)
    centre = (int(spot[0] * width), int(spot[1] * height))
    ground = np.full((height, width, 3), 60, np.uint8)
    painted = ground.copy()
    painted[centre[1] - 1 : centre[1] + 1, centre[0] - 1 : centre[0] + 1] = 250
    if family_of(CASES[name].config()).proves_itself:
        pytest.skip("assumed, and said to be")
    model, prepare = silenced(name), processor(name)
    plain, other = (prepare(Image.fromarray(a), return_tensors="pt") for a in (ground, painted))
    change = (features(model, plain) - features(model, other)).abs().amax(-1)

    family = family_of(model.config)(model)
    grids = family.grids(family.modalities()[0], plain)
    ids = torch.full((1, sum(g.tokens for g in grids[0])), IMAGE)
    layout = Layout.from_images(ids == IMAGE, ids == IMAGE, [grids])
    assert len(change) == ids.shape[1]
    boxes = [layout.box(0, token) for token in range(len(change))]
    lit = change > 1e-4 * change.max()
    for token, box in enumerate(boxes):
        if box is None:
            assert not lit[token], "a newline token covers no pixels"
            continue
        left, top, right, bottom = box[2]
        x, y = centre[0] / width, centre[1] / height
        if left <= x <= right and top <= y <= bottom and change[token] > 0:
            assert lit[token]
        # resizing spreads the spot over a few pixels
        wide, high = right - left, bottom - top
        if lit[token]:
            assert left - wide < x < right + wide, (token, box, centre)
            assert top - high < y < bottom + high, (token, box, centre)
    brightest = boxes[int(change.argmax())]
    assert brightest is not None
    left, top, right, bottom = brightest[2]
    pixel = (1.5 / width, 1.5 / height)
    assert left - pixel[0] <= centre[0] / width <= right + pixel[0]
    assert top - pixel[1] <= centre[1] / height <= bottom + pixel[1]


@pytest.mark.parametrize("frame", [0, 2])
@pytest.mark.parametrize("name", ["video_llava", "llava_onevision", "llava_next_video"])
@torch.no_grad()
def test_a_spot_changes_the_tokens_of_its_frame(name: str, frame: int) -> None:
    model, films = silenced(name), torch.zeros(1, 3, 3, 32, 32)
    painted = films.clone()
    painted[0, frame, :, 9:11, 25:27] = 3.0
    plain, other = (model.model.get_video_features(f).pooler_output for f in (films, painted))
    # a tensor or a tuple of tensors, one a video or a frame
    changes = [(a - b).reshape(-1, a.shape[-1]) for a, b in zip(plain, other, strict=True)]
    lit = torch.cat(changes).abs().amax(-1) > 1e-5

    family = family_of(model.config)(model)
    grids = family.grids(family.modalities()[1], {"pixel_values_videos": films})
    ids = torch.full((1, len(lit)), VIDEO)
    layout = Layout.from_images(ids == VIDEO, ids == VIDEO, [grids])
    assert lit.any()
    for token, changed in enumerate(lit.tolist()):
        box = layout.box(0, token)
        inside = box is not None and box[1] == frame and box[2][0] <= 26 / 32 < box[2][2]
        inside = inside and box[2][1] <= 10 / 32 < box[2][3]
        assert changed == inside, (token, box)


@torch.no_grad()
def test_pan_and_scan_crops_are_images_of_their_own() -> None:
    """A wide picture gives the whole and three crops: a spot on the last third shows in the whole and the last crop."""
    model, prepare = silenced("gemma3"), processor("gemma3")
    ground = np.full((32, 96, 3), 60, np.uint8)
    painted = ground.copy()
    painted[8:16, 80:88] = 250
    scan = {"min_crop_size": 16, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
    scan = {"do_pan_and_scan": True, **{f"pan_and_scan_{name}": value for name, value in scan.items()}}
    plain, other = (prepare(Image.fromarray(a), **scan, return_tensors="pt") for a in (ground, painted))
    assert plain["num_crops"].tolist() == [3]
    change = (features(model, plain) - features(model, other)).abs().amax(-1).flatten()
    family = family_of(model.config)(model)
    images = family.grids(family.modalities()[0], plain)
    ids = torch.full((1, len(change)), IMAGE)
    layout = Layout.from_images(ids == IMAGE, ids == IMAGE, [images])
    boxes = [layout.box(0, token) for token in (change > 1e-4 * change.max()).nonzero()[:, 0].tolist()]
    assert {box[0] for box in boxes if box} == {0, 3}
    # 80 to 88 of 96 pixels, 16 to 24 of the last 32; a token is a quarter wide, and resizing spreads the spot
    assert all(box[2][2] > 80 / 96 for box in boxes if box and box[0] == 0)
    assert all(box[2][2] > 16 / 32 for box in boxes if box and box[0] == 3)
