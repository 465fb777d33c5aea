"""Makes the examples that ship: `python -m vtprune.tiny.shipped DIR` writes the pictures, the film and their listing.

All are of the dev split, so that no figure that is measured on the test split has seen them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.tiny.exercises import exercise_questions
from vtprune.tiny.scenes import Question, scene_questions

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["write_examples", "write_film"]

_SCENE_SEED, _EXERCISE_SEED = 7, 3
_EVERY_MODEL = ("llava", "qwen2_vl", "internvl", "qwen2_vl_plus")
_PLUS = ("qwen2_vl_plus",)
# task -> (title, number of the exercise)
_EXERCISES = {
    "words": ("Words", 1),
    "gaps": ("Rings", 2),
    "pairs": ("Two pictures", 0),
    "films": ("Film", 3),
}
_FRAMES_A_SECOND = 2


def write_examples(folder: Path, scenes: int = 3, questions: int = 4) -> None:
    """Scenes and one exercise of each kind, with examples.json, which lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (image, asked) in enumerate(scene_questions("dev", scenes, _SCENE_SEED, questions)):
        name = f"scene_{number}"
        image.save(folder / f"{name}.png")
        entries.append(_entry(name, f"Scene {number + 1}", [f"{name}.png"], asked, _EVERY_MODEL))
    for task, (title, number) in _EXERCISES.items():
        # "ink" is what the plus model never learned (its card)
        made = exercise_questions(task, "dev", number + 1, _EXERCISE_SEED, questions, without=("ink",))
        frames, asked = made[number]
        files = _write(folder, task, frames)
        entries.append(_entry(task, title, files, asked, _PLUS))
    (folder / "examples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _entry(
    name: str, title: str, files: Sequence[str], asked: Sequence[Question], models: Sequence[str]
) -> dict[str, Any]:
    questions = [{"question": q.question, "answer": q.answer, "kind": q.kind} for q in asked]
    return {"name": name, "title": title, "files": list(files), "questions": questions, "models": list(models)}


def _write(folder: Path, task: str, frames: Sequence[Image]) -> list[str]:
    if task == "films":
        write_film(folder / "films.mp4", frames)
        return ["films.mp4"]
    names = [f"{task}.png"] if len(frames) == 1 else [f"{task}_{number}.png" for number in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        frame.save(folder / name)
    return names


def write_film(path: Path, frames: Sequence[Image], fps: int = _FRAMES_A_SECOND) -> None:
    """An MP4 that browsers play and that decodes to nearly the same pixels."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "8", "preset": "veryslow"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
