"""Control variates against plain loops, and what they promise: less variance, and no bias."""

import math

import numpy as np
import pytest
import torch

from flow_trl.credit import control_variate_rewards, control_variates, incremental_rewards


def completion_rewards(seed, groups=5, n=4, K=3):
    """Rewards (N, K + 1) of walks whose prompts differ, float64."""
    rng = np.random.default_rng(seed)
    walks = rng.normal(size=(groups * n, K + 1)).cumsum(1)
    return torch.tensor(walks + 10 * rng.normal(size=(groups, 1)).repeat(n, axis=0))


def slow_control_variates(rewards, n, outcome=False):
    """The method, a group, a step and an image at a time: step rewards, beta of each group, correlation of each step."""
    R = rewards.tolist()
    K, groups = len(R[0]) - 1, [range(first, first + n) for first in range(0, len(R), n)]

    def centred(i, k):
        group = groups[i // n]
        return R[i][k] - sum(R[j][k] for j in group) / n

    step_rewards, beta, correlation = np.zeros((len(R), K)), np.zeros((len(groups), K)), np.zeros(K)
    for k in range(1, K + 1):
        after = K if outcome else k
        for g, group in enumerate(groups):
            others = [j for other in groups if other != group for j in other]
            square = sum(centred(j, k - 1) ** 2 for j in others)
            if square > 0:
                beta[g, k - 1] = sum(centred(j, after) * centred(j, k - 1) for j in others) / square
            for i in group:
                step_rewards[i, k - 1] = R[i][after] - beta[g, k - 1] * R[i][k - 1]
        pairs = np.array([[centred(i, after), centred(i, k - 1)] for i in range(len(R))])
        correlation[k - 1] = (pairs[:, 0] @ pairs[:, 1]) / math.sqrt(
            (pairs[:, 0] ** 2).sum() * (pairs[:, 1] ** 2).sum()
        )
    return step_rewards, beta, correlation


@pytest.mark.parametrize("outcome", [False, True])
@pytest.mark.parametrize("groups, n, K", [(2, 2, 1), (3, 5, 4), (7, 3, 2)])
def test_against_a_loop(groups, n, K, outcome):
    for seed in range(5):
        rewards = completion_rewards(seed, groups, n, K)
        got = control_variates(rewards, n, outcome=outcome)
        step_rewards, beta, correlation = slow_control_variates(rewards, n, outcome)
        assert got.beta.shape == (groups, K) and got.correlation.shape == (K,)
        np.testing.assert_allclose(got.step_rewards, step_rewards, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.beta, beta, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.correlation, correlation, rtol=1e-9, atol=1e-9)
        assert torch.equal(control_variate_rewards(rewards, n, outcome=outcome), got.step_rewards)


def test_the_completion_s_reward_is_the_default():
    rewards = completion_rewards(0)
    assert torch.equal(control_variate_rewards(rewards, 4), control_variate_rewards(rewards, 4, outcome=False))
    assert not torch.allclose(control_variate_rewards(rewards, 4), control_variate_rewards(rewards, 4, outcome=True))


@pytest.mark.parametrize("outcome", [False, True])
def test_a_group_s_beta_is_left_to_the_others(outcome):
    rewards = completion_rewards(1)
    changed = rewards.clone()
    changed[4:8] = completion_rewards(2)[4:8]
    before, after = (control_variates(R, 4, outcome=outcome).beta for R in (rewards, changed))
    torch.testing.assert_close(before[1], after[1], rtol=1e-12, atol=1e-12)
    for g in (0, 2, 3, 4):
        assert (before[g] - after[g]).abs().min() > 1e-3


def test_levels_of_groups_do_nothing_to_beta():
    rewards = completion_rewards(3)
    levels = torch.tensor([0.0, 7.0, -300.0, 2.5, 1e4]).repeat_interleave(4)[:, None] * torch.tensor([1, -1, 2, 0.5])
    got, shifted = control_variates(rewards, 4), control_variates(rewards + levels, 4)
    torch.testing.assert_close(shifted.beta, got.beta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shifted.correlation, got.correlation, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_factors_scale_the_rewards_alone(factor):
    rewards = completion_rewards(4)
    got, scaled = control_variates(rewards, 4), control_variates(factor * rewards, 4)
    torch.testing.assert_close(scaled.step_rewards, factor * got.step_rewards)
    torch.testing.assert_close(scaled.beta, got.beta)


@pytest.mark.parametrize("outcome", [False, True])
def test_the_order_of_groups_and_within_them_does_not_matter(outcome):
    rewards, rng = completion_rewards(5), np.random.default_rng(0)
    groups = rng.permutation(5)
    order = np.concatenate([4 * g + rng.permutation(4) for g in groups])
    got, permuted = (control_variates(R, 4, outcome=outcome) for R in (rewards, rewards[order]))
    torch.testing.assert_close(permuted.step_rewards, got.step_rewards[order])
    torch.testing.assert_close(permuted.beta, got.beta[groups])
    torch.testing.assert_close(permuted.correlation, got.correlation)


# Where others say nothing


@pytest.mark.parametrize("outcome", [False, True])
def test_a_single_group_has_a_beta_of_0(outcome):
    rewards = completion_rewards(6, groups=1)
    got = control_variates(rewards, 4, outcome=outcome)
    assert not got.beta.any()
    assert torch.equal(got.step_rewards, rewards[:, -1:].expand(-1, 3) if outcome else rewards[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others_that_do_not_vary_leave_a_beta_of_0(dtype):
    rewards = completion_rewards(7, n=24).to(dtype)
    rewards[24:] = torch.tensor([0.1, 0.7, 1e6, -0.3], dtype=dtype)  # the mean of 24 times 0.1 is not 0.1
    got = control_variates(rewards, 24)
    assert not got.beta[0].any() and got.beta[1:].abs().min() > 0
    assert torch.equal(got.step_rewards[:24], rewards[:24, 1:])
    assert all(values.isfinite().all() for values in got)


def test_nothing_varies():
    got = control_variates(torch.full((8, 4), 0.1), 4)
    assert not got.beta.any() and not got.correlation.any()
    assert torch.equal(got.step_rewards, torch.full((8, 3), 0.1))


def test_steps_do_not_touch_each_other():
    rewards = completion_rewards(8)
    flat = rewards.clone()
    flat[:, 0] = 0.5  # the same start for all: only the first step loses its control variate
    got, without = control_variates(rewards, 4), control_variates(flat, 4)
    assert not without.beta[:, 0].any() and without.correlation[0] == 0
    assert torch.equal(without.beta[:, 1:], got.beta[:, 1:])
    assert torch.equal(without.step_rewards[:, 0], rewards[:, 1])


# Variance


def within(values, n):
    """Variance within groups, of each step."""
    groups = values.numpy().reshape(-1, n, *values.shape[1:])
    return ((groups - groups.mean(1, keepdims=True)) ** 2).mean((0, 1))


@pytest.mark.parametrize("outcome", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5, 0.8, 0.95, -0.6])
def test_variance_is_below_that_of_the_completion_and_of_the_increment(correlation, outcome):
    rng = np.random.default_rng(0)
    n, groups = 8, 200
    before = rng.normal(size=n * groups)
    after = correlation * before + math.sqrt(1 - correlation**2) * rng.normal(size=n * groups)
    level = 5 * rng.normal(size=groups).repeat(n)
    rewards = torch.tensor(np.stack([level + 3 * before, level + 2 * after], axis=1))
    if outcome:  # another completion in between, which must not matter
        rewards = torch.stack([rewards[:, 0], torch.tensor(rng.normal(size=n * groups)), rewards[:, 1]], dim=1)
    got = control_variates(rewards, n, outcome=outcome)
    y, R = within(got.step_rewards[:, 0], n), within(rewards[:, -1], n)
    increment = within(rewards[:, -1] - rewards[:, 0], n)
    share = 1 + 4 / (n * groups)  # what leaving the group out of its own coefficient costs
    assert y <= share * min(R, increment)
    assert y == pytest.approx((1 - got.correlation[0].item() ** 2) * R, rel=4 / (n * groups))
    assert got.correlation[0].item() == pytest.approx(correlation, abs=0.05)
    if not outcome:
        assert increment == pytest.approx(within(incremental_rewards(rewards), n)[0])
    if correlation in (0.8, -0.6):  # by far
        assert y < 0.7 * min(R, increment)


# Bias: the gradient of a step is the mean of its score, the noise, times the advantage


def noisy_walks(rng, groups, n):
    """Rewards (N, 3) and the noise (N, 2) of two steps; E[R_1 z_1] = E[R_2 z_1] = 1 and E[R_2 z_2] = 0.8."""
    u, z1, z2 = rng.normal(size=(3, groups * n))
    level = 3 * rng.normal(size=groups).repeat(n)
    R0 = level + u
    R1 = R0 + z1 * (1 + 0.5 * u)  # not linear, and with another noise for each image
    R2 = R1 + 0.8 * z2 * (1 + 0.5 * z1)
    return torch.tensor(np.stack([R0, R1, R2], axis=1)), np.stack([z1, z2], axis=1)


def own_beta(rewards, n, outcome, pooled):
    """The same with a coefficient from all groups, or from the group alone: what this must be better than."""
    R = rewards.numpy().reshape(-1, n, rewards.shape[1])
    after, before = R[:, :, -1:].repeat(R.shape[2] - 1, axis=2) if outcome else R[:, :, 1:], R[:, :, :-1]
    c_after, c_before = after - after.mean(1, keepdims=True), before - before.mean(1, keepdims=True)
    products, squares = (c_after * c_before).sum(1, keepdims=True), (c_before**2).sum(1, keepdims=True)
    if pooled:
        products, squares = products.sum(0, keepdims=True), squares.sum(0, keepdims=True)
    return (after - products / squares * before).reshape(len(rewards), -1)


@pytest.mark.parametrize("outcome", [False, True])
def test_the_expected_gradient_is_that_without_a_control_variate(outcome):
    groups, n, rng = 3, 4, np.random.default_rng(0)
    gradients = {"others": [], "outcome": [], "all": [], "own": []}
    for _ in range(4000):
        rewards, z = noisy_walks(rng, groups, n)
        credits = {
            "others": control_variate_rewards(rewards, n, outcome=outcome).numpy(),
            "outcome": rewards[:, -1:].numpy(),
            "all": own_beta(rewards, n, outcome, pooled=True),
            "own": own_beta(rewards, n, outcome, pooled=False),
        }
        for name, y in credits.items():
            A = y.reshape(groups, n, -1)
            A = A - A.mean(1, keepdims=True)
            gradients[name].append((A * z.reshape(groups, n, 2)).mean((0, 1)))
    means = {name: np.mean(values, axis=0) for name, values in gradients.items()}
    errors = {name: np.std(values, axis=0) / math.sqrt(4000) for name, values in gradients.items()}
    true = np.array([1.0, 0.8]) * (1 - 1 / n)  # an image is part of its group's mean
    deviation = {name: (means[name] - true) / errors[name] for name in means}
    assert np.abs(deviation["others"]).max() < 3
    assert np.abs(deviation["outcome"]).max() < 3
    # A coefficient that saw the step's own noise takes part of its effect away, and this test would notice
    assert deviation["all"].max() < -4 and deviation["own"].max() < -20
    assert (errors["others"] < errors["outcome"]).all()


# Types and errors


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)  # fmt: skip
def test_dtypes(dtype, expected):
    rewards = (10 * completion_rewards(9)).to(dtype)
    got = control_variates(rewards, 4)
    assert {values.dtype for values in got} == {expected}
    exact, _, _ = slow_control_variates(rewards.double(), 4)
    np.testing.assert_allclose(got.step_rewards.double(), exact, rtol=1e-5, atol=1e-4)


def test_float64_is_not_rounded():
    rewards = 1.0 + 1e-10 * completion_rewards(10)
    got = control_variates(rewards, 4)
    _, beta, _ = slow_control_variates(completion_rewards(10), 4)
    np.testing.assert_allclose(got.beta, beta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [control_variates, control_variate_rewards])
@pytest.mark.parametrize(
    ("rewards", "num_generations", "message"),
    [
        (torch.zeros(4), 2, r"`rewards` has shape \(4,\)"),
        (torch.zeros(4, 1), 2, r"`rewards` has shape \(4, 1\): .*K >= 1"),
        (torch.zeros(4, 3, 2), 2, r"`rewards` has shape \(4, 3, 2\)"),
        (torch.tensor([[0.0, 1.0], [2.0, math.nan]]), 2, r"`rewards\[1, 1\]` is nan"),
        (torch.tensor([[0.0, 1.0], [-math.inf, 0.0]]), 2, r"`rewards\[1, 0\]` is -inf"),
        (torch.zeros(4, 3), 1, "`num_generations` is 1: it must be at least 2"),
        (torch.zeros(4, 3), 0, "`num_generations` is 0: it must be at least 2"),
        (torch.zeros(9, 3), 4, "`num_generations` is 4: .* divide the 9 rows"),
        (torch.zeros(2, 3), 4, "`num_generations` is 4: .* divide the 2 rows"),
    ],
)
def test_errors(function, rewards, num_generations, message):
    with pytest.raises(ValueError, match=message):
        function(rewards, num_generations)
