"""Video-LLaVA: what only it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_models import CASES, CLIP, HOST_ENCODES_FIRST, HOST_KEEPS_BEAM_ORDER, LAYERS, Row
from oracle import hidden_keys, masked

import vtprune
from vtprune.hooks.families.base import family_of

CASE = CASES["video_llava"]


def films() -> dict[str, Any]:
    """Two videos in one prompt, a video and an image in another."""
    return CASE.batch(
        Row((("video", 2), ("video", 2)), 3, 5, 0),
        Row((("image", None), ("video", 2)), 1, 4, 1),
        Row((("image", None),), 2, 3, 2),
    )


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_videos_and_images_of_one_call_equal_masked_oracle(beams: int) -> None:
    if beams > 1 and not HOST_KEEPS_BEAM_ORDER:
        pytest.skip("this transformers gives the beams of a prompt with two videos other videos")
    model, inputs = CASE.model(), films()
    how = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False}
    with vtprune.prune(model, "fastv", 0.5) as session:
        out, report = model.generate(**inputs, **how), session.report
    wide = inputs["input_ids"].repeat_interleave(beams, 0)
    with masked(model, hidden_keys(report, wide, LAYERS, CASE.visual(wide))):
        assert torch.equal(out, model.generate(**inputs, **how))
    assert report.visual_tokens[::beams] == (68, 50, 16)


def seen_images(inputs: dict[str, Any], **changes: Any) -> Any:
    """The images of each prompt as the family reads the root's call."""
    model = CASE.model()
    family = family_of(model.config)(model)
    return family.prompt({**inputs, **changes}).images


def test_frames_are_numbered_in_each_video() -> None:
    two_films, mixed, image = seen_images(films())
    assert [[g.frame for g in grids] for grids in two_films] == [[0, 0, 1, 1]] * 2
    assert [(g.rows, g.cols, g.newline) for g in two_films[0][:2]] == [(1, 1, True), (4, 4, False)]
    assert [len(grids) for grids in mixed] == [1, 4]
    assert image == mixed[:1]


@pytest.mark.skipif(not HOST_ENCODES_FIRST, reason="this transformers takes no encoded features")
@torch.no_grad()
def test_encoded_videos_are_known_if_encoded_under_the_session() -> None:
    model, inputs = CASE.model(), films()
    pictures = {name: inputs.pop(name) for name in ("pixel_values_images", "pixel_values_videos")}
    before = model.model.get_video_features(pictures["pixel_values_videos"])
    image = model.model.get_image_features(pictures["pixel_values_images"])
    with vtprune.prune(model, "uniform", 0.5) as session:
        want = model(**inputs, **pictures).logits
        features = model.model.get_video_features(pictures["pixel_values_videos"])
        got = model(**inputs, mm_encoder_outputs={"image": image, "video": features}).logits
        assert torch.equal(got, want)
        assert session.report.visual_tokens == (68, 50, 16)
        with pytest.raises(vtprune.InputError, match=r"features of 6 frame\(s\), which were not encoded while"):
            model(**inputs, mm_encoder_outputs={"image": image, "video": before})


@torch.no_grad()
def test_the_cls_tokens_of_frames_stay_whatever_their_tower_drops() -> None:
    model, inputs = CASE.model(), CASE.batch(Row((("video", 2), ("video", 2)), 3, 5, 0))
    with vtprune.prune(model, vtprune.FlowCut(text_cut=False), 0.3) as session:
        model(**inputs)
        report = session.report
    assert {0, 17, 34, 51} < set(report.kept[-1].indices[0].tolist())
    assert report.average_tokens == pytest.approx((0.3 * 68,), abs=1)
    with (
        vtprune.prune(model, vtprune.FlowCut(text_cut=False), 0.03),
        pytest.raises(vtprune.BudgetError, match=r"its 2 newline or CLS tokens"),
    ):
        model(**inputs)


def test_another_selection_than_the_configs_is_refused() -> None:
    model, inputs = CASE.model(), films()
    with (
        vtprune.prune(model, "uniform", 0.5),
        pytest.raises(vtprune.InputError, match=r"vision_feature_select_strategy='full' differs from .*'default'"),
    ):
        model(**inputs, vision_feature_select_strategy="full")


def test_a_tower_without_cls_is_refused() -> None:
    config = CASE.config()
    config.vision_config = transformers.SiglipVisionConfig(**CLIP)
    config.vision_feature_select_strategy = "full"
    with pytest.raises(vtprune.UnsupportedModelError, match="'siglip_vision_model' tower, which has no CLS token"):
        vtprune.geometry(config)
