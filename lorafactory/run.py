"""One run, a straight line: config -> (its record exists? return it) -> model, task -> attach -> train -> score -> record."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from . import checkpoint, files, kernels, models, record, registry, shard
from .attach import Adapted, seeded
from .config import RunConfig
from .course import Course
from .errors import UserError
from .evaluate import score
from .memory import Peak, exhausted
from .plan import mix
from .resume import how_to_go_on
from .sinks import Progress as Bar
from .sinks import Wandb
from .sources import short
from .tasks import Task, get_task
from .train import Diverged

_measured: dict[str, dict[str, Any]] = {}  # of untrained bases, in this process


@dataclass
class Outcome:
    """status: ok, found, diverged; the record and where it lies."""

    status: str
    path: Path
    record: dict[str, Any]


def run(config: RunConfig, command: str = "") -> Outcome:
    """Make the record of a config, or find it. Raises UserError for what cannot be run."""
    settings = asdict(config)
    names: dict[str, Any] = {
        "experiment": config.results.experiment,
        "variant": registry.spell(config.variant),
        "task": config.task.name,
        "model": config.model.name,
        "seed": config.seed,
        "id": record.run_id(settings),
    }
    shard.refuse_plugins()
    kernels.choose(config.kernels)
    AcceleratorState._reset_state()  # a sweep may change the precision from run to run
    accelerator = Accelerator(mixed_precision=config.train.precision, cpu=not torch.cuda.is_available())
    shard.refuse_one(config.train.shard, accelerator)
    main, results = accelerator.is_main_process, Path(config.results.folder)
    place = results / "scratch" / "checkpoints" / names["id"]
    with record.lock(record.path_of(results, **names)) if main else contextlib.nullcontext():
        path = record.find(results, **names) if main else None
        if accelerator.num_processes > 1:
            (path,) = broadcast_object_list([path])
        if path is not None:
            if main:
                files.remove(place)  # a kill may have come between the record and this
            return Outcome("found", path, record.read(path))
        made: dict[str, Any] = {"schema": record.SCHEMA, **names, "config": settings, "command": command}
        made["environment"] = record.environment(accelerator.device.type) | {"processes": accelerator.num_processes}
        try:
            made |= _make(config, names["id"], accelerator, place)
        except UserError:
            raise  # nothing ran
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(str(e) or how_to_go_on(place)) from None
        except Exception as e:
            failed = made | {"status": "failed", "reason": f"{type(e).__name__}: {e}"}
            if main:
                record.write(record.path_of(results, **names, scratch=True), failed)
            if exhausted(e):
                raise UserError(f"{accelerator.device} has no memory left: {_lower(config)} ({short(str(e))})") from e
            raise
        path = record.path_of(results, **names, scratch=record.is_scratch(made))
        predictions = made.pop("raw")
        if main:
            record.write(path, made, predictions)
            files.remove(place)
        accelerator.wait_for_everyone()
        return Outcome(made["status"], path, record.read(path))


def _make(config: RunConfig, id: str, accelerator: Accelerator, place: Path) -> dict[str, Any]:
    """Everything that only running can tell; place: where its checkpoints lie until there is a record."""
    began = time.perf_counter()
    task = get_task(config.task.kind)(config.task)
    task.load()
    loaded = models.load(config.model, task)
    loaded.redraw(mix(config.seed, 1))
    task.prepare(loaded.processor)
    loaded.model.to("cpu" if config.train.shard else accelerator.device)  # to be sharded, it moves share by share
    about = {"data": task.describe(), "base": loaded.describe()}
    kernels.forget()
    peak = Peak(accelerator.device)
    variant = config.variant
    if variant.trained_modules is None:
        variant = replace(variant, trained_modules=models.heads(loaded))
    adapted = Adapted(loaded.model, variant, mix(config.seed, 2))
    try:
        found = _train(config, id, task, adapted, accelerator, place)
        found["cost"] |= {"peak_bytes": peak.read(), "seconds": time.perf_counter() - began}
        about["base"] |= {"class": type(loaded.model).__name__, "process_bytes": shard.local_bytes(loaded.model)}
        return found | about | {"kernels": {"chosen": config.kernels, "used": kernels.used()}}
    finally:
        if shard.is_sharded(loaded.model):
            models.forget(loaded)
        else:
            adapted.detach()


def _train(config: RunConfig, id: str, task: Task, adapted: Adapted, accelerator: Accelerator, place: Path) -> dict[str, Any]:
    scratch = Path(config.results.folder) / "scratch"
    course = Course(adapted, task, config, accelerator, place)
    bar = Bar(course.total, f"{adapted.variant} {config.task.name} seed {config.seed}", course.progress.step)
    wandb = Wandb(config.wandb.mode, config.wandb.project, f"{adapted.variant}-{id}", asdict(config), scratch)

    def watch(row: dict[str, Any]) -> None:
        bar.step(row)
        wandb.step(row)

    course.watch = watch
    made: dict[str, Any] = {"status": "ok", "raw": None}
    try:
        before = {"untrained": _untrained(config, task, adapted, accelerator)} if config.task.baseline else {}
        course.train()
        made |= course.outcome()
        made["metrics"] = _judged(task) | made["metrics"] | before
    except Diverged as e:
        made |= {"status": "diverged", "reason": str(e), "metrics": _judged(task) | {"selection": {}, "test": {}}}
    finally:
        bar.close()
    progress = course.progress
    made |= {"curve": progress.curve, "evaluations": progress.evaluations}
    seconds = progress.seconds
    made["cost"] = adapted.cost() | {
        "train_seconds": seconds,
        "steps_per_second": progress.step / seconds if seconds else None,
        "checkpoint_bytes": _keep(config, id, adapted, place) if accelerator.is_main_process else None,
    }
    made |= {"adapted": adapted.adapter.describe(), "targets": adapted.targets}
    optimizer = course.trainer.lifecycle.optimizer
    made["optimizer"] = {
        "class": type(optimizer).__name__,
        "steps": progress.step,
        "groups": [
            {"lr_scale": g["lr_scale"], "weight_decay": g["weight_decay"], "parameters": sum(p.numel() for p in g["params"])}
            for g in optimizer.param_groups
        ],
        "method": adapted.adapter.counters(),
    }
    wandb.finish(made)
    return made


def _lower(config: RunConfig) -> str:
    """What would take less memory, the values as they are."""
    t = config.train
    rows = t.micro_batch_size or t.batch_size
    said = f"lower train.micro_batch_size (now {rows} rows at once, of train.batch_size={t.batch_size}; the result is the same)"
    said += f" or train.eval_batch_size={t.eval_batch_size}"
    return said if t.gradient_checkpointing else said + ", or set train.gradient_checkpointing=true"


def _judged(task: Task) -> dict[str, Any]:
    return {"primary": task.primary, "selects": task.selects}


def _untrained(config: RunConfig, task: Task, adapted: Adapted, accelerator: Accelerator) -> dict[str, Any]:
    """The test metrics of the base as it came; of a sweep's runs with one base and task the first measures them."""
    how = config.train.eval_batch_size, config.train.precision, config.seed
    key = json.dumps([asdict(config.task), asdict(config.model), how])
    if key not in _measured:
        with adapted.disabled(), seeded(config.seed):
            _measured[key], _ = score(adapted, task, "test", config.train.eval_batch_size, accelerator)
    return _measured[key]


def _keep(config: RunConfig, id: str, adapted: Adapted, place: Path) -> int:
    """Bytes of the adapter as saved; it stays where results.keep_adapter asks for it, else it goes with the checkpoints."""
    folder = Path(config.results.folder) / "adapters" / id if config.results.keep_adapter else place / "adapter"
    files.tidy(folder.parent, f".{folder.name}-*")
    return checkpoint.size(adapted.save(folder))
