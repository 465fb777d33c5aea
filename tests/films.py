"""Films of samples that are views, and the rules of EVS and VidCom2 as plain loops over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from scorer_views import Sample
from torch import Tensor

from vtprune.cells import split_in_proportion


class Spot(NamedTuple):
    """Where a token lies: in which film, in which frame of it, at which place of the frame."""

    film: int
    frame: int
    place: object


def film(frames: int, rows: int, cols: int, seed: int = 0) -> Sample:
    """A sample of one film."""
    return Sample(((rows, cols),) * frames, seed=seed, images=(0,) * frames, frames=tuple(range(0, 2 * frames, 2)))


def still(rows: int, cols: int) -> Sample:
    """A sample of one image."""
    return Sample(((rows, cols),), images=(0,), frames=(None,))


def together(*samples: Sample, seed: int = 0) -> Sample:
    """One sample that holds the films and images of several."""
    whole = Sample((), seed=seed or samples[0].seed)
    for number, each in enumerate(samples):
        whole = replace(
            whole,
            grids=whole.grids + each.grids,
            images=whole.images + (number,) * len(each.grids),
            frames=whole.frames + each.frames,
        )
    return whole


def as_spots(sample: Sample) -> list[Spot]:
    """Where the tokens of a sample lie. A grid without a frame in a film goes with the frame before."""
    spots, last = [], {}
    for number, ((rows, cols), image, shown) in enumerate(zip(sample.grids, sample.images, sample.frames, strict=True)):
        moment = last.get(image, 0) if shown is None else shown
        last[image] = moment
        kind = ("cls" if rows * cols == 1 else "patches") if shown is not None else number
        spots += [Spot(image, moment, (kind, row, col)) for row in range(rows) for col in range(cols)]
    return spots


def evs_keeps(spots: Sequence[Spot], states: Tensor, keep: int) -> list[int]:
    """EVS: the rate that fits is looked for among all rates at which a token more is kept of some film."""
    scores: list[float] = []
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    for i, spot in enumerate(spots):
        earlier = [
            j for j, o in enumerate(spots) if (o.film, o.place) == (spot.film, spot.place) and o.frame < spot.frame
        ]
        forerunner = max(earlier, key=lambda j: spots[j].frame, default=None)
        # distances that are equal but for rounding are equal
        scores.append(9.0 if forerunner is None else round(float(1 - unit[i] @ unit[forerunner]), 6))
    films = {spot.film: [i for i, s in enumerate(spots) if s.film == spot.film] for spot in spots}
    best = {name: sorted(mine, key=lambda i: (-scores[i], i)) for name, mine in films.items()}
    first = {name: sum(scores[i] == 9.0 for i in mine) for name, mine in films.items()}

    def at(rate: float) -> list[int]:
        sizes = {name: max(first[name], int(rate * len(mine) + 1e-9)) for name, mine in films.items()}
        return sorted(i for name, mine in best.items() for i in mine[: sizes[name]])

    rates = sorted({n / len(mine) for mine in films.values() for n in range(len(mine) + 1)})
    fitting = max(rate for rate in rates if len(at(rate)) <= keep)
    chosen = at(fitting)
    # films that would take their next token at the same rate take it in order of their tokens
    following = [i for i in at(min([r for r in rates if r > fitting], default=fitting)) if i not in chosen]
    return sorted(chosen + following[: keep - len(chosen)])


def vidcom2_keeps(
    spots: Sequence[Spot], states: Tensor, keep: int, temperature: float, scales: Sequence[float]
) -> list[int]:
    """VidCom2, film by film, where no frame's share exceeds the frame."""
    films = {spot.film: [i for i, s in enumerate(spots) if s.film == spot.film] for spot in spots}
    shares = split_in_proportion(keep, [len(mine) for mine in films.values()])
    chosen: list[int] = []
    for mine, share in zip(films.values(), shares, strict=True):
        x = states[mine].double()
        steady = x.var(0, unbiased=False).argsort(stable=True)[: x.shape[1] // 2]
        x = x[:, steady] / x[:, steady].norm(dim=1, keepdim=True)

        def alike(y: Tensor) -> Tensor:
            apart = (y - y.mean(0)).square().sum(1)
            return torch.stack([torch.exp(-apart / (2 * a)) for a in scales]).sum(0)

        frames = sorted({spots[i].frame for i in mine})
        rows = [[n for n, i in enumerate(mine) if spots[i].frame == frame] for frame in frames]
        to_film = alike(x)
        odds = torch.softmax(torch.tensor([-float(to_film[row].mean()) / temperature for row in rows]).double(), 0)
        wish = [
            share / len(mine) * len(row) * (1 + float(p) - 1 / len(rows)) for row, p in zip(rows, odds, strict=True)
        ]
        whole = sum(wish)
        wish = [share * w / whole for w in wish]
        quota = [int(w + 1e-9) for w in wish]
        assert all(w <= len(row) for w, row in zip(wish, rows, strict=True)), (
            "a case that this reference does not cover"
        )
        for n in sorted(range(len(rows)), key=lambda n: -round(wish[n] - quota[n], 9))[: share - sum(quota)]:
            quota[n] += 1
        while 0 in quota and share >= len(rows):
            quota[quota.index(max(quota))] -= 1
            quota[quota.index(0)] += 1
        if share < len(rows):
            quota = [int(n in sorted(range(len(rows)), key=lambda n: -wish[n])[:share]) for n in range(len(rows))]
        for row, number in zip(rows, quota, strict=True):
            score = to_film[row] + alike(x[row])
            chosen += [mine[row[n]] for n in sorted(range(len(row)), key=lambda n: float(score[n]))[:number]]
    return sorted(chosen)
