"""Tiny random models with tokenizers of single characters, for tests and first tries."""

from __future__ import annotations

import string
from pathlib import Path

from .attach import seeded
from .built import build

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TURNS = ["<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def folder() -> Path:
    """A BERT of 2 layers of width 32."""
    return build("tiny-1", _write)


def causal_folder() -> Path:
    """A Llama of 2 layers of width 32 with a chat template; its tokenizer has no padding token, as Llama's."""
    return build("tiny-causal-1", _write_causal)


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
    model.save_pretrained(place)
    BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(place)


def _write_causal(place: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [*TURNS, *(chr(c) for c in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(characters)}, unk_token=TURNS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURNS[0], unk_token=TURNS[1], model_max_length=2048)
    own.add_special_tokens({"additional_special_tokens": TURNS[2:]})
    own.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=2048,
        initializer_range=0.4,  # narrow and tied: at less no token can be likely
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with seeded(0):
        model = LlamaForCausalLM(config)
    model.save_pretrained(place)
    own.save_pretrained(place)
