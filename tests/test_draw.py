"""Kept tokens drawn back onto images and frames, for every family."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CASES, Row
from PIL import Image

import vtprune
from vtprune.errors import InputError
from vtprune.report import Report

RED = (200, 30, 30)


def pictures(report: Report, sample: int) -> list[Any]:
    """A red picture for each image of the sample, as many frames for each video as its grids need."""
    assert report.layout is not None
    made: dict[int, Any] = {}
    for grid, owner in zip(report.layout.grids[sample], report.layout.images[sample], strict=True):
        if grid.cols == int(grid.newline):
            continue  # a newline alone, behind a video
        red = Image.new("RGB", (96, 64), RED)
        made[owner] = red if grid.frame is None else [red] * (grid.frame + 2)
    return [made[owner] for owner in sorted(made)]


@lru_cache
def pruned(name: str) -> Report:
    """A batch of a sample with two images and one with a video (an image, where the family has no videos)."""
    case = CASES[name]
    second = ("video", case.videos[0]) if case.videos and case.mixes else ("image", case.sizes[-1])
    rows = Row((("image", case.sizes[0]), ("image", case.sizes[-1]))), Row((second,), seed=1)
    model = case.model()
    with torch.no_grad(), vtprune.prune(model, "random", keep=0.3) as session:
        model(**case.batch(*rows))
        return session.report


@pytest.mark.parametrize("name", sorted(CASES))
def test_survivors_stay_and_the_rest_is_greyed(name: str) -> None:
    report = pruned(name)
    layout = report.layout
    assert layout is not None
    for sample in range(2):
        drawings = vtprune.draw_kept(report, pictures(report, sample), sample=sample)
        shown = [i for i, grid in enumerate(layout.grids[sample]) if grid.cols > int(grid.newline)]
        assert [drawing.grid for drawing in drawings] == shown
        alive = set(report.kept[-1].indices[sample].tolist())
        assert 0 < len(alive) < layout.counts[sample]
        wanted = {drawing.grid: np.zeros((64, 96), bool) for drawing in drawings}
        for token in alive:
            box = layout.box(sample, token)
            if box is None:
                continue
            owner, frame, (left, top, right, bottom) = box
            number = int(layout.grid[sample, token])
            drawing = drawings[shown.index(number)]
            assert (drawing.image, drawing.frame) == (owner, frame)
            # pixels whose middle lies in the box
            down, across = (np.arange(64) + 0.5) / 64, (np.arange(96) + 0.5) / 96
            inside = ((down >= top) & (down < bottom))[:, None] & ((across >= left) & (across < right))[None]
            wanted[number] |= inside
        for drawing in drawings:
            same = (np.asarray(drawing.picture) == RED).all(-1)
            # a border that falls on a pixel's middle may go to either side
            assert (same != wanted[drawing.grid]).mean() < 0.02, drawing


def test_an_unpruned_call_is_drawn_whole() -> None:
    case = CASES["llava"]
    model = case.model()
    with torch.no_grad(), vtprune.prune(model, "random", keep=1.0) as session:
        model(**case.batch(Row((("image", case.sizes[0]),))))
        (drawing,) = vtprune.draw_kept(session.report, [Image.new("RGB", (32, 32), RED)])
    assert (np.asarray(drawing.picture) == RED).all()


def test_earlier_stages_show_more() -> None:
    case = CASES["llava"]
    model = case.model()
    with torch.no_grad(), vtprune.prune(model, ["uniform", "fastv"], keep=[8, 2]) as session:
        model(**case.batch(Row((("image", case.sizes[0]),))))
        report = session.report
    shown = [
        (np.asarray(vtprune.draw_kept(report, [Image.new("RGB", (32, 32), RED)], stage=stage)[0].picture) == RED)
        .all(-1)
        .mean()
        for stage in (0, 1)
    ]
    counts = [len(kept.indices[0]) / report.visual_tokens[0] for kept in report.kept]
    assert shown == pytest.approx(counts)
    assert counts[1] < counts[0]


@pytest.mark.parametrize(
    ("images", "options", "match"),
    [
        ([], {}, r"had 2 image\(s\) and video\(s\), got 0"),
        (["still", "still"], {"sample": 2}, r"had 2 sample\(s\), got sample=2"),
        (["still", "still"], {"stage": 1}, "stage must be one of the 1 that ran, got 1"),
        (["video", "still"], {}, "image 0 is a still image, got a sequence"),
        (["still"], {"sample": 1}, "image 0 is a video, got a single picture"),
        (["short"], {"sample": 1}, "has a token grid at frame .*, got only 1 frames"),
    ],
)
def test_wrong_pictures_are_refused(images: list[str], options: dict[str, int], match: str) -> None:
    still = Image.new("RGB", (32, 32), RED)
    made: dict[str, Any] = {"still": still, "video": [still] * 9, "short": [still]}
    with pytest.raises(InputError, match=match):
        vtprune.draw_kept(pruned("qwen2_vl"), [made[name] for name in images], **options)


def test_a_call_without_images_is_refused() -> None:
    case = CASES["llava"]
    model = case.model()
    with torch.no_grad(), vtprune.prune(model, "random", keep=0.3) as session:
        model(**case.batch(Row(())))
        with pytest.raises(InputError, match="held no images"):
            vtprune.draw_kept(session.report, [])
