"""Small sources and checkpoints, and what a refusal must look like."""

import csv

import pytest

from lorafactory import models, tiny
from lorafactory.errors import UserError
from lorafactory.tasks import get_task


def make(kind="text", **options):
    cls = get_task(kind)
    return cls(cls.Config(**options))


def loaded(kind="text", **options):
    task = make(kind, **options)
    task.load()
    return task


def write_csv(path, rows, columns=("text", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([columns, *rows])
    return path.parent


def refused(call, *words):
    """The call raises a UserError of one line that holds all words."""
    with pytest.raises(UserError) as e:
        call()
    message = str(e.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message
    return message


def tiny_config(**options):
    return models.ModelConfig(**{"name": "tiny", "source": models.TINY, **options})


def save_model(folder, model):
    """A checkpoint folder: the model, and the tiny model's tokenizer."""
    from transformers import AutoTokenizer

    from lorafactory.sources import quiet

    with quiet():
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny.folder()).save_pretrained(folder)
    return str(folder)
