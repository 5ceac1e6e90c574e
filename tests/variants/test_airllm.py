"""AirLLM: the channel and the reward, PPO's and DDIM's formulas on small numbers, and ranks that a policy chooses."""

import copy
import math

import pytest
import torch
from support import Net, Regression, adamw, attached, cloned, close, loss, perturb, train

from lorafactory import UserError, attach, export_lora, load, policy, registry
from lorafactory.variants.airllm import capacity, entropy

SMALL = {"episode": 3, "coarse": 3, "hidden": 8, "width": 8, "noise_steps": 10, "sampling": 2}
SMALL |= {"replay": 32, "warmup": 2, "batch": 4}
FAST = {"policy_lr": 0.3, "diffusion_lr": 0.3}
NARROW = {"bandwidth": [5e3]}  # ranks are sent or not
CHANGES = {
    "min_rank": ([3], {}),
    "snr": ([[7.0]], {}),
    "bandwidth": ([[1e5]], {}),
    "latency": ([1e-3], {}),
    "violation": ([3.0], NARROW),
    "clip": ([1e-4], {"policy_lr": 0.01}),
    "unknown_token": ([5], {}),
    "guidance": ([3.0], FAST),
    "drop": ([0.9], FAST),
    "replay": ([2], {}),
    "warmup": ([8], {}),
    "batch": ([2], {}),
    "sampling": ([5], {}),
}
INPUT = "input_ids"


def built(budget=None, **options):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached("airllm", base, data, **options, budget={**SMALL, **(budget or {})})


def part(adapted):
    return adapted.adapter.parts["budget"]


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def test_a_channel_carries_what_shannon_says():
    assert capacity(1e8, 10.0) == pytest.approx(345.9e6, rel=1e-3)
    _, _, adapted = built()
    p = part(adapted)
    p.channel.copy_(torch.tensor([0.0, 64.0]))  # 64 bits a second
    for ranks in ([1, 2, 3, 4], [2, 4, 6, 8]):
        p.sent.copy_(torch.tensor(ranks))
        sizes = [sum(s) + 1 for s in ((24, 40), (40, 24), (24, 24), (24, 8))]
        assert p.cost() == pytest.approx(sum(r * n for r, n in zip(ranks, sizes, strict=True)) / 2)


def test_the_entropy_of_tokens():
    """Two of one and one each of two others: 1.5 bits of log2 3."""
    assert entropy(torch.tensor([0, 1, 1, 0, 2])) == pytest.approx(1.5 / math.log2(3))
    assert entropy(torch.tensor([1, 1, 1, 1])) == pytest.approx(1.0) and entropy(torch.tensor([0, 5])) == 0


def test_it_starts_orthonormal_and_at_zero_and_only_sent_ranks_count():
    _, _, adapted = built(rank=6)
    p = part(adapted)
    for low in pairs(adapted):
        assert close(low.A @ low.A.T, torch.eye(6), 5) and close(low.B.T @ low.B, torch.eye(6), 5) and not low.gate.any()
    p.send(torch.tensor([1, 2, 6, 4]))
    perturb(adapted.adapter)
    for training in (True, False):
        adapted.train(training)
        for low, r in zip(pairs(adapted), (1, 2, 6, 4), strict=True):
            assert close(low.product(), low.scale * low.B[:, :r] @ torch.diag(low.gate[:r]) @ low.A[:r])


def test_the_penalty_is_of_what_is_sent():
    """B = 2 [e1 e2 ...], A orthonormal: |4 I - I|^2 = 9 r, averaged over the four pairs, times 0.01."""
    _, _, adapted = built()
    part(adapted).send(torch.tensor([1, 2, 3, 4]))
    with torch.no_grad():
        for low in pairs(adapted):
            low.B.mul_(2)
    assert float(adapted.penalty().detach()) == pytest.approx(0.01 * 9 * 10 / 4, rel=1e-4)


def test_ranks_as_vectors_and_back():
    _, _, adapted = built({"min_rank": 2}, rank=6, rank_pattern={"fc2": 3, "fc3": 1})
    p = part(adapted)
    ends = torch.ones(4)
    assert p.decode(-ends).tolist() == [2, 2, 1, 2] and p.decode(ends).tolist() == [6, 3, 1, 6]
    assert p.decode(0 * ends).tolist() == [4, 2, 1, 4], "floor"
    for ranks in ([2, 2, 1, 2], [5, 3, 1, 3]):
        z = p.encode(torch.tensor(ranks))
        assert z.abs().max() <= 1 and (p.decode(z) - torch.tensor(ranks)).abs().max() <= 1


def test_advantages_by_hand():
    """gamma 0.5, lambda 0.5: errors 0.25 - 0.5, 0.5 - 0.5 and 2 - 1, and a quarter of what follows. After an end, afresh."""
    rewards, values = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.5, 0.5, 1.0])
    ends = torch.tensor([0.0, 0.0, 1.0])
    assert policy.advantages(rewards, values, ends, 9.0, 0.5, 0.5).tolist() == [-0.25 + 0.25 * 0.25, 0.25, 1.0]
    cut = policy.advantages(rewards, values, torch.tensor([1.0, 0.0, 0.0]), 4.0, 0.5, 0.5)
    assert cut.tolist() == [-0.5, 0.75, 3.0]


def test_the_clipped_loss_by_hand():
    """Unit deviation and mean 0 now, mean 1 when it acted at 1: ratio e^-0.5, below 0.8. A gain above 0 counts with the
    ratio, one below 0 with the bound; value 0.5 (3 - 1)^2; entropy 0.01 x 1.4189."""
    action, zero = torch.ones(1, 1), torch.zeros(1, 1)
    old = policy.log_prob(action, torch.ones(1, 1), torch.zeros(1))
    for gain, counted in ((2.0, math.exp(-0.5)), (-2.0, 0.8)):
        found = policy.ppo_loss((zero, torch.zeros(1), torch.tensor([3.0])), action, old, torch.tensor([gain]),
                                torch.tensor([1.0]), 0.2)  # fmt: skip
        assert float(found) == pytest.approx(2.0 - gain * counted - 0.01 * 1.418939)


def test_a_step_of_ddim_by_hand():
    """Of z = 0.5, noise 0.25, signal 0.36: clean (0.5 - 0.8 x 0.25) / 0.6 = 0.5; to 0.64: 0.8 x 0.5 + 0.6 x 0.25."""
    z, noise, kept = torch.tensor([[0.5, 5.0]]), torch.tensor([[0.25, 0.25]]), torch.tensor(0.36)
    assert torch.allclose(policy.ddim_step(z, noise, kept, torch.tensor(0.64)), torch.tensor([[0.55, 0.95]]))
    assert torch.allclose(policy.ddim_step(z, noise, kept, None), torch.tensor([[0.5, 1.0]])), "kept within [-1, 1]"


def test_the_noise_goes_as_squares_of_a_line_and_its_own_noise_leads_back():
    kept = policy.kept_signal(1000, torch.device("cpu"))
    assert float(kept[0]) == pytest.approx(1 - 1e-4) and float(kept[1] / kept[0]) == pytest.approx(
        1 - (0.01 + (2e-2**0.5 - 0.01) / 999) ** 2
    )
    clean, noise = torch.rand(3, 4) - 0.5, torch.randn(3, 4)
    z = kept[500].sqrt() * clean + (1 - kept[500]).sqrt() * noise
    assert close(policy.ddim_step(z, noise, kept[500], kept[200]), kept[200].sqrt() * clean + (1 - kept[200]).sqrt() * noise)
    torch.manual_seed(0)
    found = policy.ddim_sample(lambda z, t, c: (z - kept[t][:, None].sqrt() * 0.3) / (1 - kept[t][:, None]).sqrt(),
                               torch.zeros(2, 3), 4, 1000, 20, 1.5)  # fmt: skip
    assert torch.allclose(found, torch.full((2, 4), 0.3), atol=1e-3), "who knows the noise finds what is clean"


def test_guidance_of_1_is_the_conditional_model():
    net = policy.Denoiser(4, 3, 8)
    z, t, c = torch.randn(2, 4), torch.tensor([3, 7]), torch.randn(2, 3)
    assert close(policy.guided(net, z, t, c, 1.0), net(z, t, c))
    assert close(policy.guided(net, z, t, c, 0.0), net(z, t, 0 * c))


def test_what_earned_more_counts_more():
    """Rewards 1 and 3 are -1 and 1 standardised: with weight 0.5 errors 1 and 4 count 0.5 and 1.5."""
    found = policy.ddim_loss(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), torch.tensor([1.0, 3.0]), 0.5)
    assert float(found) == pytest.approx((0.5 * 1 + 1.5 * 4) / 2, rel=1e-4)


def test_a_learner_steps_as_adam_and_is_no_parameter():
    torch.manual_seed(0)
    net = policy.ActorCritic(3, 2, 5)
    learner = policy.Learner(copy.deepcopy(net), 0.01, torch.device("cpu"))
    assert not list(learner.parameters())
    optimizer, x = torch.optim.Adam(net.parameters(), 0.01), torch.randn(4, 3)
    for _ in range(5):
        optimizer.zero_grad()
        sum(t.square().sum() for t in net(x)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        learner.step(lambda out: sum(t.square().sum() for t in out), x)
    assert all(close(a, b) for a, b in zip(learner(x), net(x), strict=True))


def test_a_step_that_sends_too_much_trains_nothing():
    _, data, adapted = built({"bandwidth": [1.0]})
    before = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters()}
    costs = []
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6, watch=lambda i: costs.append(part(adapted).cost()))
    assert all(torch.equal(p, before[n]) for n, p in adapted.adapter.named_parameters())
    assert part(adapted).counters()["violations"] == 6
    assert part(adapted).memory[:6, -1].tolist() == pytest.approx([-10.1 * c for c in costs], rel=1e-4)


def test_the_reward_is_the_loss_and_what_was_sent():
    _, data, adapted = built()
    costs = []
    losses = train(adapted, data, adapted.optimizer(adamw, 6), steps=6, watch=lambda i: costs.append(part(adapted).cost()))
    want = [-task - 0.1 * c for task, c in zip(losses, costs, strict=True)]
    assert part(adapted).memory[:6, -1].tolist() == pytest.approx(want, rel=1e-4)
    assert part(adapted).counters() | {"ranks_sent": 0} == {"episodes": 2, "violations": 0, "ranks_sent": 0, "diffusion_steps": 8}


def test_a_loop_that_tells_no_loss_has_it_measured():
    _, data, adapted = built()
    optimizer = adapted.optimizer(adamw, 3)
    task = loss(adapted, data(1)[0])
    (task + adapted.penalty()).backward()
    cost = part(adapted).cost()
    optimizer.step()
    assert float(part(adapted).memory[0, -1]) == pytest.approx(-float(task.detach()) - 0.1 * cost, rel=1e-4)
    bare = attach(Net(), "airllm", rank=4, budget=SMALL)
    optimizer = bare.optimizer(adamw, 3)
    (loss(bare, data(1)[0]) + bare.penalty()).backward()
    with pytest.raises(UserError, match="rewards its policy by the loss"):
        optimizer.step()


def test_it_reads_the_batch_and_the_channel():
    _, data, adapted = built({"unknown_token": 9, "snr": [0.0, 10.0]})
    p = part(adapted)
    ids, mask = torch.tensor([[7, 7, 1], [2, 9, 9]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    adapted.adapter.before_forward({INPUT: ids, "attention_mask": mask})
    adapted.adapter.before_forward({INPUT: torch.tensor([[9, 9]])})
    adapted.eval()
    adapted.adapter.before_forward({INPUT: torch.tensor([[9, 9]])})
    adapted.train()
    (loss(adapted, data(1)[0]) + adapted.penalty()).backward()
    adapted.optimizer(adamw, 2).step()
    assert p.text.tolist() == pytest.approx([(2 / 3 * math.log2(3) + 1 / 3 * math.log2(6)) / 2, 1 / 3])
    with pytest.raises(UserError, match="unknown_token=9 has no meaning"):
        adapted.adapter.before_forward({"x": ids})
    p.channel.copy_(torch.tensor([10.0, 1e8]))
    assert p.state()[0, :2].tolist() == [1.0, 0.5]
    assert p.state()[0, 4:].tolist() == [r / 4 for r in p.sent.tolist()]


def test_the_policy_learns_what_pays():
    """Where only violations differ, it comes to send little: rewards of the last steps are above those of the first."""
    torch.manual_seed(0)
    _, data, adapted = built({**FAST, "policy_lr": 0.02, "diffusion_lr": 0.01, "bandwidth": [3e3], "snr": [0.0], "episode": 8,
                              "replay": 500, "batch": 32, "updates": 8, "hidden": 16, "width": 32, "reward_weight": 1.0,
                              "sampling": 5})  # fmt: skip
    p, steps = part(adapted), 240
    train(adapted, data, adapted.optimizer(adamw, steps), steps=steps)
    rewards = p.memory[:steps, -1]
    assert rewards[-60:].mean() > rewards[:60].mean() + 2


def test_the_end_keeps_what_was_sent_last_as_a_plain_lora(tmp_path):
    base, data, adapted = built()
    train(adapted, data, adapted.optimizer(adamw, 7), steps=7)
    x, sent = torch.randn(3, 24), part(adapted).sent.tolist()
    assert sent != [4] * 4
    y = adapted(x)
    assert not adapted.end() and close(adapted(x), y)
    assert [low.rank for low in pairs(adapted)] == sent and all(low.mask is None for low in pairs(adapted))
    assert set(export_lora(adapted, tmp_path / "lora").values()) == {0.0}
    assert close(load(copy.deepcopy(base), tmp_path / "lora")(x), y)


def test_a_mask_comes_back_with_a_checkpoint(tmp_path):
    base, data, adapted = built()
    train(adapted, data, adapted.optimizer(adamw, 7), steps=4)
    adapted.save(tmp_path / "a")
    again = load(copy.deepcopy(base), tmp_path / "a")
    x = torch.randn(3, 24)
    assert torch.equal(again(x), adapted(x)) and any(low.mask is not None for low in pairs(again))
    before = cloned(adapted.adapter.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in again.adapter.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bandwidth": []}, "at least one"), ({"bandwidth": [0.0]}, "bandwidth is 0.0"), ({"gamma": 1.5}, "in \\[0, 1\\]"),
     ({"sampling": 2000}, "of noise_steps=1000"), ({"warmup": 20000}, "never holds"), ({"drop": 1.0}, "drop is 1.0"),
     ({"latency": 0.0}, "latency is 0.0"), ({"episode": 0}, "at least 1"), ({"cost": -1.0}, "at least 0")],
)  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("airllm", budget=options)


def test_a_least_rank_that_no_pair_has_is_refused():
    with pytest.raises(UserError, match="min_rank is 9"):
        attach(Net(), "airllm", rank=8, budget={**SMALL, "min_rank": 9})
