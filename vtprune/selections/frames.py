"""VidCom2's set: a quota for each frame of a video, by how much it differs from the whole video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.cells import split_in_proportion
from vtprune.errors import PlanError
from vtprune.frames import FrameMap, ranks_within
from vtprune.rules import SELECTIONS, Selection, require_scores
from vtprune.similarity import STEP, blocks_of_rows, unit_states
from vtprune.views import TokenView

__all__ = ["SCALES", "Frames", "check_frame_knobs", "likeness", "steady_features"]

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)


@SELECTIONS.register("frames")
@dataclass(frozen=True)
class Frames(Selection):
    """Deals the survivors to the frames of each video, more to unusual ones, and keeps the best by score in each.

    Paper: VidCom2, arXiv 2505.14454, whose frame budget is meant for any score. With s the likeness of a token to the
    middle of its video (see `vtprune.scorers.vidcom2`), a video of T frames that keeps a share R of its tokens keeps

        R (1 + p_t - 1/T),  p = softmax over its frames of -(mean of s in frame t) / temperature

    of frame t, never more than it has and at least one token. Here the shares are made whole by largest remainder, what
    the minimum takes too much is taken from the fullest frame, and with fewer tokens than frames the most unusual get
    one each; so the count is exact.
    Videos and images of a prompt share the budget in proportion to their tokens (largest remainder); a still image is a
    video of one frame.
    Cost: O(V D).

    Attributes:
        temperature: > 0. The authors' 0.01.
        scales: widths of the Gaussians of the likeness, squared; all > 0.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "frames"
    summary: ClassVar[str] = "the best of each frame, more of unusual frames (VidCom2, arXiv 2505.14454)"

    temperature: float = 0.01
    scales: tuple[float, ...] = SCALES

    def __post_init__(self) -> None:
        check_frame_knobs(self.name, self.temperature, self.scales)

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return True

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        score, valid = require_scores(scores, self.name), view.valid
        if not valid.numel():
            return valid.clone()
        frames = FrameMap.of(view)
        alike = likeness(steady_features(view, frames), frames.film, frames.width, valid, self.scales)
        sizes = torch.zeros(len(valid), frames.width, dtype=torch.float64, device=valid.device)
        mean = sizes.scatter_add(1, frames.frame, alike.masked_fill(~valid, 0.0))
        sizes = sizes.scatter_add(1, frames.frame, valid.double())
        facts = zip(view.keep.tolist(), frames.films, sizes.tolist(), (mean / sizes.clamp(min=1)).tolist(), strict=True)
        quotas = torch.tensor([self._quotas(*each, frames.width) for each in facts], device=valid.device)
        rank = ranks_within(score, frames.frame, frames.width, valid)
        return (rank < quotas.gather(1, frames.frame)) & valid

    def _quotas(
        self, keep: int, films: Sequence[int], sizes: Sequence[float], mean: Sequence[float], width: int
    ) -> list[int]:
        """Survivors of each frame of a sample, 0 up to `width`."""
        members: dict[int, list[int]] = {}
        for frame, film in enumerate(films):
            if sizes[frame]:
                members.setdefault(film, []).append(frame)
        tokens = [int(sum(sizes[frame] for frame in mine)) for mine in members.values()]
        quotas = [0] * width
        for mine, share in zip(members.values(), split_in_proportion(min(keep, sum(tokens)), tokens), strict=True):
            room = [int(sizes[frame]) for frame in mine]
            dealt = frame_quotas(share, room, [mean[frame] for frame in mine], self.temperature)
            for frame, quota in zip(mine, dealt, strict=True):
                quotas[frame] = quota
        return quotas


def frame_quotas(n: int, sizes: Sequence[int], alike: Sequence[float], temperature: float) -> list[int]:
    """Deal `n` <= sum(sizes) survivors to the frames of a video.

    Args:
        n: survivors.
        sizes: tokens of each frame, > 0.
        alike: mean likeness of each frame to the video.
        temperature: of the softmax.
    """
    least = min(alike)
    odds = [math.exp((least - each) / temperature) for each in alike]
    whole = math.fsum(odds)
    unusual = [1.0 + each / whole - 1.0 / len(odds) for each in odds]
    if n < len(sizes):
        heaviest = sorted(range(len(sizes)), key=lambda frame: (-unusual[frame], frame))[:n]
        return [int(frame in heaviest) for frame in range(len(sizes))]
    wish = _capped(n, [u * size for u, size in zip(unusual, sizes, strict=True)], sizes)
    # a share that is whole but for rounding is whole
    quotas = [math.floor(each + 1e-9) for each in wish]
    rest = sorted(range(len(wish)), key=lambda frame: (-round(wish[frame] - quotas[frame], 9), frame))
    for frame in rest[: n - sum(quotas)]:
        quotas[frame] += 1
    for frame in [frame for frame, quota in enumerate(quotas) if not quota]:
        quotas[quotas.index(max(quotas))] -= 1
        quotas[frame] = 1
    return quotas


def _capped(n: int, weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Shares of `n` in proportion to `weights` > 0, none above its size: what is too much goes to the others alike."""
    shares, open_ = [0.0] * len(sizes), list(range(len(sizes)))
    left = float(n)
    while open_:
        unit = left / math.fsum(weights[frame] for frame in open_)
        full = [frame for frame in open_ if weights[frame] * unit >= sizes[frame]]
        for frame in full or open_:
            shares[frame] = float(sizes[frame]) if full else weights[frame] * unit
        if not full:
            break
        left -= sum(sizes[frame] for frame in full)
        open_ = [frame for frame in open_ if frame not in full]
    return shares


def check_frame_knobs(name: str, temperature: float, scales: tuple[float, ...]) -> None:
    """Refuse what is no temperature and no widths.

    Raises:
        PlanError: naming the knob and its value.
    """

    def positive(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < math.inf

    if not positive(temperature):
        raise PlanError(f"{name} temperature must be a number > 0, got {temperature!r}. The authors use 0.01.")
    if not isinstance(scales, tuple) or not scales or not all(map(positive, scales)):
        raise PlanError(f"{name} scales must be a tuple of numbers > 0, got {scales!r}. Leave it out for {SCALES}.")


def steady_features(view: TokenView, frames: FrameMap) -> Tensor:
    """[B, V, D] unit vectors of the half of the channels that vary least over the tokens of each video.

    The other channels are 0, and so are padding and zero vectors. D odd: the smaller half, at least one channel. Among
    channels of equal variance the first stay.
    """
    states = view.hidden.detach().float().masked_fill(~view.valid[..., None], 0.0)
    centre = _means(states, frames.film, frames.width, view.valid)
    spread = _means(states, frames.film, frames.width, view.valid, centre)
    order = spread.argsort(dim=2, stable=True)
    steady = torch.zeros_like(spread, dtype=torch.bool)
    steady.scatter_(2, order[..., : max(1, states.shape[2] // 2)], True)
    mine = steady.gather(1, frames.film[..., None].expand_as(states))
    return unit_states(states.masked_fill(~mine, 0.0), view.valid)


def likeness(features: Tensor, part: Tensor, parts: int, valid: Tensor, scales: Sequence[float]) -> Tensor:
    """[B, V] how near each token is to the mean of its part: sum over scales a of exp(-|x - mean|^2 / 2 a), fp64.

    In steps of 2**-20, so that equal tokens tie.

    Args:
        features: [B, V, D].
        part: [B, V] number of the part, below `parts`.
        parts: how many there are.
        valid: [B, V].
        scales: widths, squared.
    """
    centre = _means(features, part, parts, valid).float()
    batch, length, width = features.shape
    distance = [
        (features[:, rows] - centre.gather(1, part[:, rows, None].expand(-1, -1, width))).square().sum(2)
        for rows in blocks_of_rows(batch, length, width, features.device)
    ]
    apart = ((torch.cat(distance, 1).double() / STEP).round() * STEP)[..., None]
    wide = torch.tensor(scales, dtype=torch.float64, device=apart.device)
    return ((torch.exp(-apart / (2.0 * wide)).sum(2) / STEP).round() * STEP).masked_fill(~valid, 0.0)


def _means(states: Tensor, part: Tensor, parts: int, valid: Tensor, around: Tensor | None = None) -> Tensor:
    """[B, parts, D] mean over the tokens of each part, or that of the squared distance from `around`, fp64."""
    batch, length, width = states.shape
    total = torch.zeros(batch * parts, width, dtype=torch.float64, device=states.device)
    number = part + parts * torch.arange(batch, device=part.device)[:, None]
    for rows in blocks_of_rows(batch, length, width, states.device):
        block = states[:, rows].double()
        if around is not None:
            block = (block - around.gather(1, part[:, rows, None].expand_as(block))).square()
        block = block.masked_fill(~valid[:, rows, None], 0.0)
        total.index_add_(0, number[:, rows].flatten(), block.flatten(0, 1))
    count = torch.zeros(batch * parts, dtype=torch.float64, device=states.device)
    count.index_add_(0, number.flatten(), valid.double().flatten())
    return (total / count.clamp(min=1.0)[:, None]).view(batch, parts, width)
