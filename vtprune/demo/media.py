"""Files that people give the demo -> pictures and films, or a message that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtprune.prompt import Question
    from vtprune.videos import Video

__all__ = ["FILM_TYPES", "MAX_FILES", "MAX_FILM_BYTES", "PICTURE_TYPES", "read_question"]

MAX_FILES = 8
MAX_PICTURE_BYTES = 20 * 2**20
MAX_FILM_BYTES = 64 * 2**20
_MAX_PICTURE_PIXELS = 40_000_000
_MAX_FRAME_PIXELS = 4096 * 2304
_MAX_FRAMES = 3600
PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FILM_TYPES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
# decoders that Pillow may use; others run programs or are rarely looked after
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read_question(model: Any, reads_videos: bool, text: str, paths: Sequence[Path]) -> Question:
    """A question about files, once each of them was looked at.

    Args:
        model: that will be asked.
        reads_videos: whether its processor takes films.
        text: the question.
        paths: pictures and films in order.

    Raises:
        InputError: if the question is empty, or a file is not a picture or film, is damaged, animated, too large or one
            too many; the message names the file and what is legal.
    """
    from vtprune.prompt import Question

    if not text.strip():
        raise InputError("There is no question. Type one, or click one of the suggestions.")
    if not paths:
        raise InputError("There is no picture. Upload one, or click one of the examples.")
    if len(paths) > MAX_FILES:
        raise InputError(f"{len(paths)} files are too many: ask about at most {MAX_FILES} at once.")
    films = [path for path in paths if path.suffix.lower() in FILM_TYPES]
    if films and not reads_videos:
        raise InputError(
            f"{films[0].name!r} is a film, and {type(model).__name__} reads pictures only. Choose a model that reads "
            "video, such as tiny:qwen2_vl_plus, or upload a picture."
        )
    images = tuple(_picture(path) for path in paths if path not in films)
    return Question(text.strip(), images, tuple(_film(model, path) for path in films))


def _check_bytes(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise InputError(
            f"{path.name!r} has {size / 2**20:.1f} MiB; at most {limit / 2**20:.0f} MiB are read. Save it smaller."
        )


def _picture(path: Path) -> Image:
    """RGB, upright as its camera meant it."""
    from PIL import Image, ImageOps

    _check_bytes(path, MAX_PICTURE_BYTES)
    legal = "Upload a PNG, JPEG, WebP or BMP" + (", or an MP4 as a film." if path.suffix.lower() != ".svg" else ".")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            wide, high = image.size
            if wide * high > _MAX_PICTURE_PIXELS:
                raise _too_many_pixels(path)
            # a phone's JPEG may hold a second, smaller picture, which is no animation
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise InputError(
                    f"{path.name!r} is animated ({frames} frames). Upload a still picture; as a film, an MP4."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(path) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path.name!r} is not a picture that can be read. {legal}") from error
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path.name!r} is damaged or cut off ({error}). Upload the whole file again.") from error


def _too_many_pixels(path: Path) -> InputError:
    return InputError(
        f"{path.name!r} has more than {_MAX_PICTURE_PIXELS // 10**6} million pixels. Make it smaller: models see a "
        "small copy of it anyway."
    )


def _film(model: Any, path: Path) -> Video:
    from vtprune.prompt import read_video

    _check_bytes(path, MAX_FILM_BYTES)
    _check_frames(path)
    try:
        return read_video(model, path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), path.name)) from error


def _check_frames(path: Path) -> None:
    """Headers and packets are read, no frame is decoded."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise VtpruneError(f"reading a film needs PyAV ({error}). Run: pip install 'vtprune[demo]'") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path.name!r} holds no moving picture. Upload an MP4.")
            stream = container.streams.video[0]
            wide, high = stream.width, stream.height
            frames = sum(packet.size > 0 for packet in container.demux(stream))
    except FFmpegError as error:
        raise InputError(f"{path.name!r} is not a film that can be read, or is cut off. Upload an MP4.") from error
    if wide * high > _MAX_FRAME_PIXELS or frames > _MAX_FRAMES:
        raise InputError(
            f"{path.name!r} has {frames} frames of {wide} x {high}; at most {_MAX_FRAMES} frames of "
            f"{_MAX_FRAME_PIXELS / 1e6:.1f} million pixels are read. Cut or shrink it."
        )
