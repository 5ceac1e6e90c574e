"""Tasks: data, loss and metrics behind one interface. One family a file; configs/task holds the presets.

A new family is one module here, or in a package with the entry-point group `lorafactory.tasks`: a subclass of Task
under @register_task("kind")."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Optional

import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..registry import nearest

SPLITS = ("train", "selection", "test")
_classes: dict[str, type[Task]] = {}


class Task:
    """Data, loss and metrics of one task. Larger primary metric is better, always.

    In order: load() the raw data, head() for the model, prepare(processor), then the rest."""

    kind: ClassVar[str]
    couples: bool = False  # the loss of a row depends on the others of its step
    online: ClassVar[bool] = False  # whether training rows are answered, too, each before the first step that learns from it
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    auto_processor: ClassVar[str] = "AutoTokenizer"
    processor_options: ClassVar[dict[str, Any]] = {}
    primary: str  # the metric that a run is judged by
    splits: dict[str, Sequence[dict[str, Any]]]  # each of SPLITS -> prepared rows

    @dataclass
    class Config:
        """source: hub id, folder, or package:<name>/<folder>. revision: the hub's. *_size: rows, drawn by split_seed
        alone, whatever the run's seed; 0: all. baseline: `untrained` scores the base as it came, too."""

        kind: str = ""
        name: str = ""
        source: str = ""
        revision: Optional[str] = None  # noqa: UP045  OmegaConf's spelling
        train_size: int = 0
        selection_size: int = 0
        test_size: int = 0
        split_seed: int = 0
        baseline: str = ""

        def __post_init__(self) -> None:
            if self.baseline not in ("", "untrained"):
                raise UserError(f"task.baseline={self.baseline}: there is untrained, or nothing")
            for option in (*(f"{s}_size" for s in SPLITS), "split_seed"):
                if getattr(self, option) < 0:
                    raise UserError(f"task.{option}={getattr(self, option)}: give 0 or more")

    def __init__(self, config: Any):
        if config.kind != self.kind:
            raise UserError(f"task.kind={config.kind!r}, but {type(self).__name__} is kind {self.kind!r}: use a preset")
        self.config = config

    @property
    def selects(self) -> str:
        """The metric of the selection split that chooses between runs; larger is better."""
        return self.primary

    def load(self) -> None:
        """Read the raw data and make the splits. Raises UserError for missing or wrong data."""
        raise NotImplementedError

    def head(self) -> dict[str, Any]:
        """What load_model must know of the head: num_labels, id2label, label2id; {}: it has none."""
        return {}

    def load_model(self, where: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        """(the model with the task's head, transformers' loading info) of a folder or hub id. options: head()'s, and
        what else from_pretrained takes."""
        import transformers

        auto = getattr(transformers, self.auto_model)
        return auto.from_pretrained(where, **options, output_loading_info=True, ignore_mismatched_sizes=True)

    def prepare(self, processor: Any) -> None:
        """Fill `splits` with rows for the model, cached on disk."""
        raise NotImplementedError

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of a split -> one batch, padded to its longest row."""
        raise NotImplementedError

    def training_batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Training rows -> one batch, where it is laid out otherwise than one to predict on."""
        return self.collate(rows)

    def size(self, batch: dict[str, Tensor]) -> int:
        """Loss units in the batch: examples, or label tokens."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM over the batch's units, a float32 scalar; divided by the sizes of all batches of a step it is their
        mean, however they were cut."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Any]:
        """One raw prediction a row, fit for JSON, without gradients."""
        raise NotImplementedError

    def references(self, split: str) -> list[Any]:
        """What metrics() compares the predictions of a split with."""
        raise NotImplementedError

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        """name -> float, or None beside `<name>_undefined`: why; and `constant_prediction`."""
        raise NotImplementedError

    def average(self, draws: list[list[Any]]) -> tuple[list[Any], float]:
        """The mean prediction of every row over several draws of a posterior, and how far the draws lie apart."""
        raise UserError(f"predictions of {self.kind} have no mean: evaluate the posterior's own (samples=0)")

    def calibration(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        """How well the predictions' own probabilities hold, where they have any."""
        return {}

    def stages(self) -> list[Task]:
        """What is trained on, one after another."""
        return [self]

    def scored(self) -> list[Task]:
        """What the trained model is scored on."""
        return [self]

    def enter(self, model: nn.Module, task: Task) -> None:
        """The model turns to one of stages() or scored()."""

    def describe(self) -> dict[str, Any]:
        """For the record: where the data came from, what they are, how they were split."""
        raise NotImplementedError


def register_task(kind: str) -> Callable[[type], type]:
    """Class decorator: publishes the class under `kind`. Raises UserError if the kind is taken."""

    def add(cls: type) -> type:
        if kind in _classes:
            first = _classes[kind].__module__
            raise UserError(f"task kind {kind!r} is registered twice: {first} and {cls.__module__}")
        cls.kind = kind  # type: ignore[attr-defined]
        _classes[kind] = cls
        return cls

    return add


def tasks() -> dict[str, type[Task]]:
    """Every kind and its class. An import error is not caught: a task must not vanish silently."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    for point in entry_points(group="lorafactory.tasks"):
        point.load()
    return dict(sorted(_classes.items()))


def get_task(kind: str) -> type[Task]:
    known = tasks()
    if kind not in known:
        raise UserError(f"no task kind {kind!r}; {nearest(kind, known)}")
    return known[kind]
