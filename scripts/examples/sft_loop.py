"""Supervised fine-tuning of a causal LM on prompts and answers, loss on the answers alone. Runs offline in seconds."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafactory

STEPS, PAD, END = 120, 0, 1
torch.manual_seed(0)
sizes = dict(vocab_size=24, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=PAD, bos_token_id=2, eos_token_id=END, initializer_range=0.1))

# a prompt of two to five letters, the answer their reverse; your tokenizer's chat template would make such ids
letters = [torch.randint(4, 24, (int(n),)).tolist() for n in torch.randint(2, 6, (64,))]
pairs = [([2, *word, 3], [*word[::-1], END]) for word in letters]


def batch(chosen: list) -> dict[str, torch.Tensor]:
    """Padded on the right; padding is masked and neither it nor the prompt is learned, the end token is."""
    rows = [(p + a, [-100] * len(p) + a) for p, a in chosen]
    width = max(len(ids) for ids, _ in rows)
    fill = lambda row, value: row + [value] * (width - len(row))  # noqa: E731
    return {
        "input_ids": torch.tensor([fill(ids, PAD) for ids, _ in rows]),
        "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([fill(labels, -100) for _, labels in rows]),
    }


batches = [batch(pairs[i : i + 16]) for i in range(0, 64, 16)]
# data-driven start: A from what the layers read in these batches
adapted = lorafactory.attach(model, "dora+eva+lora_plus", rank=16, alpha=32, batches=batches, seed=0).train()
optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=2e-3), total=STEPS)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
for step in range(STEPS):
    loss = adapted(**batches[step % len(batches)]).loss
    (loss + adapted.penalty()).backward()
    torch.nn.utils.clip_grad_norm_(adapted.adapter.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 40 == 0:
        print(f"step {step:3}  loss {loss.item():.4f}")
adapted.end()
print(f"at the end    {loss.item():.4f}")


def answer(model, prompt: list) -> list:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return made[0, len(prompt) :].tolist()


with tempfile.TemporaryDirectory() as place:
    folder = adapted.eval().save(Path(place) / "adapter")
    adapted = lorafactory.load(adapted.detach(), folder).eval()
    print(f"loaded: {sum(answer(adapted, p) == a for p, a in pairs[:16])} of 16 answers are right")
    merged = adapted.bake()  # a plain LlamaForCausalLM; save_pretrained writes it
    print(f"merged: {sum(answer(merged, p) == a for p, a in pairs[:16])} of 16 answers are right")
