import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from flow_trl.credit import incremental_rewards, turning_point_rewards


CASES = json.loads((Path(__file__).parents[1] / "data/golden/turning_point_rewards.json").read_text())["cases"]
VARIANTS = list(itertools.product([True, False], [True, False]))


@pytest.mark.parametrize("variant", sorted({case["variant"] for case in CASES}))
def test_golden(variant):
    for case in CASES:
        if case["variant"] == variant:
            step_rewards, aggregated = turning_point_rewards(
                torch.tensor(case["rewards"], dtype=torch.float64),
                consistent=variant.startswith("consistent"),
                balance=variant.endswith("_balanced"),
            )
            assert aggregated.tolist() == case["aggregated"]
            expected = torch.tensor(case["step_rewards"], dtype=torch.float64)
            torch.testing.assert_close(step_rewards, expected, rtol=0, atol=1e-6)


def sign(value):
    return (value > 0) - (value < 0)


def slow_turning_point_rewards(rewards, consistent, balance):
    """The method, a sample and a step at a time."""
    counted = []  # (D, sample, step), in order
    for i, R in enumerate(rewards):
        K = len(R) - 1
        D = R[K] - R[0]
        r = [None] + [R[k] - R[k - 1] for k in range(1, K + 1)]
        for k in range(1, K + 1):
            if k == 1:
                counts = sign(r[1]) * sign(R[K] - R[1]) > 0 if consistent else sign(r[1]) * sign(D) > 0
            else:
                counts = sign(r[k - 1]) * sign(D) < 0 and sign(r[k]) * sign(D) > 0
                if consistent:
                    counts = counts and sign(r[k]) * sign(R[K] - R[k]) > 0
            if counts:
                counted.append((D, i, k))
    if balance:
        up = sorted((-abs(D), i, k) for D, i, k in counted if D > 0)
        down = sorted((-abs(D), i, k) for D, i, k in counted if D < 0)
        if up and down:
            smaller = min(len(up), len(down))
            counted = up[:smaller] + down[:smaller]
    kept = {(i, k) for _, i, k in counted}
    step_rewards = [
        [R[-1] - R[k - 1] if (i, k) in kept else R[k] - R[k - 1] for k in range(1, len(R))]
        for i, R in enumerate(rewards)
    ]
    return step_rewards, [[(i, k) in kept for k in range(1, len(R))] for i, R in enumerate(rewards)]


def integer_rewards(K, seed, N=12):
    return torch.randint(-2, 3, (N, K + 1), generator=torch.Generator().manual_seed(seed))  # many zeros and ties


@pytest.mark.parametrize(("consistent", "balance"), VARIANTS)
@pytest.mark.parametrize("K", range(1, 10))
def test_against_a_slow_reference(K, consistent, balance):
    for seed in range(60):
        rewards = integer_rewards(K, seed, N=1 + seed % 17)
        step_rewards, aggregated = turning_point_rewards(rewards, consistent=consistent, balance=balance)
        expected_rewards, expected_aggregated = slow_turning_point_rewards(rewards.tolist(), consistent, balance)
        assert step_rewards.tolist() == expected_rewards
        assert aggregated.tolist() == expected_aggregated


def test_the_paper_s_method_is_the_default():
    for seed in range(20):
        rewards = integer_rewards(5, seed)
        got = turning_point_rewards(rewards)
        expected = turning_point_rewards(rewards, consistent=True, balance=True)
        assert torch.equal(got.step_rewards, expected.step_rewards)
        assert torch.equal(got.aggregated, expected.aggregated)


def test_ties_at_the_cut_go_to_the_earlier_sample_then_the_earlier_step():
    up = [0, 1, 0, 2, 1, 3]  # counts at steps 1 and 3, D = 3
    down = [0, -1, -3]  # counts at step 1
    rewards = torch.tensor([up, up, [*down, -3, -3, -3]])
    assert turning_point_rewards(rewards, balance=False).aggregated.nonzero().tolist() == [
        [0, 0],
        [0, 2],
        [1, 0],
        [1, 2],
        [2, 0],
    ]
    assert turning_point_rewards(rewards).aggregated.nonzero().tolist() == [[0, 0], [2, 0]]
    two_down = torch.cat([rewards, rewards[2:]])
    assert turning_point_rewards(two_down).aggregated.nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [3, 0]]


def test_balancing_keeps_the_largest_changes():
    rewards = torch.tensor([[0, 1, 2], [0, 1, 4], [0, 1, 3], [0, -1, -2]])
    assert turning_point_rewards(rewards).aggregated[:, 0].tolist() == [False, True, False, True]


def test_balancing_keeps_all_if_only_one_kind_occurs():
    rewards = torch.tensor([[0, 1, 2], [0, 1, 4]])
    assert turning_point_rewards(rewards).aggregated[:, 0].tolist() == [True, True]


def test_an_aggregated_zero_is_assigned():
    # Unconstrained, step 3 turns the trend, but all after it undoes it: R_K - R_2 = 0.
    rewards = torch.tensor([[0, 2, 1, 3, 1]])
    got = turning_point_rewards(rewards, consistent=False)
    assert got.aggregated.tolist() == [[True, False, True, False]]
    assert got.step_rewards.tolist() == [[1, -1, 0, -2]]


def test_a_consistent_aggregate_exceeds_the_step_s_own_reward():
    rewards = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = turning_point_rewards(rewards)
    r, y = incremental_rewards(rewards)[got.aggregated], got.step_rewards[got.aggregated]
    assert len(y) > 50 and (y.sign() == r.sign()).all() and (y.abs() > r.abs()).all()


@pytest.mark.parametrize(("consistent", "balance"), VARIANTS)
@pytest.mark.parametrize(("factor", "shift"), [(1, 7), (3, 0), (0.5, -2), (-1, 0), (-2, 5)])
def test_shifts_do_nothing_and_factors_scale(consistent, balance, factor, shift):
    # A negative factor swaps gain and loss: the same steps count, with rewards of the other sign.
    for seed in range(20):
        rewards = integer_rewards(5, seed).double()
        base = turning_point_rewards(rewards, consistent=consistent, balance=balance)
        got = turning_point_rewards(factor * rewards + shift, consistent=consistent, balance=balance)
        assert torch.equal(got.aggregated, base.aggregated)
        assert torch.equal(got.step_rewards, factor * base.step_rewards)


def test_incremental_rewards_add_up():
    rewards = integer_rewards(6, 0)
    r = incremental_rewards(rewards)
    assert r.shape == (12, 6)
    assert torch.equal(r.cumsum(1), (rewards[:, 1:] - rewards[:, :1]).float())


def test_no_trajectories():
    got = turning_point_rewards(torch.zeros(0, 4))
    assert got.step_rewards.shape == got.aggregated.shape == (0, 3)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)
def test_dtypes(dtype, expected):
    rewards = integer_rewards(4, 0).to(dtype)
    assert incremental_rewards(rewards).dtype == expected
    got = turning_point_rewards(rewards)
    assert got.step_rewards.dtype == expected
    assert got.aggregated.dtype == torch.bool


def test_float64_is_not_rounded():
    rewards = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 3e-12]], dtype=torch.float64)
    got = turning_point_rewards(rewards)
    assert got.aggregated.tolist() == [[True, False]]
    assert got.step_rewards[0, 0].item() == rewards[0, 2].item() - 1.0


@pytest.mark.parametrize("function", [incremental_rewards, turning_point_rewards])
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.zeros(3), r"`rewards` has shape \(3,\)"),
        (torch.zeros(3, 1), r"`rewards` has shape \(3, 1\): .*K >= 1"),
        (torch.zeros(2, 3, 4), r"`rewards` has shape \(2, 3, 4\)"),
        (torch.tensor([[0.0, 1.0], [2.0, math.nan]]), r"`rewards\[1, 1\]` is nan"),
        (torch.tensor([[0.0, math.inf]]), r"`rewards\[0, 1\]` is inf"),
    ],
)
def test_errors(function, rewards, message):
    with pytest.raises(ValueError, match=message):
        function(rewards)
