import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_trl.credit import fill_with_group_mean, group_advantages


CASES = json.loads((Path(__file__).parents[1] / "data/golden/group_advantages.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "batch" if case["global_std"] else "group")
def test_golden(case):
    order = sorted(range(len(case["prompts"])), key=case["prompts"].__getitem__)
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)[order]
    got = group_advantages(rewards, 6, scale_rewards="batch" if case["global_std"] else "group")
    torch.testing.assert_close(got, torch.tensor(case["advantages"], dtype=torch.float64)[order], rtol=0, atol=1e-12)


def values(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_every_entry_by_hand(scale_rewards):
    y = values(12, 3)
    got = group_advantages(y, 4, scale_rewards=scale_rewards, eps=0.01)
    for i in range(12):
        for k in range(3):
            group = [y[j, k].item() for j in range(i // 4 * 4, i // 4 * 4 + 4)]
            spread = {"group": group, "batch": y[:, k].tolist(), "none": None}[scale_rewards]
            scale = 1.0
            if spread:
                center = sum(spread) / len(spread)
                scale = (sum((value - center) ** 2 for value in spread) / len(spread)) ** 0.5 + 0.01
            assert got[i, k].item() == pytest.approx((y[i, k].item() - sum(group) / 4) / scale, abs=1e-12)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_steps_do_not_mix(scale_rewards):
    y = values(12, 3)
    got = group_advantages(y, 4, scale_rewards=scale_rewards)
    for k in range(3):
        torch.testing.assert_close(got[:, k], group_advantages(y[:, k], 4, scale_rewards=scale_rewards))


def test_one_scale_for_a_trajectory_by_hand():
    y = values(12, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 100.0, -3.0])  # levels must not count
    got = group_advantages(y, 4, scale_rewards="trajectory", eps=0.01)
    for first in range(0, 12, 4):
        group = y[first : first + 4].tolist()
        means = [sum(row[k] for row in group) / 4 for k in range(3)]
        variance = sum((row[k] - means[k]) ** 2 for row in group for k in range(3)) / 12
        for i in range(4):
            for k in range(3):
                expected = (group[i][k] - means[k]) / (math.sqrt(variance) + 0.01)
                assert got[first + i, k].item() == pytest.approx(expected, abs=1e-12)


def test_one_scale_for_a_trajectory_is_the_group_s_where_steps_are_alike():
    y = values(12)
    torch.testing.assert_close(group_advantages(y, 4, scale_rewards="trajectory"), group_advantages(y, 4))
    copies = y[:, None].expand(-1, 5)
    torch.testing.assert_close(group_advantages(copies, 4, scale_rewards="trajectory"), group_advantages(copies, 4))


def test_steps_weigh_what_they_earned():
    y = values(12, 3) * torch.tensor([1.0, 1e-3, 1.0])
    size = group_advantages(y, 4, scale_rewards="trajectory").abs().mean(0)
    assert size[1] < 3e-3 * min(size[0], size[2])
    size = group_advantages(y, 4).abs().mean(0)  # by its own scale, a step that earned nothing counts as much
    assert size[1] > 0.3 * max(size[0], size[2])


@pytest.mark.parametrize(("alias", "name"), [(True, "group"), (False, "none")])
def test_bool_aliases(alias, name):
    y = values(8)
    assert torch.equal(group_advantages(y, 4, scale_rewards=alias), group_advantages(y, 4, scale_rewards=name))


def test_defaults():
    y = values(8)
    assert torch.equal(group_advantages(y, 4), group_advantages(y, 4, scale_rewards="group", eps=1e-4))


@pytest.mark.parametrize("scale_rewards", ["group", "trajectory", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_give_exact_zeros(scale_rewards, dtype):
    y = torch.cat([torch.full((24,), 0.1, dtype=dtype), values(24, dtype=dtype)])
    got = group_advantages(y, 24, scale_rewards=scale_rewards)
    assert (got[:24] == 0).all() and (got[24:] != 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)
@pytest.mark.parametrize("scale_rewards", ["group", "trajectory", "batch", "none"])
def test_dtypes(dtype, expected, scale_rewards):
    y = (values(8) * 10).to(dtype)
    got = group_advantages(y, 4, scale_rewards=scale_rewards)
    assert got.dtype == expected
    torch.testing.assert_close(got, group_advantages(y.to(expected), 4, scale_rewards=scale_rewards))


@pytest.mark.parametrize(
    ("shape", "num_generations", "scale_rewards", "message"),
    [
        ((8,), 1, "group", "`num_generations` is 1: use at least 2"),
        ((8,), 0, "group", "`num_generations` is 0: use at least 2"),
        ((9,), 2, "group", "`num_generations` is 2, which does not divide the 9 rows"),
        ((8,), 2, "global", "`scale_rewards` is 'global'"),
        ((), 2, "group", r"`values` has shape \(\)"),
        ((4, 2, 2), 2, "group", r"`values` has shape \(4, 2, 2\)"),
    ],
)
def test_errors(shape, num_generations, scale_rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(shape), num_generations, scale_rewards=scale_rewards)


# Missing values


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_values_become_the_group_s_mean(shape, dtype):
    y = values(*shape, dtype=dtype)
    missing = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    missing[8:] = True  # a whole group, at every step
    y[missing] = math.nan
    copy = y.clone()
    got = fill_with_group_mean(y, 4)
    assert got.dtype == dtype and got.shape == shape
    assert torch.equal(got[~missing], y[~missing]) and torch.equal(y.isnan(), missing)
    assert torch.equal(y.nan_to_num(7.0), copy.nan_to_num(7.0))  # what was given is as it was
    assert (got[8:] == 0).all()
    for g in (0, 1):
        group = y[4 * g : 4 * g + 4].reshape(4, -1).double().numpy()
        filled = got[4 * g : 4 * g + 4].reshape(4, -1)
        for k in range(group.shape[1]):
            present = [value for value in group[:, k] if not math.isnan(value)]
            expected = sum(present) / len(present) if present else 0.0
            np.testing.assert_allclose(filled[np.isnan(group[:, k]), k].double(), expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_missing():
    y = values(12, 3)
    assert torch.equal(fill_with_group_mean(y, 4), y)


def test_a_missing_value_neither_earns_nor_costs():
    y = torch.tensor([1.0, 4.0, math.nan, 7.0], dtype=torch.float64)
    got = group_advantages(fill_with_group_mean(y, 4), 4)
    assert got[2].item() == pytest.approx(0, abs=1e-12)
    alone = group_advantages(y[[0, 1, 3]], 3, eps=0.0)
    torch.testing.assert_close(got[[0, 1, 3]], alone * math.sqrt(4 / 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_are_filled_exactly(dtype):
    """Otherwise rounding is an advantage."""
    for count in range(2, 24):
        y = torch.full((24,), 0.1, dtype=dtype)
        y[count:] = math.nan
        assert (group_advantages(fill_with_group_mean(y, 24), 24) == 0).all(), count
