import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy.stats import spearmanr

import flow_trl


FOLDER = Path(flow_trl.__file__).parent / "metrics" / "cross_reward_generalization"
EXAMPLE = {
    "methods": ["DDPO"] * 3 + ["TDPO-R"] * 3,
    "in_domain": [5.0, 6.0, 8.0, 5.0, 6.0, 7.0],
    "out_of_domain": [[0.4], [0.3], [0.1], [0.4], [0.5], [0.3]],
    "reward_names": ["pickscore"],
}


@pytest.fixture(scope="module")
def cross_reward():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def one_run(cross_reward, x, y, **kwargs):
    results = cross_reward.compute(
        methods=["m"] * len(x), in_domain=x, out_of_domain=[[value] for value in y], reward_names=["r"], **kwargs
    )
    return results["r"]["m"]


@pytest.mark.parametrize("path", [FOLDER, FOLDER / "cross_reward_generalization.py"])
def test_loads_offline_and_gives_the_example_of_the_docstring(path):
    results = evaluate.load(str(path)).compute(**EXAMPLE)
    assert list(results) == ["matched_score", "pickscore"]
    assert results["matched_score"] == 7
    values = results["pickscore"]
    assert list(values) == ["DDPO", "TDPO-R"]
    assert values["DDPO"]["value_at_matched"] == pytest.approx(0.2)
    assert values["DDPO"]["change_from_start"] == pytest.approx(-0.2)
    assert values["DDPO"]["rank_correlation"] == pytest.approx(-1)
    assert values["TDPO-R"]["value_at_matched"] == pytest.approx(0.3)
    assert values["TDPO-R"]["change_from_start"] == pytest.approx(-0.1)
    assert values["TDPO-R"]["rank_correlation"] == pytest.approx(-0.5)  # ranks 1 2 3 and 2 3 1


@pytest.mark.parametrize("seed", range(5))
def test_equals_numpy_and_scipy(cross_reward, seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random(9)), rng.random(9).round(1)  # with ties
    score = rng.uniform(x[0], x[-1])
    results = one_run(cross_reward, x, y, matched_score=score)
    assert results["value_at_matched"] == pytest.approx(np.interp(score, x, y), abs=1e-12)
    assert results["change_from_start"] == pytest.approx(np.interp(score, x, y) - y[0], abs=1e-12)
    assert results["rank_correlation"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (1.0, 10.0),  # the start itself
        (2.0, 20.0),  # between the first two checkpoints, although the curve comes back to it twice
        (3.0, 30.0),
        (4.0, 60.0),  # between the last two
        (5.0, 80.0),
        (5.1, None),
        (0.9, None),  # the run starts above it
    ],
)
def test_first_crossing_counts(cross_reward, score, expected):
    results = one_run(cross_reward, [1.0, 3.0, 1.0, 3.0, 5.0], [10.0, 30.0, 0.0, 40.0, 80.0], matched_score=score)
    assert results["value_at_matched"] == pytest.approx(expected)
    assert results["change_from_start"] == (None if expected is None else pytest.approx(expected - 10))


def test_a_run_that_never_comes_down_to_the_score_has_no_value(cross_reward):
    assert one_run(cross_reward, [3.0, 1.0, 4.0], [1.0, 2.0, 3.0], matched_score=2)["value_at_matched"] is None


@pytest.mark.parametrize(("x", "y"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1])])
def test_constant_rewards_have_no_rank_correlation(cross_reward, x, y):
    results = one_run(cross_reward, x, y)
    assert results["rank_correlation"] is None
    assert results["value_at_matched"] == y[0]


def test_runs_are_averaged_and_may_be_interleaved(cross_reward):
    # Maxima 4, 3 and 2 (the last run of "b" falls again): compared at 2.
    curves = {
        ("a", 0): ([0, 4], [[0, 10], [8, 10]]),  # 4 and 10 at 2
        ("b", 0): ([0, 3], [[0, 0], [3, 6]]),  # 2 and 4
        ("a", 1): ([1, 3], [[1, 5], [1, 7]]),  # 1 and 6
        ("b", 1): ([0, 2, 1], [[6, 0], [8, 1], [9, 2]]),  # 8 and 1
    }
    rows = [
        (position, method, run, x, y)
        for (method, run), (in_domain, out_of_domain) in curves.items()
        for position, (x, y) in enumerate(zip(in_domain, out_of_domain, strict=True))
    ]
    for order in (rows, sorted(rows, key=lambda row: row[0])):
        _, methods, runs, in_domain, out_of_domain = map(list, zip(*order, strict=True))
        results = cross_reward.compute(
            methods=methods, runs=runs, in_domain=in_domain, out_of_domain=out_of_domain, reward_names=["p", "q"]
        )
        assert results["matched_score"] == 2
        for reward, method, values, starts in (
            ("p", "a", [4, 1], [0, 1]),
            ("p", "b", [2, 8], [0, 6]),
            ("q", "a", [10, 6], [10, 5]),
            ("q", "b", [4, 1], [0, 0]),
        ):
            result, changes = results[reward][method], np.subtract(values, starts)
            assert result["value_at_matched"] == pytest.approx(np.mean(values))
            assert result["value_at_matched_se"] == pytest.approx(abs(values[0] - values[1]) / 2)
            assert result["change_from_start"] == pytest.approx(changes.mean())
            assert result["change_from_start_se"] == pytest.approx(abs(changes[0] - changes[1]) / 2)
        assert results["p"]["b"]["rank_correlation"] == pytest.approx((1 + 0.5) / 2)
        assert results["p"]["b"]["rank_correlation_se"] == pytest.approx(0.25)
        assert results["q"]["a"]["rank_correlation"] is None  # constant in one of the runs


def test_one_run_has_no_standard_error(cross_reward):
    values = cross_reward.compute(**EXAMPLE)["pickscore"]["DDPO"]
    assert all(values[name] is None for name in values if name.endswith("_se"))


def test_a_method_has_no_value_if_one_of_its_runs_has_none(cross_reward):
    results = cross_reward.compute(**EXAMPLE | {"methods": ["a"] * 6}, runs=[0, 0, 0, 1, 1, 1], matched_score=7.5)
    assert results["pickscore"]["a"]["value_at_matched"] is None
    assert results["pickscore"]["a"]["change_from_start_se"] is None
    assert results["pickscore"]["a"]["rank_correlation"] == pytest.approx(-0.75)


def test_batches_add_up(cross_reward):
    columns = ("methods", "in_domain", "out_of_domain")
    for rows in (slice(0, 2), slice(2, 6)):
        cross_reward.add_batch(**{name: EXAMPLE[name][rows] for name in columns})
    results = cross_reward.compute(reward_names=["pickscore"])
    assert results["pickscore"]["DDPO"]["value_at_matched"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"methods": [], "in_domain": [], "out_of_domain": []}, "`in_domain` is empty"),
        ({"in_domain": [5.0]}, "Mismatch"),
        ({"in_domain": [5.0, 6.0, math.nan, 5.0, 6.0, 7.0]}, r"`in_domain\[2\]` is nan"),
        ({"out_of_domain": [[0.4]] * 5 + [[math.inf]]}, r"`out_of_domain\[5\]` is \[inf\]"),
        ({"out_of_domain": [[0.4]] * 5 + [[None]]}, r"`out_of_domain\[5\]` is \[nan\]"),
        (
            {"out_of_domain": [[0.4], []] + [[0.4]] * 4},
            r"`out_of_domain\[1\]` has 0 entries, but `reward_names` has 1",
        ),
        ({"reward_names": ["p", "q"]}, r"`out_of_domain\[0\]` has 1 entries, but `reward_names` has 2"),
        ({"reward_names": []}, r"`reward_names=\[\]`"),
        ({"reward_names": ["p", "p"]}, r"`reward_names=\['p', 'p'\]`"),
        ({"reward_names": ["matched_score"]}, r"`reward_names=\['matched_score'\]`"),
        ({"runs": [0]}, "`runs` has 1 entries, but there are 6"),
        ({"runs": [0, 0, 0, 0, 0, 1]}, "one checkpoint of run 1 of 'TDPO-R'"),
        ({"methods": ["a"] * 5 + ["b"]}, "one checkpoint of 'b'"),
        ({"matched_score": math.nan}, "`matched_score=nan`"),
    ],
)
def test_bad_input(kwargs, message):
    metric = evaluate.load(str(FOLDER), keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**(EXAMPLE | kwargs))
