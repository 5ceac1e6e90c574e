"""The contract on real architectures, tiny and random: BERT (nn.Linear) and GPT-2 (Conv1D), each with its task head.

transformers' Trainer takes an attached model as its model; it needs remove_unused_columns=False and label_names, for it
reads both off a signature, and `loss + model.penalty()` where a variant has a penalty, which step() insists on."""

import copy
from functools import cache

import pytest
import torch
from composites import sized
from support import adamw, cloned, close, perturb, same, small
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import lorafactory
from lorafactory import UserError, attach, registry

KINDS = ("bert", "gpt2")
PAIRS = [s for i, s in enumerate(sized(2, 2)) if i % 5 == 0]
g = torch.Generator().manual_seed(0)
IDS = torch.randint(4, 50, (5, 16, 7), generator=g)
MASK = torch.ones_like(IDS[0])
MASK[::3, 5:] = 0
BATCHES = [{"input_ids": ids * MASK, "attention_mask": MASK, "labels": ids[:, 1] % 3} for ids in IDS]
BATCH = BATCHES[0]
KIND = {"problem_type": "single_label_classification"}  # else forward writes it into the config
STEPS = 8


@cache
def base(kind):
    """Wide initial weights, else so small a model hardly tells its inputs apart."""
    torch.manual_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        return BertForSequenceClassification(
            BertConfig(vocab_size=50, num_labels=3, initializer_range=0.2, **sizes, **KIND)
        ).eval()
    sizes = dict(n_positions=16, n_embd=32, n_layer=2, n_head=2)
    config = GPT2Config(vocab_size=50, num_labels=3, pad_token_id=0, initializer_range=0.1, **sizes, **KIND)
    return GPT2ForSequenceClassification(config).eval()


def options(spelling):
    """Without a trained_modules entry: the model's own head is found."""
    return {k: v for k, v in small(spelling).items() if k != "trained_modules"}


def adapted_to(kind, spelling, seed=1):
    return attach(copy.deepcopy(base(kind)), spelling, batches=BATCHES, seed=seed, **options(spelling))


def logits(model):
    return model(input_ids=BATCH["input_ids"], attention_mask=MASK).logits.detach()


def fit(adapted, steps=STEPS):
    """A user's plain loop."""
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=2e-3), steps)  # parts may multiply it
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        adapted.adapter.before_forward(BATCH)
        loss = adapted(**BATCH).loss
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", sized(1, 1) + PAIRS)
def test_life_on_transformers(kind, spelling, tmp_path):
    plain, y0 = base(kind), logits(base(kind))
    pristine = cloned(plain.state_dict())
    adapted = adapted_to(kind, spelling)
    zero = registry.parse(spelling)[0].zero_start
    assert not zero or close(logits(adapted), y0, 5)
    assert adapted.cost()["head_parameters"] > 0, "the head was not found"
    losses = fit(adapted)
    assert losses[-1] < losses[0]
    adapted.end()
    perturb(adapted.adapter, 0.1)
    y = logits(adapted)
    adapted.save(tmp_path)
    assert torch.equal(logits(lorafactory.load(copy.deepcopy(plain), tmp_path)), y)
    with adapted.disabled():
        assert torch.equal(logits(adapted), y0)
    if adapted.adapter.mergeable:
        adapted.merge()
        assert close(logits(adapted), y, 10)
        adapted.unmerge()
        assert torch.equal(logits(adapted), y)
        assert close(logits(copy.deepcopy(adapted).bake()), y, 10)
    back = adapted.detach()
    assert (
        same(back.state_dict(), pristine)
        and type(back) is type(plain)
        and back.config.to_dict() == plain.config.to_dict()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", sized(1, 1) + PAIRS)
def test_gradients_are_those_without_checkpointing_B35(kind, spelling):
    """Frozen embeddings feed the first checkpointed block, and only the last tokens of a row may matter."""
    grads = []
    for checkpointing in (False, True):
        adapted = adapted_to(kind, spelling)
        perturb(adapted.adapter, 0.1)
        adapted.train()
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        adapted.adapter.before_forward(BATCH)
        (adapted(**BATCH).loss + adapted.penalty()).backward()
        grads.append({n: p.grad for n, p in adapted.adapter.named_parameters() if p.requires_grad and p.numel()})
    off, on = grads
    assert off.keys() == on.keys()
    for n, g in off.items():
        assert (g is None) == (on[n] is None), n
        assert g is None or close(on[n], g), n
    idle = tuple(f"deltas.{k}." for k in adapted.adapter.idle())  # a budget left them no rank
    lost = [n for n, g in off.items() if (g is None or not g.any()) and not n.startswith(idle)]
    assert all("position_embeddings" in n or "word_embeddings" in n or ".wte" in n or ".wpe" in n for n in lost), lost


class WithPenalty(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        made = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = (made[0] if return_outputs else made) + (model.penalty() if model.training else 0.0)
        return (loss, made[1]) if return_outputs else loss


def arguments(folder):
    return TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=16, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, logging_steps=1, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip


def rows():
    return [{k: v[i] for k, v in BATCH.items()} for i in range(16)]


@pytest.mark.parametrize("spelling", sized(1, 1))
def test_transformers_trainer(spelling, tmp_path):
    adapted = adapted_to("bert", spelling)
    y0 = logits(adapted.eval())
    trainer = WithPenalty(
        adapted,
        arguments(tmp_path),
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=(adapted.optimizer(adamw, STEPS), None),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS and min(losses[-3:]) < losses[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(adapted.eval()(**BATCH).loss.item(), abs=1e-5)
    assert not torch.equal(logits(adapted), y0)
    with adapted.disabled():
        assert torch.equal(logits(adapted), logits(base("bert")))
    assert same(adapted.detach().state_dict(), base("bert").state_dict())


@pytest.mark.parametrize("spelling", sized(1, 1))
def test_a_loop_that_forgets_the_penalty_is_told_B15(spelling):
    adapted = adapted_to("bert", spelling)
    optimizer = adapted.optimizer(adamw, STEPS)
    adapted(**BATCH).loss.backward()
    if adapted.adapter.has_penalty:
        with pytest.raises(UserError, match="penalty"):
            optimizer.step()
        (adapted(**BATCH).loss + adapted.penalty()).backward()
    optimizer.step()


def test_generation_runs_through_the_adapter():
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ).eval()
    say = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    before = plain.generate(IDS[0, :2], **say)
    adapted = attach(plain, "lora", rank=4, seed=0)
    assert "lm_head" not in [a["name"] for a in adapted.adapter.describe()], (
        "the tied output embedding is never a target"
    )
    assert torch.equal(adapted.generate(IDS[0, :2], **say), before)
    perturb(adapted.adapter, 3.0)
    after = adapted.generate(IDS[0, :2], **say)
    assert not torch.equal(after, before)
    adapted.merge()
    assert torch.equal(adapted.generate(IDS[0, :2], **say), after)
