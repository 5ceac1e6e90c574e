"""Pictures of a source: where they lie, and how any file that Pillow reads becomes RGB."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..sources import locate
from .reading import Places, Raw, class_names, require, tables

LAYOUT = (
    "a folder in a hub repository's layout: parquet files with an image column, or a folder a class of pictures (under "
    "train/ and test/ if it is split)"
)


def values(image: Any) -> np.ndarray:
    """A PIL image of mode RGB as [height, width, 3] in [0, 1]."""
    return np.asarray(image, np.float64) / 255


def image_of(x: np.ndarray) -> Any:
    """The way back, each value to the nearest of 256."""
    from PIL import Image

    return Image.fromarray((x * 255).round().astype(np.uint8))


class Picture:
    """One picture, read from its source when asked. Equal to another if their files are, byte for byte."""

    def __init__(self, files: Sequence[bytes], index: int, place: str):
        self.files, self.index, self.place = files, index, place

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.files[self.index]).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def rgb(self) -> Any:
        """A PIL image of mode RGB. Raises UserError, naming the row, for what is no picture or not a whole one."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.files[self.index])) as image:
                return to_rgb(image)
        except Exception as e:  # a decoder raises whatever its format does
            raise UserError(f"{self.place} is no picture that Pillow reads: {' '.join(str(e).split())}") from e


class Pictures(Sequence):
    """The pictures of one split. files: each one's bytes, read when asked; places: what an error calls it."""

    def __init__(self, files: Sequence[bytes], places: Sequence[str]):
        self.files, self.places = files, places

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: Any) -> Any:
        return Picture(self.files, int(i), self.places[i])


def to_rgb(image: Any) -> Any:
    """Upright as EXIF says, alpha over white, 16 bits a channel scaled to 8, every other mode as Pillow converts it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values {grey.min()}..{grey.max()} do not fit 16 bits")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point grey values have no fixed range: store 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read(source: str, subset: str, revision: str | None, image: str, label: str) -> dict[str, Raw]:
    """split -> rows whose inputs are Pictures. Raises UserError for a missing source or column."""
    found = tables(locate(source, "task.source", LAYOUT), subset, revision, LAYOUT)
    return {split: _rows(data, split, image, label) for split, data in found.items()}


def _rows(data: Any, split: str, image: str, label: str) -> Raw:
    import datasets

    require(data, split, [("task.image", image), ("task.label", label)])
    kind = data.features[image]
    if not isinstance(kind, datasets.Image):
        able = [n for n, f in data.features.items() if isinstance(f, datasets.Image)]
        raise UserError(f"task.image: column {image!r} of the {split} split holds no pictures; {able or 'none'} do")
    places = Places(split, len(data))
    files = _Files(data.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image, places)
    return Raw(Pictures(files, places), data[label][:], places, class_names(data, label))


class _Files(Sequence):
    """The bytes of an image column's files, inside the table or beside it."""

    def __init__(self, data: Any, image: str, places: Sequence[str]):
        self.data, self.image, self.places = data, image, places

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        cell = self.data[i][self.image]
        try:
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        except TypeError:
            raise UserError(f"{self.places[i]} has no picture in column {self.image!r}") from None
        except OSError as e:
            raise UserError(f"{self.places[i]}: cannot read {cell['path']}: {e.strerror}") from e
