"""VidCom2: what is unusual in its frame and in the whole video, and more of it from unusual frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.frames import FrameMap
from vtprune.plan import Site
from vtprune.selections.frames import SCALES, Frames, check_frame_knobs, likeness, steady_features

__all__ = ["VidCom2"]


@METHODS.register("vidcom2")
@dataclass(frozen=True)
class VidCom2(Scorer):
    """Keeps the tokens least like the middle of their frame and of their video, before the decoder.

    Paper: Video Compression Commander, arXiv 2505.14454. Of the projected tokens of a video the half of the channels
    that varies least over its tokens is taken and scaled to length 1. A token's likeness to a set is the sum over
    scales a of exp(-|x - mean of the set|^2 / 2 a); its score is minus its likeness to its video minus that to its
    frame. How many tokens each frame keeps follows from the likeness to the video: see `vtprune.selections.frames`.
    The channels and the Gaussians are those of the authors' implementation as serving engines describe it; accounts of
    the paper have a cosine to the mean there. The scales stand in none of our sources: powers of two about the squared
    distances of unit vectors.
    Channels, middles and quotas are of one video each; several videos of a prompt share the budget in proportion to
    their tokens. A still image is a video of one frame, so images work too, as they come: all crops of an image are one
    frame, and frames that a processor hands over as images (InternVL, Idefics3) are videos of their own. "Frame" is
    what the model has a grid of tokens for: a pair of frames in Qwen2-VL and its kin.
    Positions: survivors keep theirs. Equal scores: the earlier token stays.
    Cost: O(V D), in fp64 where it sums.

    Attributes:
        temperature: of the softmax over frames, > 0. The authors' 0.01.
        scales: widths of the Gaussians, squared; all > 0.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "vidcom2"
    summary: ClassVar[str] = "tokens unlike their frame and video, more of unusual frames (VidCom2, arXiv 2505.14454)"
    site: ClassVar[Site | None] = Site("input")
    reads_frames: ClassVar[bool] = True

    temperature: float = 0.01
    scales: tuple[float, ...] = SCALES

    def __post_init__(self) -> None:
        check_frame_knobs(self.name, self.temperature, self.scales)

    @property
    def selection(self) -> Frames:
        """The quotas of frames."""
        return Frames(self.temperature, self.scales)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] minus the likeness to the video and to the frame."""
        frames = FrameMap.of(view)
        features = steady_features(view, frames)
        film, frame = (
            likeness(features, part, frames.width, view.valid, self.scales) for part in (frames.film, frames.frame)
        )
        return -(film + frame)
