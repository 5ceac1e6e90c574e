"""Runs of the toy task on the tiny model, in this process or in others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir

from lorafactory import Adapted, config, models, paths
from lorafactory.config import RunConfig
from lorafactory.plan import mix
from lorafactory.tasks import get_task
from lorafactory.train import Trainer

TINY = ["model=tiny", "task=toy", "train.steps=8"]


def configured(*overrides: str) -> RunConfig:
    config.publish()
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.configs())):
        return config.load(compose("config", overrides=[*TINY, *overrides]))


def trainer(folder: Any, *overrides: str) -> Trainer:
    """One that stands before its first step, on a base of its own."""
    made = configured(*overrides)
    AcceleratorState._reset_state()
    task = get_task(made.task.kind)(made.task)
    task.load()
    models._loaded.clear()
    loaded = models.load(made.model, task)
    models._loaded.clear()  # this trainer's own: nobody detaches it
    loaded.redraw(made.seed)
    task.prepare(loaded.processor)
    adapted = Adapted(loaded.model, made.variant, mix(made.seed, 2))
    return Trainer(adapted, task, made.train, made.seed, Accelerator(mixed_precision=made.train.precision, cpu=True), folder)


def command(*arguments: str, processes: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "lorafactory", *arguments]


def lorafactory(*arguments: str, processes: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes), capture_output=True, text=True, timeout=300, env=environment(**env)
    )


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", **more}
