"""transformers' Trainer for what attach() returned; apart from the package, whose import does not load transformers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import TrainerState
from transformers.utils.generic import can_return_loss, find_labels

from . import checkpoint
from .errors import UserError

FOLDER = "adapter"  # inside a checkpoint of the Trainer's


class TrainsAdapter:
    """A mixin before transformers' Trainer, or before a subclass of it such as TRL's.

    The columns and labels are those of the base's forward, which Adapted's *args and **kwargs do not show; the optimiser
    carries the adapter's life cycle; the penalty joins the loss; the last step is followed by end(); what is saved, gone
    on from and kept as the best is the adapter, in the folder `adapter` of a checkpoint: lorafactory.load reads it."""

    args: Any
    model: Any
    optimizer: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        base = self.model.model
        self.label_names = find_labels(type(base)) if self.args.label_names is None else self.args.label_names
        self.can_return_loss = can_return_loss(type(base))
        self._signature_columns = [*inspect.signature(base.forward).parameters, "label", "label_ids", *self.label_names]
        kinds = [p.kind for p in inspect.signature(base.forward).parameters.values()]
        self.model_accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
            options = {"weight_decay": self.args.weight_decay, **options}
            self.optimizer = self.model.optimizer(lambda groups: make(groups, **options), total=1)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._lifecycle().total = num_training_steps  # known only now
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _lifecycle(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer).lifecycle  # Accelerate wraps it

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.model.adapter.before_forward(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        if model.training:
            scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            parts, lifecycle = self.current_gradient_accumulation_steps, self._lifecycle()  # type: ignore[attr-defined]
            lifecycle.loss = (lifecycle.loss or 0) + loss.detach() / (1 if scaled else parts)
            if self.model.adapter.has_penalty:
                loss = loss + self.model.penalty() / (parts if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step:
            raise UserError("this Trainer has trained, and end() may have changed what trains: make a new one to train on")
        ended = super().train(*args, **kwargs)  # type: ignore[misc]
        self.model.end()
        return ended

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save(folder / FOLDER)
        processor = getattr(self, "processing_class", None)
        if processor is not None:
            processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.restore(self.model, Path(resume_from_checkpoint) / FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._lifecycle().index = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step

    def _load_best_model(self) -> None:
        checkpoint.restore(self.model, Path(self.state.best_model_checkpoint) / FOLDER)


class Trainer(TrainsAdapter, transformers.Trainer):  # type: ignore[misc]
    """`Trainer(adapted, args, train_dataset=…)`, and otherwise transformers' own."""
