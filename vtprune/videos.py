"""Video files as a few frames, evenly spaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Video", "open_video"]


@dataclass(frozen=True)
class Video:
    """Frames of a film.

    Attributes:
        frames: RGB images of one size, in order.
        fps: how many of them show one second.
    """

    frames: tuple[Image, ...]
    fps: float


def open_video(path: Path, count: Callable[[int, float], int] | None = None) -> Video:
    """Read frames of a video file with PyAV, which brings its own decoders.

    Args:
        path: of the file.
        count: (frames in the file, frames a second) -> how many to read; 8, or all of a shorter film, if None.

    Raises:
        InputError: if there is no such file, or nothing in it can be shown.
        VtpruneError: if PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise VtpruneError(f"reading a video needs PyAV ({error}). Run: pip install 'vtprune[qwen]'") from error
    if not path.is_file():
        raise InputError(f"there is no video file {str(path)!r}.")
    try:
        with av.open(str(path)) as container:
            total, fps = _measure(container)
        if not total or not fps:
            raise InputError(f"{str(path)!r} holds no moving picture. Pass an MP4, or a picture as --image.")
        wanted = min(8, total) if count is None else count(total, fps)
        if not 1 <= wanted <= total:
            raise InputError(f"{str(path)!r} has {total} frame(s), of which {wanted} were asked.")
        with av.open(str(path)) as container:
            frames = _read(container, _spread(total, wanted))
    except FFmpegError as error:
        raise InputError(f"{str(path)!r} is not a video that PyAV can read: {error}. Pass an MP4.") from error
    return Video(tuple(frames), fps * len(frames) / total)


def _spread(total: int, wanted: int) -> set[int]:
    """`wanted` of `total` frames, the first and the last among them."""
    return {round(i * (total - 1) / max(1, wanted - 1)) for i in range(wanted)}


def _measure(container: Any) -> tuple[int, float]:
    """Frames and frames a second; headers may hold neither, so packets are counted, which decodes nothing."""
    if not container.streams.video:
        return 0, 0.0
    stream = container.streams.video[0]
    total = sum(packet.size > 0 for packet in container.demux(stream))
    return total, float(stream.average_rate or stream.guessed_rate or 0)


def _read(container: Any, wanted: set[int]) -> list[Image]:
    frames: list[Image] = []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            frames.append(frame.to_image())
        if len(frames) == len(wanted):
            break
    return frames
