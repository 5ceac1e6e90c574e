"""What a causal language model writes behind prompts: batched, padded on the left, with its key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def answer(model: Any, prompts: Sequence[Tensor], processor: Any, config: Any) -> list[dict[str, Any]]:
    """A prompt (ids [tokens]): {"texts": config.samples of them, "new_tokens": how many each has, "ended": whether it
    ended by itself}. config: max_new_tokens, temperature (0: greedy), top_p, samples."""
    longest = max(map(len, prompts))
    ids = prompts[0].new_full((len(prompts), longest), processor.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
    how: dict[str, Any] = {"do_sample": False}
    if config.temperature:
        how = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    with _own_settings(model) as stops:
        stops = sorted({*stops, processor.eos_token_id})
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=config.max_new_tokens, eos_token_id=stops,
                              pad_token_id=processor.pad_token_id, num_return_sequences=config.samples, **how)  # fmt: skip
    written = [_until(row, stops) for row in made[:, longest:].tolist()]
    texts = processor.batch_decode([tokens for tokens, _ in written], skip_special_tokens=True)
    found = []
    for first in range(0, len(written), config.samples):
        of = range(first, first + config.samples)
        numbers, ended = [len(written[i][0]) for i in of], [written[i][1] for i in of]
        found.append({"texts": [texts[i] for i in of], "new_tokens": numbers, "ended": ended})
    return found


def summary(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """ended: share of the answers; new_tokens: their mean; constant_prediction: whether all rows got the same text."""
    ended = [e for p in predictions for e in p["ended"]]
    count = [n for p in predictions for n in p["new_tokens"]]
    first = predictions[0]["texts"]
    return {
        "ended": sum(ended) / len(ended),
        "new_tokens": sum(count) / len(count),
        "constant_prediction": len(predictions) > 1 and all(p["texts"] == first for p in predictions),
    }


@contextlib.contextmanager
def _own_settings(model: Any) -> Iterator[list[int]]:
    """Without what the checkpoint's generation_config.json asks for (a temperature, a repetition penalty), which
    generate() would mix in. Yields its end tokens."""
    from transformers import GenerationConfig

    base = model.model if hasattr(model, "adapter") else model
    before = base.generation_config
    ends = before.eos_token_id
    base.generation_config = GenerationConfig()
    try:
        yield [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    finally:
        base.generation_config = before


def _until(tokens: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """(what was written up to the first end token, whether there was one); behind it is padding."""
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[:i], True
    return tokens, False
