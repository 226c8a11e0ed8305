import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_trl.credit import PerPromptRunningMoments, temporal_advantages


GOLDEN = json.loads((Path(__file__).parents[1] / "data/golden/per_prompt_running_moments.json").read_text())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Running moments


def test_running_moments_golden():
    moments = PerPromptRunningMoments(GOLDEN["buffer_size"], GOLDEN["min_count"], GOLDEN["eps"])
    assert len(GOLDEN["calls"]) == 6
    for call in GOLDEN["calls"]:
        normalized = moments.normalize(call["prompts"], torch.tensor(call["rewards"], dtype=torch.float64))
        torch.testing.assert_close(normalized, torch.tensor(call["normalized"]), rtol=1e-5, atol=1e-5)


def test_running_moments_of_the_last_rewards():
    moments = PerPromptRunningMoments(buffer_size=3, min_count=2)
    first = moments.normalize(["a", "b"], torch.tensor([1.0, 5.0]))  # too few of both: the batch's moments
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))
    rewards = [2.0, 4.0, 9.0]
    second = moments.normalize(["a"] * 3, torch.tensor(rewards))  # the first one has gone
    torch.testing.assert_close(second.numpy(), ((rewards - np.mean(rewards)) / np.std(rewards)).astype("float32"))
    assert {prompt: list(buffer) for prompt, buffer in moments.buffers.items()} == {"a": rewards, "b": [5.0]}


def test_equal_rewards_give_zero():
    assert not PerPromptRunningMoments(min_count=1).normalize(["a"] * 4, torch.full((4,), 0.1)).any()


@pytest.mark.parametrize("sizes", [(8, 9), (8, 0), (0, 0)])
def test_running_moments_sizes(sizes):
    with pytest.raises(ValueError, match=rf"`min_count={sizes[1]}` does not work with `buffer_size={sizes[0]}`"):
        PerPromptRunningMoments(*sizes)


@pytest.mark.parametrize(
    "rewards, words",
    [([1.0], r"shape \(1,\) for 2 prompts"), ([1.0, math.nan], r"rewards\[1\]` is nan \(prompt 'b'\)")],
)
def test_running_moments_rewards(rewards, words):
    with pytest.raises(ValueError, match=words):
        PerPromptRunningMoments().normalize(["a", "b"], torch.tensor(rewards))


# Returns and advantages


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("penalized", [False, True])
def test_returns_and_advantages_by_a_loop(gamma, penalized):
    rewards, values, penalties = random(5), random(5, 4, seed=1), random(5, 4, seed=2)
    advantages, returns = temporal_advantages(
        rewards, values, gamma=gamma, step_penalties=penalties if penalized else None
    )
    expected = np.zeros((5, 4))
    for n in range(5):
        for t in range(4):
            for u in range(t, 4):
                earned = rewards[n].item() * (u == 3) - penalized * penalties[n, u].item()
                expected[n, t] += gamma ** (u - t) * earned
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)
    delta = expected - values.numpy()
    np.testing.assert_allclose(advantages, (delta - delta.mean()) / delta.std(), rtol=1e-4, atol=1e-5)
    assert advantages.dtype == returns.dtype == torch.float32


def test_the_returns_do_not_change_the_inputs():
    rewards, values, penalties = random(3), random(3, 2), random(3, 2)
    copies = [tensor.clone() for tensor in (rewards, values, penalties)]
    temporal_advantages(rewards, values, step_penalties=penalties)
    assert all(torch.equal(a, b) for a, b in zip(copies, (rewards, values, penalties), strict=True))


@pytest.mark.parametrize(
    "rewards, values, options, words",
    [
        ((3,), (2, 4), {}, r"`rewards` has shape \(3,\) and `values` \(2, 4\)"),
        ((3, 1), (3, 4), {}, r"\(3, 1\)"),
        ((3,), (3,), {}, r"`values` \(3,\)"),
        ((3,), (3, 4), {"step_penalties": torch.zeros(3, 1)}, r"`step_penalties` has shape \(3, 1\)"),
        ((3,), (3, 4), {"gamma": 1.1}, "`gamma` is 1.1"),
        ((3,), (3, 4), {"gamma": -0.1}, "`gamma` is -0.1"),
    ],
)
def test_bad_arguments(rewards, values, options, words):
    with pytest.raises(ValueError, match=words):
        temporal_advantages(torch.zeros(rewards), torch.zeros(values), **options)
