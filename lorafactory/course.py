"""One adapter through the stages of a task, a Trainer each. Most tasks are a single stage; of a sequence every task met so
far is scored after each stage, and the next one too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from . import files
from .attach import Adapted, seeded
from .config import RunConfig
from .errors import UserError
from .evaluate import aurac, score
from .plan import Plan, mix
from .resume import Checkpoints
from .tasks import Task
from .train import Progress, Trainer

SCORED = ("selection", "test")
Row = list[dict[str, Any] | None]


@dataclass
class Past:
    """What the stages that are over left beside the adapter, fit for JSON. step: how many; stages: how each went; rows:
    split -> [before training, after each stage] -> [metrics of each task, None where not scored]; cut: the rows of each
    truncation that a part names, by its rank. Before training it is as the whole."""

    step: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=lambda: {s: [] for s in SCORED})
    cut: dict[str, dict[str, list[Row]]] = field(default_factory=dict)


class Course:
    """trainer: of the stage at hand. A stage that is over is a checkpoint of its own, so that a killed run goes on there or
    where its Trainer stood; the last one is not, for nothing follows it but the record."""

    def __init__(self, adapted: Adapted, task: Task, config: RunConfig, accelerator: Accelerator, folder: Path):
        self.adapted, self.task, self.config, self.accelerator, self.folder = adapted, task, config, accelerator, folder
        self.stages, self.scored = task.stages(), task.scored()
        self.is_sequence = self.scored != [task]
        self.watch: Callable[[dict[str, Any]], None] = lambda row: None
        self.past = Past()
        self.raw: dict[str, list[Any]] = {s: [] for s in SCORED}
        self.checkpoints = Checkpoints(folder, adapted, accelerator) if self.is_sequence else None
        if self.checkpoints is not None:
            if config.train.shard:
                raise UserError("train.shard: a sequence trains on a base that each process holds whole")
            if (found := self.checkpoints.newest()) is not None:
                self.past = Past(**self.checkpoints.restore(found))
        self.total = sum(Plan(len(s.splits["train"]), config.train, 0).total for s in self.stages)
        self.trainer = self._enter()

    def _enter(self) -> Trainer:
        c, k = self.config, self.past.step
        self.task.enter(self.adapted, self.stages[k])
        seed = mix(c.seed, 3, k) if k else mix(c.seed, 3)
        return Trainer(self.adapted, self.stages[k], c.train, seed, self.accelerator, self._place(), index=k)

    def _place(self) -> Path:
        """Where the Trainer's checkpoints lie."""
        return self.folder / f"stage-{self.past.step:03d}" if self.is_sequence else self.folder

    def train(self) -> None:
        """Raises Diverged or KeyboardInterrupt, as Trainer.train() does."""
        if self.is_sequence and not self.past.rows["test"]:
            self._score()
            self._save()
        while True:
            done = sum(p["step"] for p in self.past.stages)
            self.trainer.watch = lambda row, done=done: self.watch({**row, "step": done + row["step"]})  # type: ignore[misc]
            progress, place = self.trainer.train(), self._place()
            if not self.is_sequence:
                return self._score()
            self.past.stages.append(asdict(progress))
            self.past.step += 1
            self._score()
            if self.past.step == len(self.stages):
                return None
            self._save()
            if self.accelerator.is_main_process:
                files.remove(place)
            self.trainer = self._enter()

    def _save(self) -> None:
        assert self.checkpoints is not None
        self.checkpoints.save(self.past, self.trainer.lifecycle.optimizer)

    def _score(self) -> None:
        """Selection and test, each read once after a stage: of the tasks met so far and the next one; of all at the start, at
        the end and before a stage that is scored online, whose other choice is to stay as it is."""
        k = self.past.step
        met = len(self.scored) if k in (0, len(self.stages)) or self.stages[k].online else k + 1
        with seeded(self.config.seed):
            row, self.raw = self._rows(met)
            for split in SCORED:
                self.past.rows[split].append(row[split])
            for rank, cut in sorted(self.adapted.adapter.truncations().items()) if k or not self.is_sequence else ():
                with self.adapted.adapter.tried(cut):
                    row, _ = self._rows(met)
                rows = self.past.cut.setdefault(str(rank), {s: self.past.rows[s][:1] if k else [] for s in SCORED})
                for split in SCORED:
                    rows[split].append(row[split])
        if k < len(self.stages):
            self.task.enter(self.adapted, self.stages[k])

    def _rows(self, met: int) -> tuple[dict[str, Row], dict[str, list[Any]]]:
        """Metrics and raw predictions of the first `met` tasks, by split."""
        row: dict[str, Row] = {s: [None] * len(self.scored) for s in SCORED}
        raw: dict[str, list[Any]] = {s: [None] * len(self.scored) for s in SCORED}
        for split in SCORED:
            for j, task in enumerate(self.scored[:met]):
                self.task.enter(self.adapted, task)
                row[split][j], raw[split][j] = score(
                    self.adapted, task, split, self.config.train.eval_batch_size, self.accelerator
                )
        return row, raw

    def outcome(self) -> dict[str, Any]:
        """Metrics and raw predictions, for the record."""
        found, raw = self._summary(self.past.rows), dict(self.raw) if self.is_sequence else {s: self.raw[s][0] for s in SCORED}
        answers = [p["answers"] for p in self.past.stages]
        if any(answers):
            found["test"] |= self.task.adaptation(answers, self.past.rows["test"])  # type: ignore[attr-defined]
            raw["online"] = answers
        if cut := {rank: self._summary(rows) for rank, rows in self.past.cut.items()}:
            found |= {s: found[s] | aurac({int(r): m[s][self.task.primary] for r, m in cut.items()}) for s in SCORED}
            found["truncations"] = cut
        return {"metrics": found, "raw": raw}

    def _summary(self, rows: dict[str, list[Row]]) -> dict[str, Any]:
        """By split: the metrics of a single task, or what a sequence makes of those of its tasks."""
        return {s: self.task.summary(rows[s]) if self.is_sequence else rows[s][0][0] for s in SCORED}  # type: ignore[attr-defined]

    @property
    def progress(self) -> Progress:
        """Of all stages together; rows of a sequence name theirs, and steps go on counting."""
        now = self.trainer.progress
        if not self.is_sequence:
            return now
        stages = [Progress(**p) for p in self.past.stages]
        stages += [now] if len(stages) < len(self.stages) else []
        whole = Progress()
        for k, p in enumerate(stages):
            whole.curve += [{"stage": k, **row, "step": whole.step + row["step"]} for row in p.curve]
            whole.evaluations += [{"stage": k, **row, "step": whole.step + row["step"]} for row in p.evaluations]
            whole = replace(whole, step=whole.step + p.step, seconds=whole.seconds + p.seconds)
        return whole
