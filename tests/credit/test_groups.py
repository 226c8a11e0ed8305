import json
from pathlib import Path

import pytest
import torch

from flow_trl.credit import group_advantages


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


@pytest.mark.parametrize(("alias", "name"), [(True, "group"), (False, "none")])
def test_bool_aliases(alias, name):
    y = values(8)
    assert torch.equal(group_advantages(y, 4, scale_rewards=alias), group_advantages(y, 4, scale_rewards=name))


def test_defaults():
    y = values(8)
    assert torch.equal(group_advantages(y, 4), group_advantages(y, 4, scale_rewards="group", eps=1e-4))


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_give_exact_zeros(scale_rewards, dtype):
    y = torch.cat([torch.full((24,), 0.1, dtype=dtype), values(24, dtype=dtype)])
    got = group_advantages(y, 24, scale_rewards=scale_rewards)
    assert (got[:24] == 0).all() and (got[24:] != 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.int64, torch.float32)],
)
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
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
