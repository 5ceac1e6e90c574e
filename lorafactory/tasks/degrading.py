"""Degraded pictures: a random subset of six degradations in a random order, as CoLoRA's pre-training (PROD) has them.

Park et al. 2024, arXiv 2408.01099: the order is random because rain then blur is another picture than blur then rain.
Strengths are inferred, and so is that at least one degradation is taken."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from .pictures import Picture, image_of, values


def noise(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return x + rng.uniform(5, 50) / 255 * rng.standard_normal(x.shape)


def blur(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import ImageFilter

    return values(image_of(x).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3))))


def jpeg(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    image_of(x).save(file, "JPEG", quality=int(rng.integers(10, 60)))
    return values(Image.open(file))


def rain(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright streaks: drops, smeared along one direction."""
    drops = (rng.random(x.shape[:2]) < rng.uniform(0.002, 0.02)).astype(x.dtype)
    length, slope = int(rng.integers(5, 16)), rng.uniform(-0.5, 0.5)
    streaks = sum(np.roll(drops, (i, round(slope * i)), (0, 1)) for i in range(length))
    return x + rng.uniform(0.3, 0.8) * np.minimum(streaks, 1)[..., None]


def haze(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """t x + (1 - t) of the air's light, thicker towards the top."""
    thick = rng.uniform(0.2, 0.8) * np.linspace(1, rng.uniform(0.3, 1), x.shape[0])[:, None, None]
    return (1 - thick) * x + thick * rng.uniform(0.7, 1)


def dark(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.3, 0.9) * x ** rng.uniform(1.2, 3)


ALL: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (noise, blur, jpeg, rain, haze, dark)


def chosen(rng: np.random.Generator) -> list[Callable]:
    """One to all of the degradations, each once, in the order in which they come."""
    return [ALL[i] for i in rng.permutation(len(ALL))[: rng.integers(1, len(ALL) + 1)]]


def degrade(image: Any, seed: int) -> Any:
    """A PIL image of mode RGB, degraded: the same for the same seed."""
    rng = np.random.default_rng(seed)
    x = values(image)
    for by in chosen(rng):
        x = np.clip(by(x, rng), 0, 1)
    return image_of(x)


class Degraded(Picture):
    """A picture that is degraded when read, always in the same way. It is equal to what it was made of."""

    def __init__(self, picture: Picture, seed: int):
        super().__init__(picture.files, picture.index, picture.place)
        self.picture, self.seed = picture, seed

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        return f"{self.picture.digest}-degraded-{self.seed}"

    def __eq__(self, other: object) -> bool:
        return self.picture == getattr(other, "picture", other)

    def __hash__(self) -> int:
        return hash(self.picture)

    def rgb(self) -> Any:
        return degrade(self.picture.rgb(), self.seed ^ int(self.picture.digest, 16))
