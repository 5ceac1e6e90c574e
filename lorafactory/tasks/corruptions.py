"""Pictures as a camera in trouble would take them, made on the fly: the kinds of ImageNet-C (Hendrycks & Dietterich 2019),
in strengths of our own, so that no score here is comparable with theirs; and turned ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import UserError
from ..registry import nearest
from .pictures import Picture, image_of, values

Values = np.ndarray  # [height, width, 3] in [0, 1]


def _noise(x: Values, s: float, rng: np.random.Generator) -> Values:
    return x + rng.normal(0, 0.08 * s, x.shape)


def _shot(x: Values, s: float, rng: np.random.Generator) -> Values:
    photons = 60 / s**1.5
    return rng.poisson(x * photons) / photons


def _impulse(x: Values, s: float, rng: np.random.Generator) -> Values:
    hit = rng.random(x.shape[:2])[..., None]
    return np.where(hit < 0.03 * s, 0.0, np.where(hit > 1 - 0.03 * s, 1.0, x))


def _brightness(x: Values, s: float, rng: np.random.Generator) -> Values:
    return x + 0.1 * s


def _contrast(x: Values, s: float, rng: np.random.Generator) -> Values:
    return (x - x.mean()) * (1 - 0.17 * s) + x.mean()


def _fog(x: Values, s: float, rng: np.random.Generator) -> Values:
    veil = np.linspace(rng.random(), rng.random(), x.shape[1])[None, :, None]
    return (1 - 0.15 * s) * x + 0.15 * s * veil


def _blur(x: Values, s: float, rng: np.random.Generator) -> Values:
    from PIL import ImageFilter

    return values(image_of(x).filter(ImageFilter.GaussianBlur(0.02 * s * min(x.shape[:2]))))


def _pixelate(x: Values, s: float, rng: np.random.Generator) -> Values:
    from PIL import Image

    h, w = x.shape[:2]
    few = max(1, round(w * (1 - 0.15 * s))), max(1, round(h * (1 - 0.15 * s)))
    return values(image_of(x).resize(few, Image.Resampling.BOX).resize((w, h), Image.Resampling.NEAREST))


def _rotate(x: Values, degrees: float, rng: np.random.Generator) -> Values:
    from PIL import Image

    return values(image_of(x).rotate(degrees, Image.Resampling.BILINEAR))


KINDS: dict[str, Callable[[Values, float, np.random.Generator], Values]] = {
    "gaussian_noise": _noise,
    "shot_noise": _shot,
    "impulse_noise": _impulse,
    "brightness": _brightness,
    "contrast": _contrast,
    "fog": _fog,
    "blur": _blur,
    "pixelate": _pixelate,
    "rotate": _rotate,
}


def parse(corruption: str) -> tuple[str, float]:
    """'blur:3' -> its kind and strength, 1 to 5, or degrees. Raises UserError."""
    kind, _, strength = corruption.partition(":")
    if kind not in KINDS:
        raise UserError(f"task.corruption={corruption}: no kind {kind!r}; {nearest(kind, KINDS)}")
    try:
        value = float(strength)
    except ValueError:
        value = float("nan")
    least, most = (-360, 360) if kind == "rotate" else (1, 5)
    if not least <= value <= most:
        raise UserError(f"task.corruption={corruption}: write {kind}:N, N from {least} to {most}")
    return kind, value


class Corrupted(Picture):
    """A picture and what befell it, the same each time: noise is drawn by the picture's own bytes."""

    def __init__(self, picture: Picture, corruption: str):
        super().__init__(picture.files, picture.index, picture.place)
        self.corruption = corruption

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{super().digest} {self.corruption}".encode()).hexdigest()[:32]

    def rgb(self) -> Any:
        kind, strength = parse(self.corruption)
        rng = np.random.default_rng(int(self.digest[:16], 16))
        return image_of(KINDS[kind](values(super().rgb()), strength, rng).clip(0, 1))


class All(Sequence):
    """Every picture of a split, corrupted."""

    def __init__(self, pictures: Sequence[Picture], corruption: str):
        self.pictures, self.corruption = pictures, corruption

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: Any) -> Any:
        return Corrupted(self.pictures[i], self.corruption)
