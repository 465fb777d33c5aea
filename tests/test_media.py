"""Image and video files through the real processors into the commands and the example, on tiny random checkpoints."""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import IMAGE, LAYERS, VIDEO
from oracle import hidden_keys, masked
from tiny_checkpoints import film, picture, save_llava_next_video, save_qwen
from typer.testing import CliRunner, Result

import vtprune
from vtprune.cli import app
from vtprune.errors import InputError, VtpruneError
from vtprune.images import open_image
from vtprune.loading import load_model
from vtprune.prompt import Question, prompt_inputs, read_video
from vtprune.videos import Video, open_video

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "qwen_images_and_video.py"
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    return {
        "wide": picture(folder / "wide.png", (64, 16)),
        "square": picture(folder / "square.png", (24, 24)),
        "clip": film(folder / "clip.mp4"),
    }


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_qwen(tmp_path_factory.mktemp(name), name) for name in QWEN}


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def question(model: Any, files: dict[str, Path]) -> Question:
    images = (open_image(files["wide"]), open_image(files["square"]))
    return Question("what ?", images, (read_video(model, files["clip"]),))


def test_frames_are_spread_over_the_film(files: dict[str, Path]) -> None:
    """12 frames in a second that get brighter by 17 a frame."""
    whole = open_video(files["clip"], lambda total, fps: total)
    assert (len(whole.frames), whole.fps) == (12, 12.0)
    light = [np.asarray(frame).mean() for frame in whole.frames]
    four = open_video(files["clip"], lambda total, fps: 4)
    assert four.fps == 4.0
    got = [np.asarray(frame).mean() for frame in four.frames]
    assert got == [light[i] for i in (0, 4, 7, 11)]
    assert all(b - a > 8 for a, b in itertools.pairwise(light))
    assert four.frames[0].size == (64, 48)
    assert len(open_video(files["clip"]).frames) == 8


def test_video_errors_name_the_file(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no video file 'gone\.mp4'"):
        open_video(Path("gone.mp4"))
    note = tmp_path / "note.txt"
    note.write_text("no frames here", encoding="utf-8")
    with pytest.raises(InputError, match=r"note\.txt' is not a video that PyAV can read"):
        open_video(note)
    with pytest.raises(InputError, match=r"clip\.mp4' has 12 frame\(s\), of which 13 were asked"):
        open_video(files["clip"], lambda total, fps: 13)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VtpruneError, match=r"needs PyAV .* pip install 'vtprune\[qwen\]'"):
        open_video(files["clip"])


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_qwen_prompts_of_images_and_a_video_equal_masked_oracle(
    name: str, qwen: dict[str, Path], files: dict[str, Path]
) -> None:
    model, processor = load_model(str(qwen[name]))
    asked = question(model, files)
    assert asked.videos[0].fps == 4.0
    inputs = prompt_inputs(model, processor, [asked, Question("what", asked.images[1:])])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 16], [1, 6, 6], [1, 6, 6]]
    frames, high, wide = inputs["video_grid_thw"][0].tolist()
    # 4 frames, two of them a step; qwen-vl-utils gives a frame 128 tokens or more
    assert frames == 2
    assert 128 <= high * wide // 4 < 200
    ids = inputs["input_ids"]
    assert [(row == IMAGE).sum().item() for row in ids] == [16 + 9, 9]
    assert (ids == VIDEO).sum() == frames * high * wide // 4
    if name == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [0.5]
    with vtprune.prune(model, "fastv", 0.5) as session:
        logits, report = model(**inputs).logits, session.report
    assert report.visual_tokens == (25 + frames * high * wide // 4, 9)
    hidden = hidden_keys(report, ids, LAYERS, (ids == IMAGE) | (ids == VIDEO))
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)


def test_limits_of_the_processor_hold_for_images(qwen: dict[str, Path], tmp_path: Path) -> None:
    """64 tokens at most: qwen-vl-utils alone would allow 16384."""
    model, processor = load_model(str(qwen["qwen2_vl"]))
    large = open_image(picture(tmp_path / "large.png", (400, 400)))
    inputs = prompt_inputs(model, processor, [Question("what", (large,))])
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    same = processor(images=[large], text=["<|image_pad|>"], return_tensors="pt")
    assert same["image_grid_thw"].tolist() == [[1, 16, 16]]


def test_run_asks_qwen_about_images_and_a_video(qwen: dict[str, Path], files: dict[str, Path]) -> None:
    media = ("--image", files["wide"], "--image", files["square"], "--video", files["clip"])
    asked = ("--model", qwen["qwen2_vl"], *media, "--question", "what ?", "--max-new-tokens", "3")
    result = invoke("run", *asked, "--method", "uniform", "--keep", "50%")
    assert result.exit_code == 0, result.output
    lines = " ".join(result.output.split())
    model, processor = load_model(str(qwen["qwen2_vl"]))
    inputs = prompt_inputs(model, processor, [question(model, files)])
    tokens = int(((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)).sum())
    assert f"of {tokens}" in lines
    for line in ("wide.png", "square.png", "video", "clip.mp4", "question what ?"):
        assert line in lines


def test_run_reads_a_video_for_another_family(files: dict[str, Path], tmp_path: Path) -> None:
    folder = save_llava_next_video(tmp_path)
    media = ("--image", files["square"], "--video", files["clip"], "--question", "what ?")
    result = invoke("run", "--model", folder, *media, "--max-new-tokens", "2", "--method", "uniform", "--keep", "8")
    assert result.exit_code == 0, result.output
    model, processor = load_model(str(folder))
    inputs = prompt_inputs(model, processor, [question(model, files)])
    # 8 frames of 2 x 2 tokens
    assert (inputs["input_ids"] == VIDEO).sum() == 32
    assert inputs["pixel_values_videos"].shape[1] == 8
    assert "kept at input: 8 of" in result.output


def test_a_prompt_without_a_chat_template(qwen: dict[str, Path], files: dict[str, Path]) -> None:
    model, processor = load_model(str(qwen["qwen2_vl"]))
    processor.chat_template = None
    inputs = prompt_inputs(model, processor, [question(model, files)])
    ids = inputs["input_ids"][0].tolist()
    assert ids[:16] == [IMAGE] * 16
    assert ids[-2:] == [6, 7]


def test_media_errors_say_what_to_do(
    qwen: dict[str, Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke("run", "--video", files["clip"])
    assert result.exit_code == 2
    assert "clip.mp4' needs a --question" in result.stderr
    result = invoke("run", "--video", "gone.mp4", "--question", "what")
    assert "there is no video file 'gone.mp4'" in result.stderr
    model, processor = load_model(str(qwen["qwen2_vl"]))
    single = film(tmp_path / "single.mp4", frames=1)
    with pytest.raises(InputError, match=r"single\.mp4' has 1 frame; Qwen2VLForConditionalGeneration needs at least 2"):
        read_video(model, single)
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)
    with pytest.raises(VtpruneError, match=r"made by qwen-vl-utils .* pip install 'vtprune\[qwen\]'"):
        prompt_inputs(model, processor, [Question("what", (open_image(files["square"]),))])


def test_a_model_without_videos_says_so(files: dict[str, Path]) -> None:
    model, processor = vtprune.load_tiny("llava")
    clip = Video((open_image(files["square"]),), 1.0)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration reads no videos"):
        prompt_inputs(model, processor, [Question("what", (), (clip,))])


def test_the_example_runs(
    qwen: dict[str, Path], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    media = ["--image", files["wide"], "--image", files["square"], "--video", files["clip"]]
    for given in (media, media[:2]):
        command = [EXAMPLE, "--model", qwen["qwen2_5_vl"], *given, "--max-new-tokens", "2", "--keep", "1/2"]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        said = capsys.readouterr().out
        assert said.startswith("all tokens:")
        assert "1/2 of them:" in said
        assert "visual tokens" in said
