"""Image files, and the example that ships with vtprune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["load_example", "open_image"]


def open_image(path: Path) -> Image:
    """Read an image file as RGB.

    Raises:
        InputError: if there is no such file or it is not an image.
    """
    from PIL import Image

    if not path.is_file():
        raise InputError(f"there is no image file {str(path)!r}.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} is not an image that Pillow can read: {error}. Pass a PNG or JPEG.") from error


def load_example(index: int = 0) -> tuple[Image, str]:
    """A scene that ships with vtprune, and a question about it that all embedded models were made for.

    Args:
        index: which question of which scene; counts around. `vtprune.examples` has them by name, and films.

    Raises:
        InputError: if this installation holds no examples.
    """
    from vtprune.examples import examples

    scenes = [each for each in examples().values() if len(each.images) == 1 and "llava" in each.models]
    asked = [(scene.images[0], question) for scene in scenes for question, _ in scene.questions]
    path, question = asked[index % len(asked)]
    return open_image(path), question
