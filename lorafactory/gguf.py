"""A model in llama.cpp's GGUF format, taken out of its quantisation once and kept in the cache as transformers saves it.

The weights are the quantised ones, as float32: a model of 4-bit weights stays as good as that, and trains at any rank."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from .built import build
from .errors import UserError
from .sources import locate, reading

SUFFIX = ".gguf"


def folder(source: str) -> Path:
    """The folder for <folder, or package:<name>>/<file>.gguf. Raises UserError for what is missing or no such file."""
    parent, _, name = source.rpartition("/")
    where = locate(parent or ".", "model.source", f"a folder with {name}")
    if not isinstance(where, Path) or not (where / name).is_file():
        raise UserError(f"model.source={source}: there is no {name} in {where}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.source={source} needs the package gguf: pip install gguf")
    with open(where / name, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]

    def write(place: Path) -> None:
        import transformers

        transformers.AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(place)
        read = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name)
        config = read.config
        del config.quantization_config  # which save_pretrained() would refuse
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(place)

    with reading(str(where), "model.source", f"a whole {SUFFIX} file"):
        return build(f"gguf-1-{digest}", write)
