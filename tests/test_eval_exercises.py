"""The bundled tasks that isolate one ability each: they load, are asked, pruned and counted; films are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eval_helpers
import pytest

pytest.importorskip("lmms_eval", reason="needs the eval extra")

from PIL import Image

from vtprune.errors import InputError
from vtprune.eval import BUNDLED_TASKS, DEFAULT_TASKS, exercise_data, task_data
from vtprune.eval.asking import media_arguments, read_medium, visual_tokens
from vtprune.eval.harness import Harness
from vtprune.eval.suites import SUITES
from vtprune.tiny import load_tiny
from vtprune.tiny.exercises import exercise
from vtprune.videos import Video

# name -> (maker of its questions, pictures or frames a question, kinds)
TASKS: dict[str, Any] = {
    "vtp_words": (exercise_data.words_docs, 1, {"read"}),
    "vtp_fine": (exercise_data.fine_docs, 1, {"gap"}),
    "vtp_count": (exercise_data.count_docs, 1, {"count_color", "count_shape"}),
    "vtp_pairs": (exercise_data.pairs_docs, 2, {"which", "color_in", "more"}),
    "vtp_video": (exercise_data.video_docs, 8, {"motion", "change"}),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise_data, "IMAGES", 6)


@pytest.fixture(scope="module")
def chat():
    from vtprune.eval.lmms_model import VtpruneChat

    return VtpruneChat(loaded=load_tiny("qwen2_vl"), batch_size=4)


def test_they_ship_and_the_default_stays_what_every_model_was_trained_for() -> None:
    assert set(BUNDLED_TASKS) == {*TASKS, *DEFAULT_TASKS}
    assert SUITES["embedded"] == DEFAULT_TASKS == ("vtp_easy_vqa", "vtp_scenes")
    assert set(SUITES["abilities"]) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_fixed_and_spread_over_images(name: str, few: None) -> None:
    make, pictures, kinds = TASKS[name]
    first, again = make(None), make(None)
    columns = ("question_id", "image_id", "question", "answer", "kind")
    assert [first[column] for column in columns] == [again[column] for column in columns]
    assert len(set(first["image_id"][:6])) == 6
    assert len(set(first["question_id"])) == len(first) > 6
    assert set(first["kind"]) == kinds
    for doc in first:
        shown = task_data.doc_to_visual(doc)
        assert len(shown) == pictures
        assert all(image.mode == "RGB" for image in shown)
    with task_data.question_seed(4):
        assert make(None)["image_id"] != first["image_id"]
    with task_data.question_seed(0, "dev"):
        assert not set(make(None)["image_id"]) & set(first["image_id"])


def test_seed_zero_of_the_test_split_is_left_to_the_model_card(few: None) -> None:
    docs: Any = TASKS["vtp_fine"][0](None)
    assert docs["image_id"][0] == "gaps-test-1-0"
    assert docs["question"][0] == exercise("gaps", "test", 1, 0).drafts[0].question


def test_counting_asks_numbers_only(few: None) -> None:
    docs: Any = TASKS["vtp_count"][0](None)
    assert all(question.startswith("how many ") for question in docs["question"])
    assert set(docs["answer"]) <= {str(number) for number in range(6)}


@pytest.mark.parametrize("name", TASKS)
def test_a_cell_runs_and_counts_its_tokens(name: str, few: None, chat) -> None:
    """A picture is 81 tokens for this model; a film's 8 frames are 4 moments, each enlarged to a picture's size."""
    harness = Harness([name], limit=4)
    full = harness.run(chat)[name]
    tokens = {"vtp_pairs": 162, "vtp_video": 324}.get(name, 81)
    assert [sample.counts["visual_tokens"] for sample in full] == [tokens] * 4
    for method in ("fastv", "random"):
        chat.attach(method, 0.25)
        pruned = harness.run(chat)[name]
        chat.detach()
        for sample in pruned:
            assert sample.counts["visual_tokens"] == tokens
            assert tokens / 5 < sample.counts["average_tokens"] <= tokens / 4 + 1
            assert sample.counts["kept_hash"]
    assert [sample.answer for sample in pruned] == [sample.answer for sample in full]


def test_films_reach_the_model_frame_by_frame(few: None, chat) -> None:
    """The inputs are those that the processor makes of the frames, in any batch."""
    import numpy as np

    prompts = Harness(["vtp_video"], limit=3).prompts(chat, "vtp_video", 3)
    inputs = chat.encode(prompts)
    films = [exercise("films", "test", 1, index).frames for index in range(3)]
    direct = chat.processor.video_processor(films, return_tensors="pt")
    assert (inputs["pixel_values_videos"] - direct["pixel_values_videos"]).abs().max() < 1e-5
    assert inputs["video_grid_thw"].tolist() == [[4, 18, 18]] * 3
    assert "pixel_values" not in inputs
    assert visual_tokens(chat.model.config, inputs["input_ids"]) == [324] * 3
    (medium,) = prompts[0][1]
    assert isinstance(medium, Video)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in medium.frames]), films[0])


def test_images_and_films_may_stand_in_one_batch(few: None, chat) -> None:
    harness = Harness(["vtp_video", "vtp_fine"], limit=1)
    prompts = [*harness.prompts(chat, "vtp_video", 1), *harness.prompts(chat, "vtp_fine", 1)]
    inputs = chat.encode(prompts)
    assert visual_tokens(chat.model.config, inputs["input_ids"]) == [324, 81]
    together = [text for text, _ in chat.answer(prompts, {"max_new_tokens": 2})]
    assert together == [chat.answer([prompt], {"max_new_tokens": 2})[0][0] for prompt in prompts]


def test_a_model_without_videos_refuses_them_by_name(few: None, tmp_path: Path) -> None:
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.loading import load_model

    chat = VtpruneChat(loaded=load_model(str(eval_helpers.save_askable(tmp_path))))
    with pytest.raises(InputError, match="LlavaForConditionalGeneration reads no videos"):
        Harness(["vtp_video"], limit=1).prompts(chat, "vtp_video", 1)
    # two pictures are no film
    assert Harness(["vtp_pairs"], limit=1).run(chat)["vtp_pairs"][0].counts["visual_tokens"] > 0


def test_media_are_images_frames_or_paths(chat) -> None:
    image = Image.new("RGB", (80, 80))
    assert read_medium(chat.model, chat.processor, image) is image
    film = read_medium(chat.model, chat.processor, [image] * 4)
    assert film == Video((image,) * 4, 2.0)
    assert read_medium(chat.model, chat.processor, film) is film
    with pytest.raises(InputError, match=r"no video file .*nowhere\.mp4"):
        read_medium(chat.model, chat.processor, "nowhere.mp4")
    words = media_arguments([film, image])
    assert words["images"] == [image]
    assert words["videos"][0].shape == (4, 80, 80, 3)
    assert media_arguments([]) == {}


def test_audio_is_refused(chat) -> None:
    from lmms_eval.protocol import ChatMessages

    said: Any = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    messages = ChatMessages(messages=said)
    with pytest.raises(InputError, match="'some_task' asks about audio"):
        chat.read(messages, "some_task")


def test_configs_without_an_image_token_are_refused() -> None:
    import torch

    ids = torch.tensor([[5, 7, 7, 8], [8, 5, 0, 0]])
    assert visual_tokens(SimpleNamespace(image_token_index=7), ids) == [2, 0]
    assert visual_tokens(SimpleNamespace(image_token_id=7, video_token_id=8), ids) == [3, 1]
    with pytest.raises(InputError, match="SimpleNamespace names no image token"):
        visual_tokens(SimpleNamespace(video_token_id=8), ids)
