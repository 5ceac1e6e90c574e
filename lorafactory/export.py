"""`lorafactory export`: a trained adapter for tools that do not know lorafactory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import models, record, registry
from .attach import Adapted, seeded
from .checkpoint import load, read_json, refuse_foreign
from .describe import Parser
from .errors import UserError
from .merged import export_merged
from .peft_folder import CONFIG, export_lora, export_peft
from .sources import locate, quiet, reading
from .tasks import get_task

FORMATS = """peft: the method as PEFT has it, for PeftModel.from_pretrained
lora: a plain LoRA in PEFT's layout, which serving engines read too
merged: a plain transformers checkpoint"""
PEFT, LORA, MERGED = (line.partition(":")[0] for line in FORMATS.splitlines())


def main(arguments: list[str]) -> int:
    parser = Parser(prog="lorafactory export", description="a trained adapter, for tools that do not know lorafactory")
    parser.add_argument("source", metavar="RECORD|FOLDER", type=Path,
                        help="the JSON file of a run with results.keep_adapter=true, or a folder that save() wrote")  # fmt: skip
    parser.add_argument("--format", choices=(PEFT, LORA, MERGED), required=True, help="; ".join(FORMATS.splitlines()))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--rank", type=int, help="with --format lora: the nearest of this rank, where none is exact")
    parser.add_argument("--dtype", choices=models.DTYPES,
                        help="with --format merged: write in this one (default: the base's, if little is lost)")  # fmt: skip
    parser.add_argument("--model", help="with a FOLDER: its base, a hub id or a folder (default: what FOLDER notes)")
    chosen = parser.parse_args(arguments)
    is_folder = chosen.source.is_dir()
    for option, value, of_use in (
        ("--rank", chosen.rank, chosen.format == LORA),
        ("--dtype", chosen.dtype, chosen.format == MERGED),
    ):
        if value is not None and not of_use:
            raise UserError(f"{option} {value} has no effect on --format {chosen.format}: leave it out")
    if chosen.model is not None and not is_folder:
        raise UserError(f"--model {chosen.model} has no effect on a record, which names its model: leave it out")
    refuse_foreign(chosen.out, "" if chosen.format == MERGED else CONFIG)
    adapted, processor = saved(chosen.source, chosen.model) if is_folder else trained(chosen.source)
    try:
        print(_write(chosen, adapted, processor))
    finally:
        adapted.detach()
    print(f"wrote {chosen.out}")
    return 0


def _write(chosen: Any, adapted: Adapted, processor: Any) -> str:
    """Returns what there is to say of it."""
    if chosen.format == PEFT:
        return f"PEFT type {export_peft(adapted, chosen.out)}, exact"
    if chosen.format == LORA:
        errors, what = export_lora(adapted, chosen.out, chosen.rank), "relative error of the update"
    else:
        dtype = models.DTYPES[chosen.dtype] if chosen.dtype else None
        errors, what = export_merged(adapted, chosen.out, dtype, processor), "share of the update lost to rounding"
    worst = max(errors, key=lambda n: errors[n])
    return f"{what}: at most {errors[worst]:.2e} ({worst}), over {len(errors)} layers"


def trained(path: Path) -> tuple[Adapted, Any]:
    """What a record's run ended with, on its base, and the base's processor. Raises UserError where it was not kept."""
    made = record.read(path)
    folder = path.resolve().parents[3] / "adapters" / made["id"]
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: move {path.name} away and run it again with results.keep_adapter=true")
    config = made["config"]
    cls = get_task(config["task"]["kind"])
    task = cls(registry.fill(cls.Config, config["task"], "task"))
    task.load()
    loaded = models.load(registry.fill(models.ModelConfig, config["model"], "model"), task)
    return load(loaded.model, folder), loaded.processor


def saved(folder: Path, source: str | None) -> tuple[Adapted, Any]:
    """What a folder holds, on its base, and the base's processor or None. Raises UserError where the base is not known."""
    if (folder / "base.json").exists():
        noted = read_json(folder / "base.json")
    else:  # PEFT's, or an older one of ours
        file = CONFIG if (folder / CONFIG).exists() else "adapter.json"
        noted = {"source": read_json(folder / file).get("base_model_name_or_path")}
    source = source or noted.get("source")
    if not source:
        raise UserError(f"{folder} does not say where its base model came from: give --model, a hub id or {models.LAYOUT}")
    model, processor = _base(source, noted)
    return load(model, folder), processor


def _base(source: str, noted: dict[str, Any]) -> tuple[Any, Any]:
    """The transformers model that an adapter was saved on, and its processor."""
    import transformers

    where = str(locate(source, "--model", models.LAYOUT))
    with reading(where, "--model", models.LAYOUT), seeded(0):
        name = noted.get("class") or (transformers.AutoConfig.from_pretrained(where).architectures or ["?"])[0]
        cls = getattr(transformers, name, None)
        if cls is None:
            raise UserError(f"the base is a {name}, no class of transformers: load() it and export in Python")
        labels = noted.get("labels")
        head = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
        model = cls.from_pretrained(where, dtype=noted.get("dtype") or "auto", ignore_mismatched_sizes=bool(head), **head)
    try:
        with quiet():
            return model.eval(), transformers.AutoProcessor.from_pretrained(where)
    except Exception:  # whatever a loader raises: the base has none
        return model.eval(), None
