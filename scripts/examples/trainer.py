"""transformers' Trainer on a classifier: attach, train, save, load, merge. Runs offline in seconds."""

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import lorafactory
from lorafactory.hf import Trainer  # transformers' own, with the adapter's life cycle


def base() -> BertForSequenceClassification:
    """Yours would be AutoModelForSequenceClassification.from_pretrained("…")."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, initializer_range=0.1))


# rows of twelve tokens; the label says in which half of the vocabulary the first one lies
generator = torch.Generator().manual_seed(0)
ids = torch.randint(5, 15, (512, 12), generator=generator)
rows = [{"input_ids": row, "labels": (row[0] >= 10).long()} for row in ids]

adapted = lorafactory.attach(base(), "adalora", rank=8, target_modules=["query", "value", "intermediate.dense"], seed=0)
with tempfile.TemporaryDirectory() as place:
    arguments = TrainingArguments(
        place, max_steps=80, per_device_train_batch_size=32, learning_rate=1e-2, logging_steps=20, eval_strategy="steps",
        eval_steps=40, save_steps=40, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=rows[:448], eval_dataset=rows[448:])
    trainer.train()  # ranks fall, the penalty joins the loss, and at the end what is masked is dropped
    print(f"eval loss {trainer.evaluate()['eval_loss']:.4f}, ranks {[a['rank'] for a in adapted.adapter.describe()]}")

    folder = adapted.save(Path(place) / "mine")  # checkpoint-80/adapter is one, too, as it stood before the end
    again = lorafactory.load(base(), folder).eval()
    inputs = ids[448:]
    agree = (again(inputs).logits.argmax(-1) == adapted.eval()(inputs).logits.argmax(-1)).float().mean()
    print(f"loaded into a fresh base: {agree:.0%} of the predictions agree")

    lorafactory.export_peft(again, Path(place) / "peft")  # for PeftModel.from_pretrained
    lorafactory.export_merged(again, Path(place) / "merged")  # for transformers alone
    merged = BertForSequenceClassification.from_pretrained(Path(place) / "merged").eval()
    right = (merged(inputs).logits.argmax(-1) == torch.stack([r["labels"] for r in rows[448:]])).float().mean()
    print(f"merged and read by transformers: accuracy {right:.0%}")
