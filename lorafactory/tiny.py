"""A tiny random BERT with a tokenizer of single characters, saved once into the cache as a hub repository would be."""

from __future__ import annotations

import os
import shutil
import string
import tempfile
from pathlib import Path

from .attach import seeded
from .errors import UserError
from .sources import cache_dir, quiet

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def folder() -> Path:
    """The model's folder, built if it is not there; two processes may do so at once. Raises UserError where the cache
    cannot be written."""
    import tokenizers
    import torch
    import transformers

    versions = "-".join(m.__version__ for m in (torch, transformers, tokenizers))
    place = cache_dir() / f"tiny-1-{versions}"
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tiny-", dir=place.parent))
        try:
            _write(temporary)
            os.replace(temporary, place)
        except OSError:
            if not place.is_dir():  # else the other process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write the cache {place}: {e.strerror}; set LORAFACTORY_CACHE to another folder") from e
    return place


def _write(place: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *letters, *("##" + c for c in letters)])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,  # at BERT's own 0.02 so narrow a model hardly tells its inputs apart
    )
    with seeded(0):
        model = BertModel(config)
    with quiet():
        model.save_pretrained(place)
        BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(place)
