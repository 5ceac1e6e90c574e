"""Several tasks, one after another, on one adapter: what continual learning is measured on."""

from __future__ import annotations

import copy
from collections import abc
from dataclasses import dataclass, field
from typing import Any, List, Optional  # noqa: UP035  OmegaConf's spelling

import torch
import torch.nn as nn
from torch import Tensor

from .. import paths
from ..adapter import Staged
from ..errors import UserError
from ..registry import nearest
from ..targets import head_modules
from . import SPLITS, Task, get_task, register_task, transfer
from .classification import Classification

HEADS = ("own", "shared")


@register_task("sequence")
class Sequence(Task):
    """Stages in order, each a task of its own: a preset's name, or {task: a preset, and options of it}."""

    @dataclass
    class Config(Task.Config):
        """stages: `[cola, {task: digits, classes: [0, 1]}]`. heads: `own`, one a stage, and which stage a row is of is known
        when it is scored; or `shared`, for stages of the same classes. joint: all stages at once, what a sequence is
        measured against. unlabelled: stages, counted from 0, that train on the rows that they are scored on, without
        their labels and with the head as it is. All else is set in the stages."""

        kind: str = "sequence"
        stages: List[Any] = field(default_factory=list)  # noqa: UP006
        heads: str = "own"
        joint: bool = False
        unlabelled: Optional[List[int]] = None  # noqa: UP006, UP045

        def __post_init__(self) -> None:
            super().__post_init__()
            idle = [f"{s}_size" for s in SPLITS] + ["source", "revision", "split_seed", "baseline"]
            if given := [o for o in idle if getattr(self, o)]:
                raise UserError(f"task.{given[0]}={getattr(self, given[0])} has no effect on a sequence: set it in its stages")
            if self.heads not in HEADS:
                raise UserError(f"task.heads={self.heads}: there are {', '.join(HEADS)}")
            self.stages = [config_of(stage) for stage in self.stages]
            if self.unlabelled is not None:
                if self.heads != "shared" or self.joint:
                    raise UserError("task.unlabelled: without labels no head can be learnt: task.heads=shared, joint=false")
                if not all(0 < k < len(self.stages) for k in self.unlabelled):
                    raise UserError(f"task.unlabelled={self.unlabelled}: stages from 1 on, for the first needs labels")

    def __init__(self, config: Any):
        super().__init__(config)
        if len(config.stages) < 2:
            raise UserError(f"task.stages has {len(config.stages)} tasks: a sequence takes two or more, as [cola, mrpc]")
        self.parts: list[Task] = [get_task(c.kind)(c) for c in config.stages]
        for name in ("auto_model", "auto_processor", "processor_options"):
            if any(getattr(p, name) != getattr(self.parts[0], name) for p in self.parts):
                raise UserError("task.stages: these take different kinds of model; one base must read them all")
            setattr(self, name, getattr(self.parts[0], name))
        self.primary = "average"

    def load(self) -> None:
        for part in self.parts:
            part.load()
        heads = [p.head() for p in self.parts]
        if self.config.heads == "own" and not all("id2label" in h for h in heads):
            raise UserError("task.heads=own: a stage has no head of classes or numbers; task.heads=shared keeps the model's")
        if self.config.heads == "shared" and any(h != heads[0] for h in heads):
            raise UserError("task.heads=shared, but the stages have different classes: task.heads=own gives each its own")

    def head(self) -> dict[str, Any]:
        heads = [p.head() for p in self.parts]
        return heads[0] if self.config.heads == "shared" else {"outputs": [h["num_labels"] for h in heads]}

    def load_model(self, where: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        outputs = options.pop("outputs", None)
        first = self.parts[0]
        if outputs is None:
            return first.load_model(where, **options)
        model, info = first.load_model(where, **first.head(), **options)
        names = head_modules(model)
        if not names:
            raise UserError(f"{type(model).__name__} has no head to give each stage: task.heads=shared")
        for name in names:
            head, last = model.get_submodule(name), name == names[-1]
            copies = [(with_outputs(head, outputs[0], n) if last else copy.deepcopy(head)) for n in outputs]
            model.set_submodule(name, Heads(copies))
            info["missing_keys"] |= {f"{name}.{n}" for n, _ in model.get_submodule(name).named_parameters()}
        return model, info

    def prepare(self, processor: Any) -> None:
        for part in self.parts:
            part.prepare(processor)

    def stages(self) -> list[Task]:
        if self.config.joint:
            return [Joint(self)]
        return [Unlabelled(p) if k in (self.config.unlabelled or ()) else p for k, p in enumerate(self.parts)]

    def enter(self, model: nn.Module, task: Task) -> None:
        if self.config.unlabelled is not None:
            model.adapter.trained.requires_grad_(not isinstance(task, Unlabelled))  # type: ignore[union-attr, operator]
        index = self.parts.index(task) if task in self.parts else None
        for module in (m for m in model.modules() if isinstance(m, Staged)):
            module.turn(index)

    def scored(self) -> list[Task]:
        return list(self.parts)

    def summary(self, rows: list[list[dict[str, Any] | None]]) -> dict[str, Any]:
        """rows[0]: the metrics of each stage's task before training, then after every stage; None: not scored."""
        untrained, *matrix = [[None if m is None else m[p.primary] for m, p in zip(row, self.parts, strict=True)] for row in rows]
        found: dict[str, Any] = {"average": transfer.average(matrix)}
        if not self.config.joint:
            found["backward_transfer"] = transfer.backward_transfer(matrix)
            found["forgetting"] = transfer.forgetting(matrix)
            found["forward_transfer"] = transfer.forward_transfer(matrix, untrained)
        learnt = [rows[-1][j] if self.config.joint else rows[j + 1][j] for j in range(len(self.parts))]
        constant = all((m or {}).get("constant_prediction") for m in learnt)
        return {**found, "matrix": matrix, "before": untrained, "constant_prediction": constant}

    def adaptation(self, answers: list[list[Any]], rows: list[list[dict[str, Any] | None]]) -> dict[str, Any]:
        """answers: [row, prediction] of each stage's test split while it trained, none where that had labels. rows: summary's.
        source_average: of the same stages, as the model stood before the first of them."""
        found: list[float | None] = []
        for part, told in zip(self.parts, answers, strict=True):
            references = part.references("test")
            found.append(part.metrics([p for _, p in told], [references[i] for i, _ in told])[part.primary] if told else None)
        online = [k for k, s in enumerate(found) if s is not None]
        source = [(rows[online[0]][k] or {})[self.parts[k].primary] for k in online]
        online_average, source_average = (transfer.average([scores]) for scores in ([found[k] for k in online], source))
        return {"online": found, "online_average": online_average, "source_average": source_average}

    def describe(self) -> dict[str, Any]:
        about = [p.describe() for p in self.parts]
        sizes = {s: sum(a["sizes"][s] for a in about) for s in SPLITS}
        prints = "-".join(a["fingerprint"][: 32 // len(about)] for a in about)
        return {"name": self.config.name, "kind": self.config.kind, "fingerprint": prints, "sizes": sizes, "stages": about}


class Heads(Staged):
    """A head a stage: that of the stage at hand computes and, where it is trained at all, trains. turn(None): all of
    them, their outputs side by side."""

    def __init__(self, heads: list[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.at = 0

    def turn(self, index: int | None) -> None:
        super().turn(index)
        trained = any(p.requires_grad for p in self.parameters())
        for i, head in enumerate(self.heads):
            head.requires_grad_(trained and index in (None, i))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.at is not None:
            return self.heads[self.at](*args, **kwargs)
        return torch.cat([head(*args, **kwargs) for head in self.heads], -1)


class Joint(Task):
    """All stages in one: a row is scored among the classes of its own stage."""

    def __init__(self, sequence: Sequence):
        self.sequence, self.first = sequence, sequence.parts[0]
        if not all(isinstance(p, Classification) and not p.head().get("prompts") for p in sequence.parts):
            raise UserError("task.joint takes stages of classes: leave out regression, generation and zero-shot heads")
        self.own = sequence.config.heads == "own"
        outputs = [len(p.labels) if self.own else 0 for p in sequence.parts]  # type: ignore[attr-defined]
        self.starts = [sum(outputs[:i]) for i in range(len(outputs))]
        self.owner = torch.tensor([i for i, n in enumerate(outputs) for _ in range(n)])
        self.primary = self.first.primary
        self.splits = {s: Chained([p.splits[s] for p in sequence.parts], self.starts) for s in SPLITS}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.first.collate(rows)

    def size(self, batch: dict[str, Tensor]) -> int:
        return self.first.size(batch)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = self.first._logits(model, batch)  # type: ignore[attr-defined]
        if not self.own:
            return found
        owner = self.owner.to(found.device)
        return found.masked_fill(owner != owner[batch["labels"]][:, None], -1e9)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum")

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Any]:
        return self.logits(model, batch).tolist()

    def references(self, split: str) -> list[Any]:
        return [row["labels"] for row in self.splits[split]]

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        return self.first.metrics(predictions, references)


class Unlabelled(Task):
    """Test-time adaptation: the rows that a stage is scored on, their labels left out. The loss is the cross entropy with the
    logits that a part puts into the batch as `teacher`; where none does, with the model's own: its entropy (TENT). Each batch
    is answered before the step that learns from it, which is what test-time adaptation is scored by."""

    online = True

    def __init__(self, part: Task):
        if not isinstance(part, Classification):
            raise UserError("task.unlabelled: only stages of classes can be learnt without labels")
        self.part, self.primary = part, part.primary
        self.splits = {**part.splits, "train": part.splits["test"]}

    def training_batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {k: v for k, v in self.part.collate(rows).items() if k != "labels"}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.part.collate(rows)

    def size(self, batch: dict[str, Tensor]) -> int:
        return len(next(iter(batch.values())))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = self.part._logits(model, {k: v for k, v in batch.items() if k != "teacher"})
        return -(batch.get("teacher", logits).float().softmax(-1) * logits.log_softmax(-1)).sum()

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Any]:
        return self.part.predict(model, {k: v for k, v in batch.items() if k != "teacher"})

    def references(self, split: str) -> list[Any]:
        return self.part.references(split)

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        return self.part.metrics(predictions, references)


class Chained(abc.Sequence):
    """Rows of several splits, one after another; their labels follow one another, too."""

    def __init__(self, splits: list[Any], starts: list[int]):
        self.splits, self.starts = splits, starts
        self.places = [(i, j) for i, rows in enumerate(splits) for j in range(len(rows))]
        if all(hasattr(rows, "lengths") for rows in splits):
            self.lengths = lambda: [n for rows in splits for n in rows.lengths()]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, k: Any) -> Any:
        i, j = self.places[k]
        row = self.splits[i][j]
        return {**row, "labels": row["labels"] + self.starts[i]}


def with_outputs(head: nn.Module, old: int, new: int) -> nn.Module:
    """A copy of a head whose last linear layer has `new` outputs instead of `old`. Raises UserError where it has none."""
    made = copy.deepcopy(head)
    found = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if not found:
        raise UserError(f"{type(head).__name__} has no linear layer of {old} outputs to give each stage: task.heads=shared")
    theirs = made.get_submodule(found[-1])
    like = {"device": theirs.weight.device, "dtype": theirs.weight.dtype}
    layer = nn.Linear(theirs.in_features, new, theirs.bias is not None, **like)  # type: ignore[arg-type]
    if not found[-1]:
        return layer
    made.set_submodule(found[-1], layer)
    return made


def config_of(stage: Any) -> Any:
    """The typed config of a stage: a preset under configs/task, and options of it. A record's own comes back as it is."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(stage, Task.Config):
        return stage
    options = {"task": stage} if isinstance(stage, str) else dict(stage)
    name = options.pop("task", "")
    given = preset(name) if name else {}
    if "kind" not in (given := {**given, **options}):
        raise UserError(f"task.stages: {stage} names no task; write a preset, or {{task: a preset, its options}}")
    cls: Any = get_task(given["kind"]).Config
    for key in given:
        if key not in cls.__dataclass_fields__:
            near = nearest(key, cls.__dataclass_fields__)
            raise UserError(f"task.stages: {name or given['kind']} has no option {key!r}; {near}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given))
    except OmegaConfBaseException as e:
        raise UserError(f"task.stages: {name or given['kind']}: {e.key}: {str(e).splitlines()[0]}") from None


def preset(name: str) -> dict[str, Any]:
    """configs/task/<name>.yaml, its defaults resolved."""
    from omegaconf import OmegaConf

    folder = paths.configs() / "task"
    if not (folder / f"{name}.yaml").exists():
        raise UserError(f"task.stages: no task {name!r}; {nearest(name, [p.stem for p in folder.glob('*.yaml')])}")
    content: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    made: dict[str, Any] = {}
    for default in content.pop("defaults", []):
        made |= preset(default) if isinstance(default, str) else {"kind": default["kind@_here_"]}
    return made | content


