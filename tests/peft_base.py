"""The models on which a variant is held against HF PEFT, and how near the two must be."""

from functools import cache

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

TARGETS = {
    "bert": ["query", "value", "intermediate.dense", "output.dense"],  # square, tall and wide
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


@cache
def base(kind):
    """Wide initial weights, else so small a model hardly tells its inputs apart; no dropout of its own."""
    torch.manual_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = BertModel(BertConfig(vocab_size=50, initializer_range=0.2, **sizes, **off))
    else:
        off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, initializer_range=0.15, **off))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):  # zero at first, and what is scaled wrongly would not show
                p.normal_(0, 0.2)
    return model


def near(a, b):
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.detach().abs().max())))


def output(model, x):
    return model(inputs_embeds=x).last_hidden_state
