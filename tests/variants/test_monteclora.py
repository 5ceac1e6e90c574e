import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, perturb, roberta_base, same, train
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence

from lorafactory import UserError, attach, checkpoint, registry
from lorafactory.variants import monteclora

SMALL = {"size": 0.05, "kl_weight": 1e-3}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="monteclora", rank=3, **posterior):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    options = {"posterior": {**SMALL, **posterior}} if "monteclora" in variant else {}
    return attached(variant, base, data, rank=rank, target_modules=TARGETS, **options), data


def clouds(adapted):
    return list(adapted.adapter.parts["posterior"].clouds)


def cloud(**options):
    adapted, _ = setting(**options)
    return clouds(adapted)[0]


def test_zero_update_at_the_start_even_in_training():
    adapted, _ = setting()
    x = torch.randn(5, 24, dtype=torch.float64)
    with adapted.disabled() as model:
        want = model(x)
    assert torch.equal(adapted.train()(x), want)


def test_evaluation_takes_the_mean_and_training_draws():
    adapted, data = setting()
    lora, _ = setting("lora")
    perturb(adapted.adapter, 0.3)
    lora.adapter.load({n: t for n, t in adapted.adapter.state_dict().items() if n.startswith("deltas.")})
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(adapted.eval()(x), lora.eval()(x)) and torch.equal(adapted(x), adapted(x))
    adapted.train()
    assert not close(adapted(x), lora(x), 1e3) and not torch.equal(adapted(x), adapted(x))
    adapted.adapter.before_forward({})
    assert torch.equal(adapted(x), adapted(x)), "one draw a batch, where the batch is told"
    with torch.no_grad():
        adapted.adapter.parts["posterior"].forget()
        assert torch.equal(adapted(x), lora(x)), "without gradients nothing trains"


def test_without_noise_and_penalty_it_is_lora():
    adapted, data = setting(size=0.0, kl_weight=0.0, entropy=False)
    lora, _ = setting("lora")
    losses = [train(m, data, m.optimizer(adamw, 5), steps=5) for m in (adapted, lora)]
    assert losses[0] == losses[1] and not adapted.adapter.has_penalty


def test_moments_of_the_draws():
    """The mean is zero; the variance of row i is size^2 E[sum pi^2] rank exp(2 tau_i), a chi2(rank) having mean rank."""
    c = cloud(size=0.5)
    with torch.no_grad():
        c.tau.copy_(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        c.kappa.fill_(6.0)  # weights are nearly even: 1/4 each
        drawn = torch.stack([c.draw() for _ in range(3000)])
    variance = 0.25 * 0.25 * 3 * (2 * c.tau.detach()).exp()
    found = drawn.square().mean((0, 2))
    assert torch.allclose(found, variance, rtol=0.1)
    assert drawn.mean(0).abs().max() < 5 * (variance.max() / 3000).sqrt()


def test_the_variance_is_that_of_a_wishart():
    """Its diagonal under D = diag(exp tau), against torch's own sampler."""
    c = cloud()
    with torch.no_grad():
        c.tau.copy_(torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64))
        ours = []
        for _ in range(4000):
            c.draw()
            ours.append(c.sigma)
        d = torch.diag(c.tau.exp())
    theirs = Wishart(3.0, scale_tril=torch.eye(3, dtype=torch.float64)).sample((4000,))
    theirs = (d @ theirs @ d).diagonal(dim1=-2, dim2=-1)
    ours = torch.stack(ours)
    assert torch.allclose(ours.mean(0), theirs.mean(0), rtol=0.08) and torch.allclose(ours.std(0), theirs.std(0), rtol=0.12)
    assert abs(float(torch.corrcoef(ours.T)[0, 1])) < 0.06


def test_weights_are_a_distribution_near_the_dirichlet():
    c = cloud(experts=3)
    with torch.no_grad():
        c.kappa.copy_(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        found = []
        for _ in range(4000):
            c.draw()
            found.append(c.pi)
    found = torch.stack(found)
    assert close(found.sum(1), torch.ones(4000, dtype=torch.float64)) and found.min() >= 0
    assert torch.allclose(found.mean(0), Dirichlet(c.kappa.detach().exp()).mean, atol=0.02)


def test_by_hand():
    """size 2, Sigma = diag(4), weights (1/2, 1/2): the noise is 2 sqrt(1/2) 2 times a standard normal; twice: 4."""
    for double, want in ((False, 2 * 0.5**0.5 * 2), (True, 4 * 0.5**0.5 * 2)):
        c = cloud(experts=2, size=2.0, double_size=double)
        with torch.no_grad():
            c.kappa.fill_(20.0)  # no variance: even weights
            torch.manual_seed(3)
            noise = c.draw()
            torch.manual_seed(3)
            torch.randn(3, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
            plain = torch.randn(3, 24, dtype=torch.float64)
        assert torch.allclose(noise, want / 2 * c.sigma.sqrt()[:, None] * plain, rtol=1e-4)


def test_divergences_are_torchs_own_and_zero_at_the_prior():
    alpha, prior = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64), torch.full((3,), 1.5, dtype=torch.float64)
    assert close(monteclora.dirichlet_kl(alpha, 1.5), kl_divergence(Dirichlet(alpha), Dirichlet(prior)))
    assert abs(float(monteclora.dirichlet_kl(prior, 1.5))) < 1e-12
    official = monteclora.dirichlet_kl(alpha, 1.5, official=True)
    assert close(official - monteclora.dirichlet_kl(alpha, 1.5), 2 * (alpha.lgamma() - prior.lgamma()).sum())
    tau = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)
    theirs = [Wishart(3.0, scale_tril=torch.diag(t.exp())) for t in (tau, 0 * tau)]
    assert close(monteclora.wishart_kl(tau), kl_divergence(*theirs)) and float(monteclora.wishart_kl(0 * tau)) == 0
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    normals = [MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.diag(s)) for s in (sigma, torch.ones_like(sigma))]
    assert close(monteclora.normal_kl(sigma, 4), 4 * kl_divergence(*normals))
    assert float(monteclora.normal_kl(torch.ones(3), 4)) == 0


def test_the_penalty_is_the_mean_over_pairs():
    adapted, data = setting(kl_weight=0.5)
    adapted.adapter.before_forward({})
    want = 0.0
    for c in clouds(adapted):
        kl = monteclora.dirichlet_kl(c.kappa.exp(), 1.0) + monteclora.wishart_kl(c.tau) + monteclora.normal_kl(c.sigma, 4)
        want = want + (0.5 * kl + c.pi.square().sum()) / 3
    assert close(adapted.penalty(), want)
    for options in ({"entropy": False}, {"kl_weight": 0.0}):
        other, _ = setting(**{"kl_weight": 0.5, **options})
        other.adapter.before_forward({})
        assert not close(other.penalty(), want)


def test_the_task_reaches_scale_and_concentration():
    """Through the draw alone, once B is away from zero."""
    adapted, data = setting(kl_weight=0.0, entropy=False)
    for reached in (False, True):
        adapted.adapter.before_forward({})
        loss(adapted, data(1)[0]).backward()
        assert all(bool(p.grad.any()) == reached for c in clouds(adapted) for p in (c.tau, c.kappa))
        adapted.zero_grad()
        perturb(adapted.adapter, 0.3)


def test_drawn_is_one_draw_for_all_batches_and_goes_away():
    adapted, _ = setting(samples=2)
    perturb(adapted.adapter, 0.3)
    adapted.eval()
    x, part = torch.randn(5, 24, dtype=torch.float64), adapted.adapter.posterior
    mean = adapted(x)
    found = []
    for _ in range(2):
        with part.drawn(), torch.no_grad():
            found += [adapted(x)]
            adapted.adapter.before_forward({})
            assert torch.equal(adapted(x), found[-1])
    assert not torch.equal(*found) and not torch.equal(found[0], mean) and torch.equal(adapted(x), mean)
    assert part.samples == 2


def test_ranks_that_go_take_their_scales_along(tmp_path):
    adapted, data = setting()
    c = clouds(adapted)[0]
    before = c.tau.detach().clone()
    c.low.keep(torch.tensor([0, 2]))
    assert torch.equal(c.tau, before[[0, 2]]) and c.tau.requires_grad
    train(adapted, data, adapted.optimizer(adamw, 2), steps=2)
    checkpoint.save(adapted, tmp_path / "a")
    again, _ = setting()
    checkpoint.restore(again, tmp_path / "a")
    assert same(again.adapter.state_dict(), adapted.adapter.state_dict()) and len(clouds(again)[0].tau) == 2


def test_a_scale_of_another_length_than_the_rank_is_refused():
    adapted, _ = setting()
    state = adapted.adapter.state_dict()
    state["parts.posterior.clouds.1.tau"] = torch.ones(4, dtype=torch.float64)
    with pytest.raises(UserError, match=r"clouds.1.tau is \[4\], not \[3\]"):
        adapted.adapter.load(state)


def test_a_copy_draws_for_itself():
    adapted, data = setting()
    perturb(adapted.adapter, 0.3)
    adapted.adapter.before_forward({})
    loss(adapted, data(1)[0])
    twin = copy.deepcopy(adapted)
    assert all(c.sigma is None and c.fixed is None for c in clouds(twin))
    assert all(c.low is low for c, (_, low) in zip(clouds(twin), twin.adapter.low_ranks(), strict=True))
    assert all(low.noise is c for c, (_, low) in zip(clouds(twin), twin.adapter.low_ranks(), strict=True))


def test_resume(tmp_path):
    straight, data = setting()
    want = train(straight, data, straight.optimizer(adamw, 6), steps=6)
    first, _ = setting()
    optimizer = first.optimizer(adamw, 6)
    assert train(first, data, optimizer, steps=3) == want[:3]
    checkpoint.save(first, tmp_path / "a", {"step": 3}, optimizer)
    again, _ = setting()
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 6)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=3, steps=6) == want[3:]
    assert again.adapter.counters()["drawn_steps"] == 6


def test_count():
    """The card's: 12,288 + 12 for a layer of 768 by 768 at rank 8, N = 4."""
    options = {"target_modules": ["query"], "trained_modules": ["classifier"]}
    adapted = attach(copy.deepcopy(roberta_base()), "monteclora", rank=8, **options)
    assert adapted.cost()["adapter_parameters"] == 12 * (12288 + 12)


def test_an_axis_of_its_own():
    assert registry.spell(registry.config("monteclora+pissa+lora_plus")) == "pissa+lora_plus+monteclora"
    config = registry.config("lora")
    assert not config.posterior.name and type(config.posterior) is registry.PosteriorConfig


WRONG = [{"experts": 1}, {"size": -1.0}, {"kl_weight": -1.0}, {"samples": -1}, {"prior": 0.0}]


@pytest.mark.parametrize("wrong", [*WRONG, {"kl_weight": 0.0, "prior": 2.0}, {"kl_weight": 0.0, "official_kl": True}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        setting(**wrong)


def test_equal_to_peft():
    """Its KL terms with their sign, its mixture weights and variances on the same normal draws, its noise on average."""
    pytest.importorskip("peft", reason="needs PEFT to compare with")
    sampling = pytest.importorskip("peft.tuners.lora.monteclora", reason="this PEFT has no MonteCLoRA")
    options = {"sample_scaler": 0.3, "kl_loss_weight": 1.0, "dirichlet_prior": 1.5, "device": "cpu"}
    theirs = sampling.MontecloraSampler(24, 3, 5, buffer_size=500, dtype=torch.float64, **options).train()
    c = cloud(experts=5, size=0.3, kl_weight=1.0, prior=1.5, official_kl=True)
    with torch.no_grad():
        c.tau.copy_(theirs.std_prior)
        c.kappa.copy_(theirs.expert_weights_prior)
        ours = torch.stack([c.draw() for _ in range(2000)])
        found = [theirs() for _ in range(2000)]
        drawn = torch.stack([torch.einsum("n,nij->ji", w, v) for v, w in found])
    alpha = c.kappa.exp().detach()
    assert close(monteclora.dirichlet_kl(alpha, 1.5, True), theirs.dirichlet_kl(alpha), 1e5)  # they take float32
    assert close(monteclora.wishart_kl(c.tau), theirs.wishart_kl(torch.diag(c.tau.exp())))
    z = torch.randn(5, dtype=torch.float64)
    weights = monteclora.logistic_mean(alpha) + monteclora.logistic_variance(alpha).sqrt() * z
    assert torch.allclose(weights, theirs.dirichlet_reparameterization(alpha, z), atol=1e-5)  # 1e-6 more on their variance
    assert torch.allclose(ours.std((0, 2)), drawn.std((0, 2)), rtol=0.05)
