"""The adapted model as a plain transformers checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .attach import Adapted
from .checkpoint import refuse_foreign, write_folder
from .errors import UserError
from .sources import quiet

LIMIT = 0.1  # of a layer's update, as merge() has it


def export_merged(
    adapted: Adapted, folder: str | Path, dtype: torch.dtype | None = None, processor: Any = None
) -> dict[str, float]:
    """Write what `from_pretrained(folder)` reads without lorafactory; the adapter stays as it is.

    dtype: None, the base's, as long as rounding to it loses at most a tenth of the update in every layer; else the one
    to write in, whatever is lost: a wider one, or the base's own. processor: a tokenizer or image processor to write
    beside it. Returns the share of the update that rounding lost, a layer. Raises UserError, nothing written, for what
    cannot be merged or has no place in a checkpoint of this architecture."""
    model: Any = adapted.model
    folder = Path(folder)
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"a {type(model).__name__} is no transformers model: bake() gives the merged module, save its state_dict")
    refuse_foreign(folder, "")  # a model already there may be the base itself
    names = model.state_dict().keys()
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    errors = adapted.merge(None if dtype == own else dtype, limit=math.inf)
    try:
        if added := [n for n in model.state_dict() if n not in names]:
            raise UserError(f"{adapted.variant} adds {added[0]}, which no {type(model).__name__} has: it cannot be saved as one")
        worst = max(errors, key=lambda n: errors[n], default=None)
        if worst is not None and not errors[worst] <= LIMIT and dtype is None:
            narrow = str(own).removeprefix("torch.")
            raise UserError(
                f"rounding to {narrow} would lose {errors[worst]:.0%} of the update of {worst}: "
                f"dtype float32 keeps it, dtype {narrow} accepts the loss"
            )
        with _config_as_it_is(model.config), quiet():
            plain = [p for p in (model, processor) if p is not None]
            write_folder(folder, lambda where: [p.save_pretrained(where) for p in plain])
    finally:
        adapted.unmerge()
    return errors


@contextlib.contextmanager
def _config_as_it_is(config: Any) -> Iterator[None]:
    """save_pretrained notes the merged dtype in the config of the model that it saves."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)
