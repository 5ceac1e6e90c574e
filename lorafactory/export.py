"""`lorafactory export RECORD`: the adapter that a run kept, for tools that do not know lorafactory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import models, record, registry
from .attach import Adapted
from .checkpoint import load, refuse_foreign, write_folder
from .describe import Parser
from .errors import UserError
from .peft_folder import CONFIG, export_lora
from .tasks import get_task


def main(arguments: list[str]) -> int:
    parser = Parser(prog="lorafactory export", description="the adapter that a run kept, for other tools")
    parser.add_argument("record", type=Path, help="the JSON file of a run with results.keep_adapter=true")
    parser.add_argument("--format", choices=("peft", "merged"), required=True,
                        help="peft: a plain LoRA for PEFT; merged: a plain transformers checkpoint")  # fmt: skip
    parser.add_argument("--rank", type=int, help="with --format peft: the nearest LoRA of this rank, where none equals it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    chosen = parser.parse_args(arguments)
    if chosen.rank is not None and chosen.format != "peft":
        raise UserError(f"--rank {chosen.rank} has no effect on --format {chosen.format}: leave it out")
    refuse_foreign(chosen.out, CONFIG if chosen.format == "peft" else "")  # a model already there may be the base itself
    adapted, loaded = trained(chosen.record)
    try:
        if chosen.format == "peft":
            errors = export_lora(adapted, chosen.out, chosen.rank)
            worst = max(errors, key=lambda n: errors[n])
            print(f"relative error of the update: at most {errors[worst]:.2e} ({worst}), over {len(errors)} layers")
        else:
            adapted.merge()
            plain: list[Any] = [adapted.model, loaded.processor]
            write_folder(chosen.out, lambda where: [p.save_pretrained(where) for p in plain])
    finally:
        adapted.detach()
    print(f"wrote {chosen.out}")
    return 0


def trained(path: Path) -> tuple[Adapted, models.Loaded]:
    """What a record's run ended with, on its base. Raises UserError where the adapter was not kept."""
    made = record.read(path)
    folder = path.resolve().parents[3] / "adapters" / made["id"]
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: move {path.name} away and run it again with results.keep_adapter=true")
    config = made["config"]
    cls = get_task(config["task"]["kind"])
    task = cls(registry.fill(cls.Config, config["task"], "task"))
    task.load()
    loaded = models.load(registry.fill(models.ModelConfig, config["model"], "model"), task)
    return load(loaded.model, folder), loaded
