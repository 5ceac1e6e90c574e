"""Pictures as the model's image processor shapes them, cached on disk and read through a memory map.

A processor does two things: it resizes and crops, which is slow and stays in 8 bits, and it scales, which is a
multiplication. Only the first is cached; the second is done a batch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..sources import cache_dir
from .pictures import Picture

log = logging.getLogger(__name__)
FORMAT = "1"  # of the cache's files
CHUNK = 256  # pictures in memory at once


class Pixels(Sequence):
    """rows[i] -> {"pixel_values": [3, height, width], "labels": int}."""

    def __init__(self, values: np.ndarray, labels: list[int]):
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return {"pixel_values": self.values[i], "labels": self.labels[i]}


class Processor:
    """An image processor of transformers, cut in two: shape() one picture, scale() a batch.

    Where the halves do not make the whole (one that pads after scaling, say), shape() does all of it, in float32."""

    def __init__(self, processor: Any, first: Picture):
        self.whole = processor
        made = _call(processor, first)
        shaped = _call(processor, first, do_rescale=False, do_normalize=False)
        self.late = shaped.dtype == np.uint8 and shaped.shape == made.shape
        if self.late:
            scaled = self.scale(torch.from_numpy(shaped)[None])[0]
            self.late = torch.allclose(scaled, torch.from_numpy(made).float(), rtol=1e-5, atol=1e-5)
        self.size = made.shape

    def shape(self, picture: Picture) -> np.ndarray:
        """[3, height, width], uint8 if scale() does the rest, else float32."""
        if self.late:
            return _call(self.whole, picture, do_rescale=False, do_normalize=False)
        return _call(self.whole, picture).astype(np.float32)

    def scale(self, values: Tensor) -> Tensor:
        """[n, 3, height, width] as shape() gives them -> float32."""
        if not self.late:
            return values
        values = values.float()
        if getattr(self.whole, "do_rescale", None):
            values = values * self.whole.rescale_factor
        if getattr(self.whole, "do_normalize", None):
            mean, std = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in self._moments())
            values = (values - mean) / std
        return values

    def _moments(self) -> tuple[Any, Any]:
        return self.whole.image_mean, self.whole.image_std

    def key(self, pictures: list[Picture]) -> str:
        """What cached pixels depend on: the processor whole, the libraries, and every picture."""
        import PIL
        import transformers

        about = [FORMAT, transformers.__version__, PIL.__version__, np.__version__, type(self.whole).__name__, self.late]
        content = [*about, self.whole.to_json_string(), [p.digest for p in pictures]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _call(processor: Any, picture: Picture, **options: Any) -> np.ndarray:
    return np.asarray(processor(picture.rgb(), **options)["pixel_values"][0])


def cached(processor: Processor, pictures: list[Picture]) -> np.ndarray:
    """[n, 3, height, width] through shape(), or what an earlier call made of the same. The file is whole or absent, so
    two processes that build it at once both end with a good one; an unreadable one is made again.

    Raises UserError for a broken picture, naming its row, and for an unwritable cache."""
    path = cache_dir() / "pixels" / f"{processor.key(pictures)}.npy"
    if path.exists():
        try:
            return np.load(path, mmap_mode="r")
        except (ValueError, OSError) as e:
            log.warning("%s is unreadable (%s): made again", path, e)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                _fill(file, processor, pictures)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write the cache {path.parent}: {e.strerror}; set LORAFACTORY_CACHE to another folder") from e
    return np.load(path, mmap_mode="r")


def _fill(file: Any, processor: Processor, pictures: list[Picture]) -> None:
    kind = np.dtype(np.uint8 if processor.late else np.float32)
    about = {"descr": kind.str, "fortran_order": False, "shape": (len(pictures), *processor.size)}
    np.lib.format.write_array_header_2_0(file, about)

    def shape(picture: Picture) -> np.ndarray | UserError:
        try:
            return processor.shape(picture)
        except UserError as e:
            return e

    broken: list[UserError] = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(pictures), CHUNK):
            part = pictures[start : start + CHUNK]
            for picture, values in zip(part, pool.map(shape, part), strict=True):
                if isinstance(values, UserError):
                    broken.append(values)
                elif values.shape != processor.size:
                    raise UserError(
                        f"{picture.place} comes out of this model's image processor as {list(values.shape)}, the first "
                        f"picture as {list(processor.size)}: one that resizes to a single size is needed"
                    )
                else:
                    file.write(np.ascontiguousarray(values, kind).data)
    if broken:
        raise UserError(f"{broken[0]}; of {len(pictures)} pictures {len(broken)} are broken: repair or remove them")
