"""Load a base model, its tokenizer or image processor, and the task's head on top."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn as nn

from . import fingerprint, four_bits, gguf, tiny
from .attach import seeded
from .errors import UserError
from .sources import locate, reading
from .targets import base_name, head_modules, inside
from .tasks import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS = ("auto", "new", "keep")
LAYOUT = (
    "a folder with config.json, model.safetensors and the tokenizer's or image processor's files, as save_pretrained "
    "writes them"
)
TINY = "lorafactory:tiny"
# made on the spot, once
BUILT = {TINY: tiny.folder, "lorafactory:tiny_causal": tiny.causal_folder}
KEPT = 2  # loaded bases a process keeps: a sweep over two tasks loads each once
_loaded: dict[str, Loaded] = {}


@dataclass
class ModelConfig:
    """source: hub id, folder, package:<name>/<folder>, either with a .gguf file behind it, or one of BUILT. revision:
    the hub's. attention: transformers' attn_implementation. head: what to do with a head that the checkpoint was
    trained with: `auto` takes it if its class names are the task's, in any order; `keep` takes it by position; `new`
    draws another. pad_token: for tokenizers without one (null: their end token). quantization: 4bit, NF4 by
    bitsandbytes, computed in dtype."""

    name: str = ""
    source: str = ""
    revision: Optional[str] = None  # noqa: UP045  OmegaConf's spelling
    dtype: str = "float32"
    attention: Optional[str] = None  # noqa: UP045
    head: str = "auto"
    pad_token: Optional[str] = None  # noqa: UP045
    quantization: Optional[str] = None  # noqa: UP045

    def __post_init__(self) -> None:
        for option, known in (("dtype", DTYPES), ("head", HEADS)):
            if getattr(self, option) not in known:
                raise UserError(f"model.{option}={getattr(self, option)}: there are {', '.join(known)}")
        if self.quantization not in (None, "4bit"):
            raise UserError(f"model.quantization={self.quantization}: there is 4bit, or null")


@dataclass
class Loaded:
    """model: the base in eval mode on the CPU, head included. processor: its tokenizer or image processor. fresh:
    parameters that the checkpoint did not hold. head: how the head came to be. padding: what is to be known of it."""

    config: ModelConfig
    model: Any
    processor: Any
    fresh: list[str] = field(default_factory=list)
    head: str = "none"
    padding: str = ""

    def redraw(self, seed: int) -> None:
        """Draw the fresh parameters anew by the model's own rule, on the CPU; the same seed gives the same numbers."""
        owners = dict.fromkeys(n.rpartition(".")[0] for n in self.fresh)
        with seeded(seed), torch.no_grad():
            for owner in owners:
                module = self.model.get_submodule(owner)
                drawn = copy.deepcopy(module).cpu()
                self.model._init_weights(drawn)
                for name, p in module.named_parameters(recurse=False):
                    if f"{owner}.{name}" in self.fresh:
                        p.copy_(drawn.get_parameter(name))

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's numbers without the head."""
        given = [n for n, m in self.model.named_children() if next(m.parameters(), None) is None]
        return fingerprint.of_model(self.model, heads(self) + given)

    def describe(self) -> dict[str, Any]:
        """For the record."""
        c = self.config
        revision = getattr(self.model.config, "_commit_hash", None) or c.revision
        about = {"source": c.source, "revision": revision, "dtype": c.dtype}
        if hasattr(self.processor, "to_json_string"):  # an image processor: how it resizes is part of the base
            about["processor"] = {"class": type(self.processor).__name__, **json.loads(self.processor.to_json_string())}
        about |= {"quantization": c.quantization} if c.quantization else {}
        about |= {"padding": self.padding} if self.padding else {}
        return about | {"fingerprint": self.fingerprint, "head": self.head}


def heads(loaded: Loaded) -> list[str]:
    """Dotted names of the modules to train whole: the task's head, and what else the checkpoint did not hold."""
    found = head_modules(loaded.model)
    owners = dict.fromkeys(n.rpartition(".")[0] for n in loaded.fresh)
    return found + [o for o in owners if not inside(o, found)]


def load(config: ModelConfig, task: Task) -> Loaded:
    """The base model with the task's head. One load a process for each config and head: what comes back is shared.

    Raises UserError, in one line, for whatever does not load or does not fit the task."""
    head = task.head()
    key = json.dumps([asdict(config), task.auto_model, task.auto_processor, head])
    if key not in _loaded:
        while len(_loaded) >= KEPT:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = _load(config, task, head)
    return _loaded[key]


def forget(loaded: Loaded) -> None:
    """The next run loads it anew: this one cannot be given back as it was."""
    for key in [k for k, kept in _loaded.items() if kept is loaded]:
        del _loaded[key]


def _load(config: ModelConfig, task: Task, head: dict[str, Any]) -> Loaded:
    import transformers

    where = str(_place(config.source))
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    with reading(where, "model.source", LAYOUT), seeded(0):
        reader = getattr(transformers, task.auto_processor)
        processor = reader.from_pretrained(where, **options, **task.processor_options)
        own = transformers.AutoConfig.from_pretrained(where, **options)
        if config.attention:
            options["attn_implementation"] = config.attention
        dtype = DTYPES[config.dtype]
        read = partial(task.load_model, where, **head, **options, dtype=dtype)
        model, info = four_bits.load(read, dtype) if config.quantization else read()
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    loaded = Loaded(config, model.eval(), processor, [n for n, _ in model.named_parameters() if n in absent])
    _refuse_holes(loaded, absent)
    if "id2label" in head:
        theirs = [own.id2label[i] for i in sorted(own.id2label)]
        loaded.head = _fit_head(loaded, theirs, list(head["id2label"].values()), info["missing_keys"])
    elif head:
        if config.head == "keep":
            raise UserError("model.head=keep: each stage of this task draws a head of its own")
        loaded.head = "new"
    if hasattr(processor, "pad_token_id"):
        _fit_tokenizer(loaded)
    return loaded


def _place(source: str) -> Path | str:
    if source in BUILT:
        return BUILT[source]()
    return gguf.folder(source) if source.endswith(gguf.SUFFIX) else locate(source, "model.source", LAYOUT)


def _refuse_holes(loaded: Loaded, absent: set[str]) -> None:
    """A missing head is drawn, and so is a pooler, which pre-training often lacks; anything else is a wrong file."""
    prefix = base_name(loaded.model) + "."
    holes = sorted(n for n in absent if n.startswith(prefix) and "pooler" not in n.split("."))
    if holes:
        kind = type(loaded.model).__name__
        raise UserError(
            f"model.source={loaded.config.source} does not fit {kind}: missing or of another shape are "
            f"{len(holes)} of its tensors, as {holes[0]}"
        )


def _fit_head(loaded: Loaded, theirs: list[str], ours: list[str], missing: set[str]) -> str:
    """Give a trained head the task's class order. Returns what was done."""
    config, model = loaded.config, loaded.model
    modules = head_modules(model)
    if not modules and not loaded.fresh:
        if config.head != "auto":
            raise UserError(f"model.head={config.head} has no effect: the task gives the head, frozen; leave it out")
        return "frozen"
    output = _output_layer(model, modules, len(ours))
    if f"{output}.weight" in missing:
        return "new"
    if config.head == "new":
        trained = [n for n, _ in model.named_parameters() if inside(n, modules)]
        loaded.fresh = list(dict.fromkeys(loaded.fresh + trained))
        loaded.redraw(0)
        return "new"
    by_name = {n.lower(): i for i, n in enumerate(theirs)}
    same = len(theirs) == len(ours)
    if same and config.head == "keep":
        return "by position"
    if not same or by_name.keys() != {n.lower() for n in ours}:
        keep = ", model.head=keep takes it by position" if same else ""
        raise UserError(
            f"{config.source} was trained on the classes {', '.join(theirs)}; the task's are {', '.join(ours)}: "
            f"model.head=new draws a new head{keep}"
        )
    order = [by_name[n.lower()] for n in ours]
    with torch.no_grad():
        for p in model.get_submodule(output).parameters():
            p.copy_(p[order].clone())
    return f"by name, from positions {order}"


def _output_layer(model: nn.Module, modules: list[str], outputs: int) -> str:
    found = [n for n, m in model.named_modules() if inside(n, modules) and getattr(m, "out_features", 0) == outputs]
    if not found:
        raise UserError(f"{type(model).__name__} has no linear layer of {outputs} outputs as its head")
    return found[-1]


def _fit_tokenizer(loaded: Loaded) -> None:
    """Padding that model and tokenizer agree on, and the longest row that the model has positions for."""
    wanted, processor, config = loaded.config.pad_token, loaded.processor, loaded.model.config
    if wanted is not None:
        if wanted not in processor.get_vocab():
            raise UserError(f"model.pad_token={wanted!r} is not in the vocabulary of {loaded.config.source}")
        processor.pad_token = wanted
    if processor.pad_token_id is None:
        processor.pad_token = processor.eos_token or processor.unk_token  # masked wherever it pads
        if processor.pad_token_id is None:
            raise UserError(f"the tokenizer of {loaded.config.source} has no token to pad with: name one as model.pad_token")
        loaded.padding = f"{processor.pad_token}, for the tokenizer has no token of its own to pad with"
    config.pad_token_id = processor.pad_token_id  # a decoder's classifier finds the last token by it
    # most classifiers read the first token, or find the last one; these read the last position whatever stands there
    processor.padding_side = "left" if getattr(config, "summary_type", None) == "last" else "right"
    processor.model_max_length = min(processor.model_max_length, _positions(loaded.model))


def _positions(model: Any) -> int:
    """Longest row; RoBERTa's kind of table loses the positions up to the padding index."""
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith("position_embeddings")]
    usable = [m.num_embeddings - m.padding_idx - 1 for m in tables if m.padding_idx is not None]
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*usable, stated or sys.maxsize])
