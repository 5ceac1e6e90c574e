"""Bases of 4-bit weights (QLoRA, arXiv 2305.14314): NF4, its scales quantised, too, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .adapter.site import is_quantized
from .errors import UserError
from .targets import head_modules


def load(read: Callable[..., tuple[Any, dict[str, Any]]], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """What read(quantization_config=…) gives: the model and transformers' loading info. The head, and whatever else the
    checkpoint does not hold, keep whole numbers, for they are trained; which these are, a first loading tells.

    Raises UserError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization=4bit needs the package bitsandbytes: pip install bitsandbytes")
    model, info = read(quantization_config=_config(dtype))
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    trained = {*head_modules(model), *(n.rpartition(".")[0] for n in absent)}
    if any(is_quantized(m) for n in trained for m in model.get_submodule(n).modules()):
        output = model.get_output_embeddings()
        whole = [*trained, *(n for n, m in model.named_modules() if m is output)]
        model, info = read(quantization_config=_config(dtype, whole))
    for module in filter(is_quantized, model.modules()):
        module.support_avx512bf16_for_cpu = False  # which would repack the weights in evaluation: another state dict
    return model, info


def _config(dtype: torch.dtype, whole: list[str] | None = None) -> Any:
    from transformers import BitsAndBytesConfig

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=whole, **how)
