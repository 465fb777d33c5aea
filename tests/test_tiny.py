"""The embedded tiny VLMs: their data are right and repeatable, and the shipped checkpoints answer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from vtprune.errors import VtpruneError
from vtprune.tiny import load_tiny, sprites, tiny_folder, vocabulary
from vtprune.tiny.scenes import Question, SceneObject, paint, scene_objects, scene_questions

MODELS = ("llava", "qwen2_vl", "internvl")
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def dev_scenes() -> list[tuple[list[SceneObject], list[Question]]]:
    asked = scene_questions("dev", 80, seed=3, per_image=10)
    return [(scene_objects("dev", 3, index), questions) for index, (_, questions) in enumerate(asked)]


def _describe(item: SceneObject) -> tuple[str, str, float, float]:
    """(kind, colour, y, x) of one object, from its box alone."""
    middle = item.size / 2
    return vocabulary.KINDS[item.kind], vocabulary.COLORS[item.color], item.top + middle, item.left + middle


def _place(y: float, x: float) -> str:
    third = 128 / 3
    return f"{('top', 'middle', 'bottom')[int(y // third)]} {('left', 'center', 'right')[int(x // third)]}"


def _derive(question: str, objects: list[SceneObject]) -> set[str]:
    """Every answer a careful reader could give, found by parsing the question's English."""
    things = [_describe(item) for item in objects]
    things = [thing for thing in things if thing[0] not in ("ring", "bar", "diamond", "hash")]

    def named(name: str) -> list[tuple[str, str, float, float]]:
        color, kind = name.split()
        return [thing for thing in things if thing[0] == kind and color in ("digit", thing[1])]

    if match := re.fullmatch(r"what color is the (?:frame of the digit )?(\w+)\?", question):
        return {color for kind, color, _, _ in things if kind == match[1]}
    if match := re.fullmatch(r"which shape is (\w+)\?", question):
        return {kind for kind, color, _, _ in things if color == match[1] and not kind.isdigit()}
    if match := re.fullmatch(r"which digit is in the (\w+) frame\?", question):
        return {kind for kind, color, _, _ in things if color == match[1] and kind.isdigit()}
    if match := re.fullmatch(r"which object is at the (\w+ \w+)\?", question):
        return {f"{color} {kind}" for kind, color, y, x in things if _place(y, x) == match[1]}
    if match := re.fullmatch(r"where is the (\w+ \w+)\?", question):
        return {_place(y, x) for _, _, y, x in named(match[1])}
    if match := re.fullmatch(r"is there a (\w+ \w+) in the image\?", question):
        return {"yes" if named(match[1]) else "no"}
    if match := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return {str(sum(color == match[1] for _, color, _, _ in things))}
    if match := re.fullmatch(r"how many (\w+?)e?s are there\?", question):
        return {str(sum(kind.rstrip("e") == match[1] for kind, _, _, _ in things))}
    match = re.fullmatch(r"is the (\w+ \w+) (above|below|left of|right of) the (\w+ \w+)\?", question)
    if match is None:
        raise ValueError(f"no rule reads {question!r}")
    (first,), (second,) = named(match[1]), named(match[3])
    true = {
        "above": first[2] < second[2],
        "below": first[2] > second[2],
        "left of": first[3] < second[3],
        "right of": first[3] > second[3],
    }
    return {"yes" if true[match[2]] else "no"}


def test_same_arguments_give_the_same_bytes() -> None:
    first, second = (scene_questions("dev", 4, seed=5) for _ in range(2))
    for (image, questions), (again, same) in zip(first, second, strict=True):
        assert image.tobytes() == again.tobytes()
        assert questions == same
    assert image.size == (128, 128)
    assert image.mode == "RGB"


def test_a_scene_does_not_depend_on_how_many_are_asked_for() -> None:
    alone, among = scene_questions("test", 2, seed=1)[1], scene_questions("test", 6, seed=1)[1]
    assert alone[0].tobytes() == among[0].tobytes()
    assert alone[1] == among[1]


def test_seeds_and_splits_give_other_scenes() -> None:
    drawn = [(split, seed) for split in SPLITS for seed in (0, 1)]
    assert len({scene_questions(split, 1, seed)[0][0].tobytes() for split, seed in drawn}) == 6
    assert len({tuple(scene_objects(split, seed, 0)) for split, seed in drawn}) == 6


def test_splits_share_no_handwritten_digit() -> None:
    sets = [{int(i) for digit in range(10) for i in sprites.digit_ids(split, digit)} for split in SPLITS]
    assert [len(part) for part in sets] == [1200, 300, 297]
    assert len(set.union(*sets)) == 1797


def test_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"train, dev, test, got 'valid'"):
        scene_questions("valid", 1)


def test_objects_keep_apart(dev_scenes) -> None:
    for objects, _ in dev_scenes:
        for index, one in enumerate(objects):
            for two in objects[:index]:
                down = max(one.top - two.top - two.size, two.top - one.top - one.size)
                across = max(one.left - two.left - two.size, two.left - one.left - one.size)
                assert max(down, across) >= 1


def test_clutter_is_painted_in_colors_of_its_own() -> None:
    objects = scene_objects("dev", 0, 0)
    clutter = [item for item in objects if not item.askable]
    assert len(clutter) >= 8
    assert {vocabulary.COLORS[item.color] for item in clutter} <= {"purple", "orange", "pink", "lime"}
    bare = paint([item for item in objects if item.askable], "dev", 0, 0)
    assert (paint(objects, "dev", 0, 0) != bare).any()


def test_answers_are_right(dev_scenes) -> None:
    """Answers agree with a second derivation from the objects, for every question of every kind."""
    kinds = set()
    for objects, questions in dev_scenes:
        for item in questions:
            assert _derive(item.question, objects) == {item.answer}, item
            kinds.add(item.kind)
    assert kinds == {"color", "shape_color", "digit_frame", "obj_loc", "where", "exist", "count", "relation"}


def test_every_word_is_known(dev_scenes) -> None:
    easy_vqa = pytest.importorskip("vtprune.tiny.easy_vqa")
    pytest.importorskip("easy_vqa")
    texts = [f"{item.question} {item.answer}" for _, questions in dev_scenes for item in questions]
    for _, questions in easy_vqa.easy_vqa_questions("test", 60, per_image=99):
        texts += [f"{item.question} {item.answer}" for item in questions]
    assert all(vocabulary.UNK not in vocabulary.encode(text) for text in texts)


def test_easy_vqa_splits_are_disjoint_and_repeatable() -> None:
    pytest.importorskip("easy_vqa")
    from vtprune.tiny.easy_vqa import easy_vqa_questions, image_numbers

    train, dev = set(image_numbers("train")), set(image_numbers("dev"))
    assert len(dev) == 400
    assert not train & dev
    first, second = (easy_vqa_questions("dev", 3, seed=2, per_image=4) for _ in range(2))
    assert [questions for _, questions in first] == [questions for _, questions in second]
    assert first[0][1] != easy_vqa_questions("dev", 3, seed=0, per_image=4)[0][1]
    assert first[0][0].size == (64, 64)
    assert all(len(questions) == 4 for _, questions in first)


def test_shipped_files_stay_small() -> None:
    names = [name for name in (*MODELS, "qwen2_vl_plus") if (tiny_folder(name) / "config.json").is_file()]
    assert set(MODELS) <= set(names)
    folders = [tiny_folder(name) for name in names]
    sizes = {file: file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()}
    weights = {file: size for file, size in sizes.items() if "safetensors" in file.name}
    predictors = sum(size for file, size in weights.items() if "predictors" in file.parts)
    assert sum(weights.values()) - predictors < 15_000_000
    assert 0 < predictors < 400_000
    assert sum(sizes.values()) < 15 * 2**20
    for name, folder in zip(names, folders, strict=True):
        card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert f"--model {name} " in card or name == "llava"


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'lava'.*Did you mean 'llava'"):
        load_tiny("lava")


def test_a_missing_torchvision_is_named(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchvision" else find(name, *a))
    with pytest.raises(VtpruneError, match=r"'internvl' needs torchvision.*load_tiny\('llava'\)"):
        load_tiny("internvl")
    assert load_tiny("llava")


@pytest.fixture(scope="module", params=MODELS)
def tiny(request):
    return request.param, *load_tiny(request.param)


def _answer(tiny, image, question: str) -> list[int]:
    import torch

    _, model, processor = tiny
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        return model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()


def test_tokenizer_agrees_with_the_vocabulary(tiny) -> None:
    processor = tiny[2]
    text = "is the red star left of the digit 4? top left"
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == vocabulary.encode(text)
    assert processor.tokenizer.decode(vocabulary.encode("red star")) == "red star"


def test_prompt_holds_one_image(tiny) -> None:
    name, _, processor = tiny
    image = scene_questions("dev", 1)[0][0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many stars are there?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    ids = processor(images=image, text=text, return_tensors="np")["input_ids"][0]
    assert int(np.sum(np.asarray(ids) == vocabulary.IMAGE)) == (256 if name == "llava" else 81)
    assert list(ids[-2:]) == list(vocabulary.SUFFIX)
    assert vocabulary.UNK not in ids


def test_checkpoint_answers_dev_questions_and_stops(tiny) -> None:
    """24 scene questions, at least 20 right (target 92 %), each ended by <eos>."""
    scenes = scene_questions("dev", 4, seed=11, per_image=6)
    asked = [(image, item) for image, questions in scenes for item in questions]
    answers = [_answer(tiny, image, item.question) for image, item in asked]
    assert all(ids[-1] == vocabulary.EOS and len(ids) <= 3 for ids in answers)
    right = [ids[:-1] == vocabulary.encode(item.answer) for ids, (_, item) in zip(answers, asked, strict=True)]
    assert len(right) == 24
    assert sum(right) >= 20


def test_checkpoint_answers_its_examples(tiny) -> None:
    from vtprune.examples import examples
    from vtprune.images import open_image

    scenes = [each for each in examples().values() if "llava" in each.models]
    assert [each.name for each in scenes] == ["scene_0", "scene_1", "scene_2"]
    asked = [(open_image(scene.images[0]), *question) for scene in scenes for question in scene.questions]
    right = [_answer(tiny, image, text)[:-1] == vocabulary.encode(answer) for image, text, answer in asked]
    assert len(right) == 12
    assert sum(right) >= 11


def test_int8_storage_rounds_rows_and_keeps_vectors(tmp_path: Path) -> None:
    import torch

    from vtprune.tiny.storage import read_weights, write_weights

    draws = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randn(6, 40, generator=draws) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.0])[:, None],
        "filters": torch.randn(5, 3, 2, 4, 4, generator=draws),
        "table": torch.randn(1, 7, 16, generator=draws),
        "norm": torch.randn(9, generator=draws),
    }
    write_weights(weights, tmp_path / "weights")
    first = (tmp_path / "weights").read_bytes()
    read = read_weights(tmp_path / "weights")
    assert set(read) == set(weights)
    assert torch.equal(read["norm"], weights["norm"].half().float())
    for name in ("matrix", "filters"):
        rows, back = weights[name].flatten(1), read[name].flatten(1)
        # half a step of each row's own scale
        assert bool(((rows - back).abs() <= rows.abs().amax(1, keepdim=True) / 254 + 1e-9).all())
    assert bool(((weights["table"] - read["table"]).abs() <= weights["table"].abs().amax(2, keepdim=True) / 254).all())
    write_weights(weights, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == first
