"""MatryoshkaLoRA: the sum of truncations as one diagonal, what is left after training, and the curve over ranks."""

import copy
import json

import pytest
import torch
from runs import configured
from support import Net, Regression, adamw, attached, begun, close, loss, perturb, train

from lorafactory import UserError, attach, export_lora, load, registry
from lorafactory.evaluate import aurac
from lorafactory.run import run

CHANGES = {"ranks": ([[4], [2, 4]], {}), "keep": ([2], {}), "scored": ([[1]], {}), "scaling": (["rank"], {})}


def built(spelling="matryoshka_lora", **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, **options)


def part(adapted):
    return adapted.adapter.parts["budget"]


def test_the_diagonal_is_the_papers():
    """R = 4, S = {1, 2, 4}, 1 / sqrt(r): [1 + 0.7071 + 0.5, 0.7071 + 0.5, 0.5, 0.5]; alpha 2 makes s_4 = 1 / sqrt 4."""
    _, _, adapted = built(rank=4, alpha=2.0)
    for _, low in adapted.adapter.low_ranks():
        assert torch.allclose(low.scale * low.mask, torch.tensor([2.2071, 1.2071, 0.5, 0.5]), atol=1e-4)


@pytest.mark.parametrize("scaling", ["rank", "sqrt", "none"])
def test_it_trains_the_sum_of_its_truncations(scaling):
    """Their masked form times the number of ranks, with a pair of a lower rank that has all of it in the larger ones."""
    sigma = {"rank": lambda r: 1 / r, "sqrt": lambda r: r**-0.5, "none": lambda r: 1}[scaling]
    _, _, adapted = built(rank=4, rank_pattern={"fc2": 3}, budget={"scaling": scaling, "ranks": [1, 2, 4]})
    perturb(adapted.adapter)
    for site, low in adapted.adapter.low_ranks():
        assert low.rank == (3 if site.name == "fc2" else 4)
        s, x = float(low.scale) / sigma(low.rank), torch.randn(5, low.A.shape[1])
        want = sum(s * sigma(min(r, low.rank)) * (low.B[:, :r] @ low.A[:r]) for r in (1, 2, 4))
        assert close(low(x), x @ want.T) and close(low.product(), want)
        low.eval()
        assert close(low.product(), low.scale * low.B @ low.A), "P is of training alone"


def test_the_whole_rank_alone_is_lora():
    """Bit for bit, the training included."""
    outputs = []
    for spelling, options in (("lora", {}), ("matryoshka_lora", {"budget": {"ranks": [4]}})):
        _, data, adapted = built(spelling, **options)
        losses = train(adapted, data, adapted.optimizer(adamw, 8), steps=8)
        adapted.end()
        outputs.append((losses, [t.tolist() for n, t in adapted.adapter.export().items()]))
    assert outputs[0] == outputs[1]


def test_every_truncation_is_its_first_ranks_and_leaves_no_trace():
    base, data, adapted = built()
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    adapted.end()
    pairs = dict(adapted.adapter.low_ranks())
    kept = {s.name: (low, low.A, low.B, low.A.detach().clone(), float(low.scale)) for s, low in pairs.items()}
    cuts = adapted.adapter.truncations()
    assert sorted(cuts) == [1, 2, 4]
    for r, cut in cuts.items():
        with adapted.adapter.tried(cut):
            for low, a, b, _, s in kept.values():
                want = s * (r**-0.5 / 4**-0.5) * b[:, :r] @ a[:r]
                assert low.rank == r and close(low.product(), want)
        for low, a, b, values, s in kept.values():
            assert low.A is a and low.B is b and torch.equal(a, values) and float(low.scale) == s


def test_what_is_kept_is_a_plain_lora(tmp_path):
    base, data, adapted = built(budget={"ranks": [1, 2, 4], "keep": 2}, rank_pattern={"fc3": 1})
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    whole = {s.name: (low.B.detach(), low.A.detach(), float(low.scale)) for s, low in adapted.adapter.low_ranks()}
    assert adapted.end()
    for site, low in adapted.adapter.low_ranks():
        b, a, s = whole[site.name]
        r = 1 if site.name == "fc3" else 2
        assert low.rank == r and close(low.product(), s * (r / len(a)) ** -0.5 * b[:, :r] @ a[:r])
    x = torch.randn(3, 24)
    y = adapted(x)
    assert sorted(adapted.adapter.truncations()) == [1, 2]
    errors = export_lora(adapted, tmp_path / "lora")
    assert set(errors.values()) == {0.0}
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert close(load(copy.deepcopy(base), tmp_path / "lora")(x), y)
    adapted.save(tmp_path / "ours")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "ours")(x), y)


def test_a_second_stage_nests_what_is_left():
    _, data, adapted = built(budget={"keep": 2})
    train(adapted, data, adapted.optimizer(adamw, 3), steps=3)
    adapted.end()
    begun(adapted, data, 1)
    assert all(len(low.mask) == 2 for _, low in adapted.adapter.low_ranks())


def test_a_run_scores_every_truncation(tmp_path):
    options = ("variant=matryoshka_lora", "variant.rank=4", "variant.budget.scored=[1,3,4]", f"results.folder={tmp_path}")
    metrics = run(configured(*options)).record["metrics"]
    assert list(metrics["truncations"]) == ["1", "3", "4"]
    for split in ("selection", "test"):
        curve = {int(r): m[split]["accuracy"] for r, m in metrics["truncations"].items()}
        assert metrics["truncations"]["4"][split]["accuracy"] == metrics[split]["accuracy"], "the whole is the adapter itself"
        assert metrics[split]["aurac_log"] == pytest.approx(aurac(curve)["aurac_log"])
    assert "truncations" not in run(configured("variant=lora", f"results.folder={tmp_path}")).record["metrics"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ranks": [0, 2]}, "different ranks, from 1"), ({"ranks": [2, 2]}, "different ranks"), ({"ranks": []}, "nothing would"),
     ({"scored": [0]}, "different ranks"), ({"keep": 0}, "at least 1"), ({"scaling": "log"}, "rank, sqrt, none")],
)  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("matryoshka_lora", budget=options)


@pytest.mark.parametrize("options", [{"ranks": [1, 16]}, {"keep": 9}, {"scored": [9]}])
def test_ranks_that_no_pair_has_are_refused(options):
    with pytest.raises(UserError, match="no pair has more than 8 ranks"):
        attach(Net(), "matryoshka_lora", rank=8, budget=options)


@pytest.mark.parametrize("other", ["relora", "lora_pro"])
def test_what_takes_the_pair_for_the_update_is_refused(other):
    with pytest.raises(UserError, match="trains truncations"):
        registry.config(f"matryoshka_lora+{other}")


def test_rslora_with_alpha_1_is_the_authors_scale():
    _, data, adapted = built("matryoshka_lora+rslora", rank=4, alpha=1.0)
    assert all(float(low.scale) == pytest.approx(0.5) for _, low in adapted.adapter.low_ranks())
    assert torch.isfinite(loss(adapted, data(1)[0]))
