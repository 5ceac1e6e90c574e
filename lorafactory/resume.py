"""Going on after a kill or Ctrl-C: step checkpoints on disk, the newest whole one first."""

from __future__ import annotations

import logging
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from . import checkpoint, files
from .attach import Adapted
from .errors import UserError

log = logging.getLogger(__name__)
KEPT = 2  # checkpoints on disk: a torn one has a whole one before it


class Checkpoints:
    """`folder`/step-000040: adapter, optimiser and progress of one run; `folder`/best: the best adapter so far."""

    def __init__(self, folder: Path, adapted: Adapted, accelerator: Accelerator):
        self.folder, self.adapted, self.accelerator = folder, adapted, accelerator
        if accelerator.is_main_process:
            files.tidy(folder, ".*")

    def steps(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def save(self, progress: Any, optimizer: Any) -> None:
        if self.accelerator.is_main_process:
            state = asdict(progress)
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            name = f"step-{progress.step:06d}"
            checkpoint.save(self.adapted, self.folder / name, state, optimizer)
            for old in self.steps()[:-KEPT]:
                files.remove(old)
        self.accelerator.wait_for_everyone()

    def newest(self) -> Path | None:
        """Load the adapter of the newest whole checkpoint; damaged ones are named and passed over."""
        for folder in reversed(self.steps()):
            try:
                checkpoint.read_json(folder / "state.json")
                checkpoint.read_tensors(folder / "optimizer.safetensors")
                checkpoint.restore(self.adapted, folder)
                return folder
            except UserError as e:
                log.warning("checkpoint %s cannot be used: %s; going on from the one before", folder.name, e)
        return None

    def restore(self, folder: Path, optimizer: Any = None) -> dict[str, Any]:
        """The optimiser's state, built after newest() since loading may replace parameters; returns the progress."""
        state = checkpoint.restore_optimizer(optimizer, folder) if optimizer else checkpoint.read_json(folder / "state.json")
        state.pop("optimizer", None)
        if (scaler := state.pop("scaler", None)) is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        return state

    def save_best(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(self.adapted, self.folder / "best")
        self.accelerator.wait_for_everyone()

    def restore_best(self) -> None:
        checkpoint.restore(self.adapted, self.folder / "best")


class Interrupt:
    """Ctrl-C waits for the end of the step, so that the last checkpoint is whole; a second one does not wait."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> Interrupt:
        self.before = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread: whoever runs us decides
            self.before = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: Any) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


def how_to_go_on(folder: Path) -> str:
    """What a stopped run says last; folder: of its checkpoints."""
    if any(folder.rglob("step-*")):
        return f"stopped; the same command goes on from {folder}"
    return "stopped before the first checkpoint (train.checkpoint_every=N); the same command starts anew"
