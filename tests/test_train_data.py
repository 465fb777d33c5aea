"""Data of the trainers: splits that share no image, files with named faults, answers marked where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vtprune import load_tiny
from vtprune.errors import InputError, UnknownNameError, VtpruneError
from vtprune.train.data import Example, encode, read_data

PICTURE = Image.new("RGB", (128, 128), "red")
EXAMPLE = Example("one", (PICTURE,), "what color is the star?", "red")


def _images(examples: list[Example]) -> set[bytes]:
    return {image.tobytes() for example in examples for image in example.images if isinstance(image, Image.Image)}


@pytest.mark.parametrize("spec", ["embedded", "scenes", "easy-vqa"])
def test_generated_splits_share_no_image(spec: str) -> None:
    pytest.importorskip("easy_vqa")
    train, held_out = read_data(spec, "train", 41), read_data(spec, "held-out", 41)
    assert len(train) == len(held_out) == 41
    assert not _images(train) & _images(held_out)
    assert len({example.key for example in train + held_out}) == 82
    easy = sum(example.kind == "easy" for example in train)
    assert easy == {"embedded": 20, "scenes": 0, "easy-vqa": 41}[spec]


@pytest.mark.parametrize("spec", ["embedded", "scenes", "easy-vqa"])
def test_generated_data_are_repeatable_and_a_limit_is_a_prefix(spec: str) -> None:
    pytest.importorskip("easy_vqa")
    few, many, other = (read_data(spec, "train", n, seed) for n, seed in ((20, 3), (50, 3), (20, 4)))
    assert few == many[:20]
    assert _images(few) != _images(other)


def test_a_sparse_scene_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.tiny import scenes

    real = scenes.scene_questions
    monkeypatch.setattr(
        scenes, "scene_questions", lambda *a: [(image, asked[: 3 + i % 2]) for i, (image, asked) in enumerate(real(*a))]
    )
    assert len(read_data("scenes", "train", 24)) == 24


def test_default_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.tiny import scenes

    asked: list[int] = []
    question = scenes.Question("a", "b?", "c", "d")
    monkeypatch.setattr(
        scenes,
        "scene_questions",
        lambda split, images, *a: asked.append(images) or [(PICTURE, [question] * 8)] * images,
    )
    # one question, thousands of times: it counts once
    assert len(read_data("scenes", "train")) == len(read_data("scenes", "held-out")) == 1
    assert asked == [1000, 125]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vtprune.tiny.easy_vqa", None)
    with pytest.raises(VtpruneError, match=r"'easy-vqa' needs a package.*pip install 'vtprune\[train\]'"):
        read_data("easy-vqa", "train", 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("embeded", "train"), UnknownNameError, "Did you mean 'embedded'"),
        (("embedded", "test"), UnknownNameError, "Available: held-out, train"),
        (("embedded", "train", 0), InputError, "limit must be at least 1 question, got 0"),
        (("embedded", "train", 4, -1), InputError, "seed must be >= 0, got -1"),
        (("none.jsonl", "train"), InputError, "there is no data file 'none.jsonl'"),
        (("some/where", "train"), InputError, "there is no data file"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], error: type[VtpruneError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_data(*arguments)


def test_generated_data_take_no_held_out_file() -> None:
    with pytest.raises(InputError, match="'scenes' has held-out questions already"):
        read_data("scenes", "train", 4, held_out="other.jsonl")


def _write(path: Path, entries: list[dict[str, Any]]) -> Path:
    for entry in entries:
        for name in [entry["image"]] if isinstance(entry["image"], str) else entry["image"]:
            PICTURE.save(path.parent / name)
    path.write_text("\n\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 images with two questions each."""
    entries = [
        {"image": f"{number % 20}.png", "question": f"question {number}?", "answer": str(number), "kind": "number"}
        for number in range(40)
    ]
    return _write(tmp_path / "data.jsonl", entries)


def test_a_file_is_split_by_image(data: Path) -> None:
    train, held_out = read_data(str(data), "train"), read_data(str(data), "held-out")
    assert (len(train), len(held_out)) == (36, 4)
    assert not {example.images for example in train} & {example.images for example in held_out}
    assert {int(example.answer) for example in train + held_out} == set(range(40))
    one = min(train, key=lambda example: int(example.answer))
    assert (one.images, one.question) == ((data.parent / f"{one.answer}.png",), f"question {one.answer}?")
    assert one.kind == "number"
    assert len({example.key for example in train + held_out}) == 40
    # the order is drawn, not the file's, and a limit is a prefix
    assert train != sorted(train, key=lambda example: int(example.answer))
    assert read_data(str(data), "train", 5) == train[:5]
    assert read_data(str(data), "held-out", seed=1) != held_out


def test_lines_that_share_an_image_stay_together(tmp_path: Path) -> None:
    chained = [{"image": [f"{n}.png", f"{n + 1}.png"], "question": "same?", "answer": "yes"} for n in range(8)]
    alone = [{"image": "other.png", "question": f"{n}?", "answer": "no"} for n in range(3)]
    path = _write(tmp_path / "data.jsonl", chained + alone)
    for seed in range(4):
        sizes = {len(read_data(str(path), split, seed=seed)) for split in ("train", "held-out")}
        assert sizes == {8, 3}
    two = next(example for example in read_data(str(path), "train", seed=seed) if example.answer in ("yes", "no"))
    assert len(two.images) == (2 if two.answer == "yes" else 1)


def test_a_second_file_is_held_out(data: Path) -> None:
    other = _write(data.parent / "other.jsonl", [{"image": "new.png", "question": "what?", "answer": "this"}])
    assert len(read_data(str(data), "train", held_out=other)) == 40
    (only,) = read_data(str(data), "held-out", held_out=other)
    assert (only.answer, only.kind) == ("this", None)
    again = _write(data.parent / "again.jsonl", [{"image": "3.png", "question": "what?", "answer": "this"}])
    with pytest.raises(InputError, match=r"line 1 of .*again.jsonl' asks about .*3.png', and so does line 47 of"):
        read_data(str(data), "train", held_out=again)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 of .*bad.jsonl' is not JSON"),
        ('{"image": "0.png", "question": "why?"}', 'line 3 of .*must be .*"answer": text}'),
        ('{"image": "0.png", "question": "why?", "answer": " "}', "line 3 of .*must be"),
        ('{"image": "0.png", "question": "why?", "answer": 3}', "line 3 of .*must be"),
        ('{"image": [], "question": "why?", "answer": "so"}', "line 3 of .*must be"),
        ('{"image": ["0.png", 1], "question": "why?", "answer": "so"}', "line 3 of .*must be"),
        ('{"image": "0.png", "question": "why?", "answer": "so", "kind": 1}', "line 3 of .*must be"),
        ('{"image": "none.png", "question": "why?", "answer": "so"}', r"line 3 of .*there is no image file .*none.png"),
    ],
)
def test_malformed_lines_are_named(data: Path, line: str, message: str) -> None:
    good = data.read_text(encoding="utf-8").splitlines()[0]
    bad = data.parent / "bad.jsonl"
    bad.write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        [read_data(str(bad), split) for split in ("train", "held-out")]


def test_nothing_can_be_held_out_of_one_image(data: Path) -> None:
    few = data.parent / "few.jsonl"
    few.write_text(data.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(InputError, match=r"asks about 1 image\(s\), so none can be held out"):
        read_data(str(few), "train")
    few.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="holds no held-out question"):
        read_data(str(data), "held-out", held_out=few)


def test_lmms_eval_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmms_eval")
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr("vtprune.eval.task_data.IMAGES", 20)
    spec = "lmms:vtp_scenes,vtp_easy_vqa"
    train, held_out = read_data(spec, "train", 9, 2), read_data(spec, "held-out", 8, 2)
    assert [example.key.partition("-")[0] for example in train] == ["vtp_scenes", "vtp_easy_vqa"] * 4 + ["vtp_scenes"]
    assert not _images(train) & _images(held_out)
    assert len({example.key for example in train + held_out}) == 17
    assert {example.kind for example in train if "easy" in example.key} <= {"yes/no", "shape", "color"}
    assert read_data(spec, "train", 4, 2) == train[:4]


class _Task(SimpleNamespace):
    """A task with three documents to train on and one to be evaluated on."""

    target: Any = ("cat", "dog")
    eval_docs = ({"image": PICTURE},)

    def has_training_docs(self) -> bool:
        return True

    def training_docs(self) -> list[dict[str, Any]]:
        return [{"image": PICTURE, "place": place} for place in range(3)]

    def doc_to_visual(self, doc: dict[str, Any]) -> list[Any]:
        return [doc["image"] if self.target != "film" else "film.mp4"]

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return f"<image>\nwhat is at {doc['place']}?"

    def doc_to_target(self, doc: dict[str, Any]) -> Any:
        return self.target


def test_tasks_give_their_training_documents_and_the_first_answer() -> None:
    pytest.importorskip("lmms_eval")
    from vtprune.eval.harness import Harness

    harness = object.__new__(Harness)
    task = _Task()
    harness._tasks = {"mine": task}
    assert harness.image_ids("mine") == ["0", "1", "2"]
    (asked,) = harness.questions_of("mine", [2])
    assert (asked.doc_id, asked.question, asked.answer, asked.kind) == (2, "what is at 2?", "cat", None)
    for target, message in ((None, "no answer to its question 1"), ("", "no answer"), ("film", "video or audio")):
        task.target = target
        with pytest.raises(InputError, match=message):
            list(harness.questions_of("mine", [1]))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_the_model_predicts_the_marked_answers(name: str) -> None:
    """Teacher forced, at the marked places, words and ends of answers; the models are right about 95 times of 100."""
    pytest.importorskip("easy_vqa")
    model, processor = load_tiny(name)
    examples = read_data("embedded", "held-out", 24)
    right: list[bool] = []
    for batch in (examples[:9], examples[9:]):
        encoded = encode(processor, batch, "cpu", answers=True)
        ids, answer = encoded.inputs["input_ids"], encoded.answer
        assert answer is not None
        for row, marked, example in zip(ids, answer, batch, strict=True):
            assert processor.tokenizer.decode(row[marked]) == f"{example.answer} <eos>"
        with torch.no_grad():
            predicted = model(**encoded.inputs).logits[:, :-1].argmax(-1)
        right += (predicted == ids[:, 1:])[answer[:, 1:]].tolist()
    assert len(right) > 2 * len(examples)
    assert sum(right) >= 0.9 * len(right)


def test_prompts_alone_are_those_of_the_evaluation() -> None:
    pytest.importorskip("lmms_eval")
    from vtprune.eval.harness import Harness
    from vtprune.eval.lmms_model import VtpruneChat

    loaded = load_tiny("llava")
    lm, harness = VtpruneChat(loaded=loaded), Harness(["vtp_scenes"], 3)
    asked = list(harness.questions_of("vtp_scenes", range(3)))
    examples = [Example(str(one.doc_id), one.images, one.question, one.answer) for one in asked]
    mine = encode(loaded[1], examples, "cpu", answers=False)
    theirs = lm.encode(harness.prompts(lm, "vtp_scenes", 3))
    assert mine.answer is None
    assert mine.inputs.keys() == dict(theirs).keys()
    assert all(torch.equal(mine.inputs[key], value) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("turn", "behind"),
    [
        # no token ends the turn; the token that ends it is not the tokenizer's; text follows; a template that trims
        (" assistant : {{ text }} ", " red<eos>"),
        (" assistant : {{ text }}<unk> \n", " red<unk>"),
        (" assistant : {{ text }} <eos> user :", " red <eos>"),
        (" assistant :{{ text }}", "red<eos>"),
        # past turns are written in another way than the one that is asked for
        (" digit {{ text }}<unk>", " red<eos>"),
    ],
)
def test_turns_end_as_their_template_ends_them(turn: str, behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = load_tiny("llava")
    turns = turn.replace("text", "m['content'][0]['text']")
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<image> {{ m['content'][1]['text'] }}"
        f"{{% else %}}{turns}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}} assistant :{{% endif %}}"
    )
    processor.chat_template = template  # type: ignore[attr-defined]
    seen: list[str] = []
    real = processor.tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "vtprune.train.encoding.processor_inputs",
        lambda _, texts, *a, **k: (
            seen.extend(texts) or {"input_ids": torch.tensor([real(t)["input_ids"] for t in texts])}
        ),
    )
    encoded = encode(processor, [EXAMPLE], "cpu", answers=True)
    assert seen == [f"<image> what color is the star? assistant :{behind}"]
    assert encoded.answer is not None
    assert encoded.answer.sum() == 2
    assert encoded.answer[0, -2:].all()


def test_a_processor_without_a_template() -> None:
    _, processor = load_tiny("llava")
    processor.chat_template = None  # type: ignore[attr-defined]
    encoded = encode(processor, [EXAMPLE], "cpu", answers=True)
    ids = encoded.inputs["input_ids"][0]
    assert processor.tokenizer.decode(ids[-8:]) == "what color is the star ? red <eos>"  # type: ignore[attr-defined]
    assert encoded.answer is not None
    assert encoded.answer[0].tolist() == [False] * (len(ids) - 2) + [True, True]


def test_images_may_be_files_and_pixels_get_a_dtype(tmp_path: Path) -> None:
    _, processor = load_tiny("llava")
    PICTURE.save(tmp_path / "one.png")
    file = Example("file", (tmp_path / "one.png",), EXAMPLE.question, EXAMPLE.answer)
    kept = encode(processor, [EXAMPLE, file], "cpu", answers=True, dtype=torch.bfloat16)
    assert kept.inputs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(kept.inputs["pixel_values"][0], kept.inputs["pixel_values"][1])
    assert kept.inputs["input_ids"].dtype == torch.int64


def test_what_cannot_be_encoded() -> None:
    _, processor = load_tiny("llava")
    with pytest.raises(InputError, match="no example to encode"):
        encode(processor, [], "cpu", answers=True)
    empty = Example("none", (PICTURE,), "why?", " ")
    with pytest.raises(InputError, match="'none' has an empty answer"):
        encode(processor, [empty], "cpu", answers=True)
    assert encode(processor, [empty], "cpu", answers=False).answer is None
    processor.tokenizer.eos_token = None  # type: ignore[attr-defined]
    processor.chat_template = None  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no token that ends an answer"):
        encode(processor, [EXAMPLE], "cpu", answers=True)
