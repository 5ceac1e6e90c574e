"""lorafactory.hf.Trainer: nothing to set that transformers' own does not ask for a plain model."""

import pytest
import torch
from small_models import logits
from support import close, same, small
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers import Trainer as Theirs

from lorafactory import UserError, attach, load
from lorafactory.hf import Trainer

STEPS = 6
g = torch.Generator().manual_seed(0)
ROWS = [{"input_ids": ids, "labels": ids, "note": "dropped"} for ids in torch.randint(1, 50, (24, 7), generator=g)]


def base(cls=GPT2LMHeadModel):
    """Its output embedding tied, which transformers' own way of saving an unknown module refuses."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return cls(GPT2Config(**sizes, **off, initializer_range=0.1))


def adapted_by(spelling):
    batches = [{k: torch.stack([r[k] for r in ROWS[i : i + 8]]) for k in ("input_ids", "labels")} for i in (0, 8, 16)]
    return attach(base(), spelling, batches=batches, seed=1, **small(spelling))


def trainer(adapted, folder, cls=Trainer, **options):
    options = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2} | options
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1)
    return cls(adapted, TrainingArguments(str(folder), **quiet, **options), train_dataset=ROWS, eval_dataset=ROWS)


def losses(made):
    return [row["loss"] for row in made.state.log_history if "loss" in row]


@pytest.mark.parametrize("spelling", ("lora", "adalora", "relora", "dora+pissa", "galore", "eva"))
def test_it_trains_evaluates_and_saves(spelling, tmp_path):
    adapted = adapted_by(spelling)
    made = trainer(adapted, tmp_path, save_steps=4)
    made.train()
    assert len(losses(made)) == STEPS and losses(made)[-1] < losses(made)[0]
    assert made.evaluate()["eval_loss"] < losses(made)[0]
    if spelling == "adalora":  # end() came, and dropped what the budget had masked
        assert sum(low.rank for _, low in adapted.adapter.low_ranks()) == adapted.adapter.parts["budget"].target
    with pytest.raises(UserError, match="make a new one"):
        made.train()
    made.save_model(str(tmp_path / "last"))
    again = load(base(), tmp_path / "last" / "adapter").eval()
    assert torch.equal(logits(again), logits(adapted.eval()))
    files = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter" in files and not any(n.startswith("model") for n in files)


@pytest.mark.parametrize("spelling", ("lora", "adalora", "relora", "dylora", "lora_squeeze", "airllm"))
def test_a_resumed_run_is_the_run(spelling, tmp_path):
    """Bit for bit, from half the way: ranks, restarts, penalties, moments."""
    straight = adapted_by(spelling)
    trainer(straight, tmp_path, save_steps=3).train()
    resumed = adapted_by(spelling)
    again = trainer(resumed, tmp_path, save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again._lifecycle().index == STEPS and len(losses(again)) == STEPS
    assert same(resumed.adapter.state_dict(), straight.adapter.state_dict())


def test_the_best_adapter_comes_back(tmp_path):
    adapted = adapted_by("lora")
    made = trainer(adapted, tmp_path, learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, save_steps=1,
                   eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)  # fmt: skip
    made.train()
    scores = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    assert min(scores) < scores[-1] and made.evaluate()["eval_loss"] == pytest.approx(min(scores), rel=1e-5)


@pytest.mark.parametrize("spelling", ("lora", "adalora"))
def test_accumulated_steps_are_those_of_one_batch(spelling, tmp_path):
    """The loss is scaled once, as for the plain model, and so is the penalty."""
    one, parts = adapted_by(spelling), adapted_by(spelling)
    same_way = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    trainer(one, tmp_path / "1", **same_way).train()
    trainer(parts, tmp_path / "4", **same_way, per_device_train_batch_size=2, gradient_accumulation_steps=4).train()
    start = adapted_by(spelling).adapter.state_dict()
    for (n, t), (_, u) in zip(one.adapter.state_dict().items(), parts.adapter.state_dict().items(), strict=True):
        assert "budget" in n or close(t, u), n
    assert not same(one.adapter.state_dict(), start)


class Strict(GPT2LMHeadModel):
    """Its forward takes no further keywords, so the Trainer itself has to scale the loss."""

    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize("cls", (GPT2LMHeadModel, Strict))
def test_it_asks_what_the_plain_model_is_asked(cls, tmp_path):
    theirs, ours = trainer(base(cls), tmp_path, Theirs), trainer(attach(base(cls), "lora", rank=4), tmp_path)
    theirs._set_signature_columns_if_needed()
    for name in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.model_accepts_loss_kwargs == (cls is not Strict)
    assert set(ours._signature_columns) == set(theirs._signature_columns)
