"""Records made up by hand, written and read as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafactory import record
from lorafactory.tables import spec as specs

PRIMARY = {"cola": "matthews", "mrpc": "accuracy", "sst2": "accuracy", "bbc": "accuracy"}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mapping by mapping."""
    made = dict(base)
    for key, value in changes.items():
        made[key] = merged(made[key], value) if isinstance(value, dict) and isinstance(made.get(key), dict) else value
    return made


def fabricate(variant: str = "lora", task: str = "bbc", seed: int = 0, score: float | None = 0.8,
              selection: float | None = None, experiment: str = "demo", config: dict | None = None,
              **changes: Any) -> dict[str, Any]:  # fmt: skip
    """A complete record; selection: as on test unless given; config, changes: merged over what would be there."""
    primary = PRIMARY[task]
    settings = merged({
        "model": {"name": "minilm", "source": "package:minilm"},
        "task": {"name": task, "train_size": 200},
        "variant": {"name": variant, "rank": 8, "init": {"name": ""}},
        "train": {"lr": 1e-3, "steps": 40, "checkpoint_every": 0},
        "seed": seed,
        "results": {"folder": "results", "experiment": experiment},
        "wandb": {"mode": "disabled"},
    }, config or {})  # fmt: skip
    own = score if selection is None else selection
    made = {
        "schema": record.SCHEMA, "id": record.run_id(settings), "status": "ok", "experiment": experiment,
        "variant": variant, "task": task, "model": "minilm", "seed": seed, "config": settings,
        "command": f"lorafactory run variant={variant} task={task} train.lr={settings['train']['lr']} seed={seed}",
        "metrics": {"primary": primary, "selection": {primary: own, "constant_prediction": False},
                    "test": {primary: score, "constant_prediction": False}},
        "curve": [{"step": 1, "loss": 1.5, "lr": 1e-3}], "evaluations": [],
        "cost": {"adapter_parameters": 1000, "head_parameters": 50, "total_parameters": 10**6, "train_seconds": 10.0,
                 "steps_per_second": 4.0, "peak_bytes": 2**28, "checkpoint_bytes": 4000, "seconds": 12.0},
        "adapted": [{"name": "layer.query", "d_out": 8, "d_in": 8, "rank": 8, "scale": 2.0}],
        "targets": {"all-linear": 1},
        "data": {"name": task, "fingerprint": f"f-{task}", "sizes": {"train": 200, "selection": 100, "test": 250},
                 "majority": {"label": "sport", primary: 0.25}},
        "base": {"source": "package:minilm", "fingerprint": "b0", "revision": None, "dtype": "float32"},
        "optimizer": {"class": "AdamW", "steps": 40, "method": {}},
        "environment": {"commit": "c" * 40, "dirty": False, "source": "s0", "device": "cpu", "cpu": "Xeon",
                        "threads": 2, "packages": {"torch": "2.13.0", "transformers": "5.24.0"}},
    }  # fmt: skip
    return merged(made, changes)


def collapsed(primary: str = "accuracy") -> dict[str, Any]:
    """Change: it answers one class always."""
    return {"metrics": {"test": {primary: 0.3, "constant_prediction": True}}}


def diverged() -> dict[str, Any]:
    return {"status": "diverged", "reason": "the loss is nan", "metrics": {"selection": {}, "test": {}}}


class Results:
    """A results folder that is filled record by record."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, made: dict[str, Any], predictions: dict | None = None, scratch: bool | None = None) -> Path:
        names = {key: made[key] for key in ("experiment", "variant", "task", "model", "seed", "id")}
        where = record.is_scratch(made) if scratch is None else scratch
        path = record.path_of(self.folder, **names, scratch=where)
        record.write(path, made, predictions)
        return path

    def add(self, *args: Any, **kwargs: Any) -> Path:
        return self.put(fabricate(*args, **kwargs))

    def row(self, variant: str, scores: list[float | None], task: str = "bbc", **kwargs: Any) -> None:
        for seed, score in enumerate(scores):
            self.add(variant, task, seed, score, **kwargs)


def spec(**content: Any) -> specs.Spec:
    return specs.parse("mine", {"experiments": ["demo"], "tasks": ["bbc"], "seeds": 3, "plot": False, **content})
