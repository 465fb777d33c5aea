"""Image files, and the example that ships with vtprune."""

from __future__ import annotations

import json
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
    """An image that ships with vtprune, and a question about it that the embedded model was made for.

    Args:
        index: which example; counts around.

    Raises:
        InputError: if this installation holds no examples.
    """
    folder = Path(__file__).parent / "tiny" / "examples"
    listing = folder / "examples.json"
    if not listing.is_file():
        raise InputError("this installation holds no example images. Pass --image and --question.")
    entries = json.loads(listing.read_text(encoding="utf-8"))
    entry = entries[index % len(entries)]
    return open_image(folder / entry["image"]), entry["question"]
