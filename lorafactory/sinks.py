"""Where the numbers of a run go while it runs: the terminal and, if asked, Weights & Biases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .errors import UserError


class Progress:
    """A bar on a terminal; silent elsewhere, where the last line of a run says what came out."""

    def __init__(self, total: int, title: str, start: int = 0):
        self.bar = tqdm(total=total, initial=start, desc=title, disable=not sys.stderr.isatty(), leave=False, unit="step")

    def step(self, row: dict[str, Any]) -> None:
        self.bar.update(1)
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

    def close(self) -> None:
        self.bar.close()


class Wandb:
    """Sends rows and the final record; does nothing where it is disabled."""

    def __init__(self, mode: str, project: str, name: str, config: dict[str, Any], folder: Path):
        self.run = None
        if mode == "disabled":
            return
        try:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(mode=mode, project=project, name=name, config=config, dir=folder)  # type: ignore[arg-type]
        except (ImportError, OSError) as e:
            raise UserError(f"wandb.mode={mode} failed ({e}): install and log in, or wandb.mode=disabled") from None

    def step(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def finish(self, record: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.summary.update({k: record[k] for k in ("metrics", "cost", "status")})
            self.run.finish()
