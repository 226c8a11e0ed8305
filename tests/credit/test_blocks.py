"""Block advantages against plain loops, and against TRL's own formulas."""

import itertools
import math
import random
import re

import pytest
import torch
from trl.trainer.utils import nanstd

from flow_trl.credit import block_advantages, charge_missing_blocks, token_advantages


NAN = float("nan")
CORRECT = [1, 1, 0, 0, 1, 0]
CONFIDENCE = [-0.04, -0.25, -0.81, -0.09, -0.01, -0.36]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.06, -0.15, -0.39, 0.33, 0.09, 0.06]),
        ({"baseline": "group"}, [0.22, 0.01, -0.55, 0.17, 0.25, -0.10]),
        ({"baseline": "batch"}, [0.22, 0.01, -0.55, 0.17, 0.25, -0.10]),
        ({"baseline": "none"}, CONFIDENCE),
        ({"min_stratum_size": 3}, [0.06, -0.15, -0.39, 0.33, 0.09, 0.06]),
        ({"min_stratum_size": 4}, [0.22, 0.01, -0.55, 0.17, 0.25, -0.10]),
        ({"shrinkage": 3.0}, [0.14, -0.07, -0.47, 0.25, 0.17, -0.02]),
        ({"leave_one_out": True}, [0.09, -0.225, -0.585, 0.495, 0.135, 0.09]),
    ],
    ids=str,
)
def test_the_worked_example(options, expected, dtype):
    rewards = torch.tensor([CORRECT, CONFIDENCE], dtype=dtype).T
    got = block_advantages(rewards, [None, CORRECT], 6, **options)
    assert got.dtype == dtype and got.shape == (6, 2)
    factor = 6 / 5 if "leave_one_out" in options else 1
    first = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.5, -0.5], dtype=dtype) * factor
    torch.testing.assert_close(got, torch.stack([first, torch.tensor(expected, dtype=dtype)], 1), rtol=0, atol=1e-6)


# Against a loop

OUTCOMES = [True, False, None, "right", "wrong", (1, "x"), (), 7, 0.5, frozenset({2})]


def batch(seed, n_groups=3, group=6, n_blocks=3, dtype=torch.float64, missing=0.25, n_outcomes=3):
    rng = random.Random(seed)
    rewards = [[rng.gauss(0, 1) for _ in range(n_blocks)] for _ in range(n_groups * group)]
    for row in rewards:
        for k in range(n_blocks):
            if rng.random() < missing:
                row[k] = NAN
    kinds = rng.sample(OUTCOMES, n_outcomes)
    outcomes = [None] + [[rng.choice(kinds) for _ in rewards] for _ in range(n_blocks - 1)]
    return torch.tensor(rewards, dtype=dtype), outcomes


def mean(values):
    return sum(values) / len(values)


def slow_block_advantages(
    rewards, outcomes, G, baseline="outcome", min_stratum_size=1, shrinkage=0.0, leave_one_out=False, scale="none", eps=1e-4
):  # fmt: skip
    """The method, a completion and a block at a time."""
    rewards = rewards.tolist()
    advantages = []
    for i, row in enumerate(rewards):
        advantages.append([])
        for k, r in enumerate(row):
            present = [j for j in range(len(rewards)) if not math.isnan(rewards[j][k])]
            group = [j for j in present if j // G == i // G]
            A = 0.0
            if i in group:
                others = [j for j in group if not (leave_one_out and j == i)]
                everyone = [j for j in present if not (leave_one_out and j == i)]
                compared = everyone if k and baseline == "batch" else others
                if k and baseline == "none":
                    A = r
                elif compared:
                    b = mean([rewards[j][k] for j in compared])
                    if k and baseline == "outcome":
                        stratum = [j for j in others if outcomes[k][j] == outcomes[k][i]]
                        n = len(stratum)
                        if n and n >= min_stratum_size:
                            weight = n / (n + shrinkage)
                            b = weight * mean([rewards[j][k] for j in stratum]) + (1 - weight) * b
                    A = r - b
                spread = {"none": None, "group": group, "batch": present}[scale]
                if spread is not None:
                    values = [rewards[j][k] for j in spread]
                    if len(values) < 2:
                        A = 0.0
                    else:
                        variance = sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)
                        A /= math.sqrt(variance) + eps
            advantages[-1].append(A)
    return torch.tensor(advantages, dtype=torch.float64)


SETTINGS = [
    {"baseline": baseline, "leave_one_out": leave_one_out, "scale_rewards": scale, **extra}
    for baseline in ("outcome", "group", "batch", "none")
    for leave_one_out in (False, True)
    for scale in ("none", "group", "batch")
    for extra in (
        [{}, {"min_stratum_size": 2}, {"min_stratum_size": 3, "shrinkage": 1.5}, {"shrinkage": 4}]
        if baseline == "outcome"
        else [{}]
    )
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options.values())))
def test_against_a_loop(options, dtype):
    for seed in range(8):
        group = (1, 2, 4, 6)[seed % 4]
        rewards, outcomes = batch(seed, 1 + seed % 3, group, 1 + seed % 4, dtype, missing=(0.0, 0.25, 0.7)[seed % 3])
        got = block_advantages(rewards, outcomes, group, **options)
        slow = {**options, "scale": options["scale_rewards"]}
        del slow["scale_rewards"]
        expected = slow_block_advantages(rewards, outcomes, group, **slow)
        assert got.dtype == dtype
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_equal_outcomes_are_one_stratum_and_others_are_not():
    rewards = torch.tensor([[0.0, float(2**i)] for i in range(8)])
    outcomes = [True, 1, "1", 1.0, None, (1,), "1", None]
    got = block_advantages(rewards, [None, outcomes], 8)[:, 1]
    ones, strings, nothing = (1 + 2 + 8) / 3, (4 + 64) / 2, (16 + 128) / 2
    expected = [1 - ones, 2 - ones, 4 - strings, 8 - ones, 16 - nothing, 0, 64 - strings, 128 - nothing]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_strata_do_not_reach_over_groups():
    rewards, _ = batch(0, n_groups=2, group=4, n_blocks=2, missing=0.0)
    same = ["x"] * 8
    got = block_advantages(rewards, [None, same], 4)
    torch.testing.assert_close(got, block_advantages(rewards, [None, same], 4, baseline="group"))
    for half in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(got[half], block_advantages(rewards[half], [None, ["y"] * 4], 4))


@pytest.mark.parametrize("baseline", ["outcome", "group", "batch", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_first_block_is_compared_with_its_group(baseline, leave_one_out):
    rewards, outcomes = batch(1)
    got = block_advantages(rewards, outcomes, 6, baseline=baseline, leave_one_out=leave_one_out)[:, 0]
    alone = block_advantages(rewards[:, :1], [None], 6, baseline="group", leave_one_out=leave_one_out)[:, 0]
    assert torch.equal(got, alone)


def test_blocks_do_not_touch_each_other():
    rewards, outcomes = batch(2)
    got = block_advantages(rewards, outcomes, 6, scale_rewards="group")
    changed = rewards.clone()
    changed[:, 1] = torch.where(torch.arange(len(rewards)) % 2 == 0, NAN, 100.0)
    changed = block_advantages(changed, outcomes, 6, scale_rewards="group")
    assert torch.equal(got[:, [0, 2]], changed[:, [0, 2]])


@pytest.mark.parametrize("baseline", ["outcome", "group", "batch", "none"])
@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_missing_block_shifts_nothing(baseline, scale_rewards, leave_one_out):
    # One group, so that the rows without the block can be dropped.
    options = {"baseline": baseline, "scale_rewards": scale_rewards, "leave_one_out": leave_one_out}
    rewards, outcomes = batch(3, n_groups=1, group=10, n_blocks=2, missing=0.0)
    rewards[[2, 5, 6], 1] = NAN
    kept = [0, 1, 3, 4, 7, 8, 9]
    got = block_advantages(rewards, outcomes, 10, min_stratum_size=2, shrinkage=0.5, **options)
    assert got[[2, 5, 6], 1].tolist() == [0, 0, 0]
    dropped = [None, [outcomes[1][i] for i in kept]]
    expected = block_advantages(rewards[kept], dropped, 7, min_stratum_size=2, shrinkage=0.5, **options)
    torch.testing.assert_close(got[kept, 1], expected[:, 1])


def test_a_block_that_all_miss_has_no_advantage():
    rewards, outcomes = batch(4, n_blocks=2)
    rewards[:6, 1] = NAN
    for options in SETTINGS:
        got = block_advantages(rewards, outcomes, 6, **options)
        assert got[:6, 1].tolist() == [0] * 6 and got.isfinite().all()


def test_min_stratum_size_counts_only_what_is_there():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, NAN], [0.0, 8.0]], dtype=torch.float64)
    outcomes = [None, ["a", "a", "a", "b"]]
    got = block_advantages(rewards, outcomes, 4, min_stratum_size=2)[:, 1]
    assert got.tolist() == [-1, 1, 0, 4]
    assert block_advantages(rewards, outcomes, 4, min_stratum_size=3)[:, 1].tolist() == [-3, -1, 0, 4]
    # Left out, one other is there.
    got = block_advantages(rewards, outcomes, 4, min_stratum_size=2, leave_one_out=True)[:, 1]
    assert got.tolist() == [-4.5, -1.5, 0, 6]


def test_shrinkage_goes_from_the_stratum_to_the_group():
    rewards, outcomes = batch(5)
    own = block_advantages(rewards, outcomes, 6)
    group = block_advantages(rewards, outcomes, 6, baseline="group")
    torch.testing.assert_close(block_advantages(rewards, outcomes, 6, shrinkage=1e-12), own)
    torch.testing.assert_close(block_advantages(rewards, outcomes, 6, shrinkage=1e12), group)


@pytest.mark.parametrize("baseline", ["outcome", "group"])
def test_leave_one_out_of_n_is_n_over_n_minus_1_times_as_much(baseline):
    rewards, outcomes = batch(6, n_blocks=2, n_outcomes=2)
    own = block_advantages(rewards, outcomes, 6, baseline=baseline)[:, 1]
    others = block_advantages(rewards, outcomes, 6, baseline=baseline, leave_one_out=True)[:, 1]
    checked = 0
    for i in range(len(rewards)):
        if rewards[i, 1].isnan():
            continue
        n = sum(
            not rewards[j, 1].isnan() and (baseline == "group" or outcomes[1][j] == outcomes[1][i])
            for j in range(i // 6 * 6, i // 6 * 6 + 6)
        )
        if n > 1:
            checked += 1
            assert others[i].item() == pytest.approx(n / (n - 1) * own[i].item(), abs=1e-12)
    assert checked > 8


# Invariants


@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_a_stratum_add_up_to_zero(seed):
    rewards, outcomes = batch(seed, missing=0.2)
    for scale_rewards in ("none", "group"):
        got = block_advantages(rewards, outcomes, 6, scale_rewards=scale_rewards)
        for k in (0, 1, 2):
            sums = {}
            for i, advantage in enumerate(got[:, k].tolist()):
                key = (i // 6, outcomes[k][i] if k else None)
                sums[key] = sums.get(key, 0.0) + advantage
            assert list(sums.values()) == pytest.approx([0.0] * len(sums), abs=1e-12)
    batch_wide = block_advantages(rewards, outcomes, 6, baseline="batch")
    assert batch_wide[:, 1:].sum(0).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_order_within_a_group_and_of_groups_does_not_matter(options):
    rewards, outcomes = batch(7)
    rng = random.Random(0)
    order = [i for g in rng.sample(range(3), 3) for i in rng.sample(range(g * 6, g * 6 + 6), 6)]
    permuted = [None] + [[outcome[i] for i in order] for outcome in outcomes[1:]]
    got = block_advantages(rewards[order], permuted, 6, **options)
    torch.testing.assert_close(got, block_advantages(rewards, outcomes, 6, **options)[order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline", ["outcome", "group", "batch"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_constant_does_nothing_and_a_factor_scales(baseline, leave_one_out):
    rewards, outcomes = batch(8)
    got = block_advantages(rewards, outcomes, 6, baseline=baseline, leave_one_out=leave_one_out)
    shifted = block_advantages(3 * rewards + 5, outcomes, 6, baseline=baseline, leave_one_out=leave_one_out)
    torch.testing.assert_close(shifted, 3 * got)


@pytest.mark.parametrize(("shrinkage", "min_stratum_size"), [(0.0, 1), (2.0, 1), (0.0, 2)])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_the_gradient_is_unbiased_if_a_completion_is_left_out(leave_one_out, shrinkage, min_stratum_size):
    # r is Bernoulli(p_o), p_o = sigmoid(theta_o): E[A score] should be dp_o/dtheta_o = p_o (1 - p_o).
    outcomes, p = ["a", "a", "a", "b", "c", "c"], {"a": 0.3, "b": 0.8, "c": 0.6}
    expected = torch.zeros(6, dtype=torch.float64)
    for r in itertools.product([0.0, 1.0], repeat=6):
        probability = math.prod(p[o] if value else 1 - p[o] for value, o in zip(r, outcomes, strict=True))
        rewards = torch.tensor([[0.0] * 6, r], dtype=torch.float64).T
        A = block_advantages(
            rewards, [None, outcomes], 6,
            leave_one_out=leave_one_out, shrinkage=shrinkage, min_stratum_size=min_stratum_size,
        )[:, 1]  # fmt: skip
        score = torch.tensor([value - p[o] for value, o in zip(r, outcomes, strict=True)], dtype=torch.float64)
        expected += probability * A * score
    true = torch.tensor([p[o] * (1 - p[o]) for o in outcomes], dtype=torch.float64)
    if leave_one_out:
        torch.testing.assert_close(expected, true, rtol=1e-10, atol=1e-12)
    else:
        n = torch.tensor([3, 3, 3, 1, 2, 2])
        weight = n / (n + shrinkage)
        own = torch.where(n >= min_stratum_size, weight / n + (1 - weight) / 6, 1 / 6)
        torch.testing.assert_close(expected, true * (1 - own), rtol=1e-6, atol=1e-7)


# Against TRL


def trl_advantages(rewards, num_generations, scale_rewards):
    """As in `GRPOTrainer._generate_and_score_completions`."""
    mean_grouped_rewards = torch.nanmean(rewards.view(-1, num_generations), dim=1)
    mean_grouped_rewards = mean_grouped_rewards.repeat_interleave(num_generations, dim=0)
    advantages = rewards - mean_grouped_rewards
    if scale_rewards == "group":
        std_rewards = nanstd(rewards.view(-1, num_generations), dim=1)
        advantages = advantages / (std_rewards.repeat_interleave(num_generations, dim=0) + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards).expand_as(rewards) + 1e-4)
    return advantages.nan_to_num(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_first_block_has_the_bits_of_trl(dtype, missing):
    for seed in range(20):
        for group in (2, 7, 8):
            rewards, outcomes = batch(seed, 5, group, 2, dtype, missing)
            got = block_advantages(rewards, outcomes, group)
            assert torch.equal(got[:, 0], trl_advantages(rewards[:, 0].contiguous(), group, "none"))
            alone = block_advantages(rewards[:, :1], [None], group)
            assert torch.equal(alone[:, 0], got[:, 0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_scaled_rewards_are_those_of_trl(scale_rewards, missing):
    for seed in range(20):
        rewards, outcomes = batch(seed, 4, 8, 2, torch.float32, missing)
        got = block_advantages(rewards, outcomes, 8, baseline="group", scale_rewards=scale_rewards)
        for k in (0, 1):
            expected = trl_advantages(rewards[:, k].contiguous(), 8, scale_rewards)
            torch.testing.assert_close(got[:, k], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("flag", "name"), [(True, "group"), (False, "none")])
def test_scale_rewards_may_be_a_bool(flag, name):
    rewards, outcomes = batch(9)
    got = block_advantages(rewards, outcomes, 6, scale_rewards=flag)
    assert torch.equal(got, block_advantages(rewards, outcomes, 6, scale_rewards=name))


def test_eps():
    rewards = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    got = block_advantages(rewards, [None], 2, scale_rewards="group", eps=0.5)
    assert got[:, 0].tolist() == pytest.approx([-1 / (2**0.5 + 0.5), 1 / (2**0.5 + 0.5)])


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_and_groups_of_one_have_no_advantage(scale_rewards, leave_one_out):
    options = {"scale_rewards": scale_rewards, "leave_one_out": leave_one_out}
    equal = block_advantages(torch.full((4, 2), 0.25), [None, "abab"], 2, **options)
    assert equal.tolist() == [[0, 0]] * 4
    alone = block_advantages(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [None, "ab"], 1, **options)
    assert alone.tolist() == [[0, 0]] * 2


def test_rewards_are_not_changed():
    rewards, outcomes = batch(10)
    before = rewards.clone()
    block_advantages(rewards, outcomes, 6, scale_rewards="group", leave_one_out=True)
    assert torch.equal(rewards.nan_to_num(99.0), before.nan_to_num(99.0))


def test_no_completions():
    for options in SETTINGS:
        assert block_advantages(torch.zeros(0, 2), [None, []], 4, **options).shape == (0, 2)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rewards": torch.zeros(4)},
            "`rewards` has shape (4,) and dtype torch.float32: pass floats of shape (N, n_b",
        ),
        ({"rewards": torch.zeros(4, 2, dtype=torch.int64)}, "`rewards` has shape (4, 2) and dtype torch.int64"),
        ({"num_generations": 3}, "`num_generations` is 3, which does not divide the 4 rows of `rewards`"),
        ({"num_generations": 0}, "`num_generations` is 0"),
        ({"num_generations": -2}, "`num_generations` is -2"),
        ({"baseline": "mean"}, "`baseline` is 'mean': choose one of 'outcome', 'group', 'batch', 'none'"),
        ({"min_stratum_size": 0}, "`min_stratum_size` is 0: use at least 1"),
        ({"shrinkage": -0.5}, "`shrinkage` is -0.5: use a finite number of at least 0"),
        ({"shrinkage": float("inf")}, "`shrinkage` is inf"),
        ({"shrinkage": NAN}, "`shrinkage` is nan"),
        ({"scale_rewards": "std"}, '`scale_rewards` is \'std\': use "group", "batch" or "none"'),
        ({"scale_rewards": None}, "`scale_rewards` is None"),
        ({"outcomes": [None]}, "`outcomes` has 1 entries for 2 blocks: pass one each"),
        ({"outcomes": [None, None]}, '`outcomes[1]` is None: `baseline="outcome"` needs the outcomes'),
        ({"outcomes": [None, [1, 0, 1]]}, "`outcomes[1]` has 3 values for 4 completions"),
        ({"outcomes": [None, [1]], "baseline": "group"}, "`outcomes[1]` has 1 values for 4 completions"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"rewards": torch.zeros(4, 2), "outcomes": [None, [1, 0, 1, 0]], "num_generations": 2, **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        block_advantages(**arguments)


def test_outcomes_must_be_hashable():
    rewards = torch.zeros(2, 2)
    with pytest.raises(
        TypeError, match=re.escape("`outcomes[1]` holds a value that is not hashable (unhashable type")
    ):
        block_advantages(rewards, [None, [1, [2]]], 2)
    # Tensors are hashable, but by identity.
    for outcomes in (torch.tensor([1, 1]), [torch.tensor(1), torch.tensor(1)]):
        with pytest.raises(TypeError, match=re.escape("`outcomes[1]` holds tensors")):
            block_advantages(rewards, [None, outcomes], 2)


@pytest.mark.parametrize("baseline", ["group", "batch", "none"])
def test_other_baselines_need_no_outcomes(baseline):
    rewards, outcomes = batch(11)
    got = block_advantages(rewards, [None, None, None], 6, baseline=baseline)
    assert torch.equal(got, block_advantages(rewards, outcomes, 6, baseline=baseline))


# Tokens


def tokens(seed, B=5, T=17, n_blocks=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(B, n_blocks, generator=generator, dtype=dtype)
    block_index = torch.randint(n_blocks, (B, T), generator=generator).sort(1).values
    mask = (torch.rand(B, T, generator=generator) < 0.7).long()
    return advantages, block_index, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", ["default", "float", "scalar", "column"])
def test_token_advantages_against_a_loop(dtype, mask_dtype, kind):
    for seed in range(5):
        advantages, block_index, mask = tokens(seed, dtype=dtype)
        scale = {
            "default": 1.0,
            "float": 2.5,
            "scalar": torch.tensor(2.5, dtype=dtype),
            "column": torch.arange(1.0, 6.0, dtype=dtype)[:, None],
        }[kind]
        arguments = () if kind == "default" else (scale,)
        got = token_advantages(advantages, block_index, mask.to(mask_dtype), *arguments)
        assert got.shape == (5, 17) and got.dtype == dtype
        for i in range(5):
            s = float(scale[i] if kind == "column" else scale)
            for t in range(17):
                k = block_index[i, t].item()
                length = sum(m for m, b in zip(mask[i].tolist(), block_index[i].tolist(), strict=True) if b == k)
                expected = advantages[i, k].item() * s / max(length, 1)
                assert got[i, t].item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_every_block_weighs_its_advantage_however_long():
    advantages, block_index, mask = tokens(9)
    got = token_advantages(advantages, block_index, mask)
    for i, k in itertools.product(range(5), range(3)):
        trained = (block_index[i] == k) & (mask[i] == 1)
        expected = advantages[i, k].item() if trained.any() else 0.0
        assert got[i][trained].sum().item() == pytest.approx(expected, abs=1e-12)


def test_blocks_without_tokens_and_masked_blocks():
    advantages = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    block_index = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    got = token_advantages(advantages, block_index, mask)
    assert got.isfinite().all()
    assert (got * mask).tolist() == [[0.5, 0.5, 4.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_nothing_is_trained():
    got = token_advantages(
        torch.ones(2, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, 1)
    )
    assert got.tolist() == [[0.0] * 3] * 2
    assert token_advantages(torch.ones(2, 2), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_block_with_its_length_as_the_scale_keeps_its_advantage(dtype):
    # As in `loss_type="grpo"`, so that one block is GRPO to the bit.
    generator = torch.Generator().manual_seed(0)
    B, T = 64, 300
    advantages = torch.randn(B, 1, generator=generator, dtype=dtype)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)).long()
    scale = mask.sum(dim=1, keepdim=True).float()
    got = token_advantages(advantages, torch.zeros(B, T, dtype=torch.int64), mask, scale)
    assert torch.equal(got, advantages.expand(B, T))


def test_the_sum_with_the_loss_s_divisor_is_the_paper_s():
    advantages, block_index, mask = tokens(3)
    ratio = torch.rand(5, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    length = mask.sum(1, keepdim=True)
    spread = token_advantages(advantages, block_index, mask, length.double())
    got = ((ratio * spread * mask).sum(1, keepdim=True) / length)[:, 0]
    for i in range(5):
        expected = 0.0
        for k in range(3):
            held = ratio[i][(block_index[i] == k) & (mask[i] == 1)].tolist()
            expected += mean(held) * advantages[i, k].item() if held else 0.0
        assert got[i].item() == pytest.approx(expected, abs=1e-12)


def test_a_missing_block_is_charged_to_the_nearest_before_it():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 0.5, 0.2], [1.0, nan, 0.2], [1.0, 0.5, nan], [1.0, nan, nan], [nan, nan, 0.1]])
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]]).bool()
    charged = charge_missing_blocks(rewards, present, torch.tensor([9.0, -1.0, -0.25]))
    expected = [[1.0, 0.5, 0.2], [0.0, nan, 0.2], [1.0, 0.25, nan], [-0.25, nan, nan], [nan, nan, 0.1]]
    torch.testing.assert_close(charged, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(rewards[0], charged[0]) and rewards[3, 0] == 1
