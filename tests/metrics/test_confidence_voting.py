import math
import random
from itertools import combinations
from pathlib import Path

import evaluate
import numpy as np
import pytest

import flow_trl


FOLDER = Path(flow_trl.__file__).parent / "metrics" / "confidence_voting"
VOTES = ("majority", "highest_confidence", "weighted_majority")


@pytest.fixture(scope="module")
def voting():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def votes(voting, answers, confidences, gold="a", **kwargs):
    results = voting.compute(predictions=[answers], references=[gold], confidences=[confidences], **kwargs)
    return tuple(results[name] for name in VOTES)


@pytest.mark.parametrize("path", [FOLDER, FOLDER / "confidence_voting.py"])
def test_loads_offline_and_gives_the_example_of_the_docstring(path):
    results = evaluate.load(str(path)).compute(
        predictions=[["4", "5", "5", None], ["7", "7", "8", "9"]],
        references=["4", "7"],
        confidences=[[0.9, 0.3, 0.4, None], [0.2, 0.5, 0.8, 0.1]],
        k=[1, 2],
    )
    expected = {"pass@1": 3 / 8, "pass@1_se": 1 / 8, "pass@2": 2 / 3, "pass@2_se": 1 / 6}
    expected |= {name: 0.5 for vote in VOTES for name in (vote, f"{vote}_se")}
    assert results == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(voting, n):
    for c in range(n + 1):
        correct = [1] * c + [0] * (n - c)
        results = voting.compute(
            predictions=[["x"] * n],
            references=["y"],
            confidences=[[0.5] * n],
            correct=[correct],
            k=range(1, n + 1),
        )
        for k in range(1, n + 1):
            subsets = [max(subset) for subset in combinations(correct, k)]
            assert results[f"pass@{k}"] == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(
    ("answers", "confidences", "expected"),
    [
        (["a", "a", "b"], [0.1, 0.2, 0.9], (1, 0, 0)),
        (["a", "b", "b"], [0.9, 0.3, 0.4], (0, 1, 1)),
        (["a", "b", "b"], [0.6, 0.5, 0.5], (0, 1, 0)),
        (["a", "b"], [0.5, 0.5], (1 / 2, 1 / 2, 1 / 2)),
        # Distinct answers are tied, but samples for the highest confidence.
        (["a", "a", "b", "b", "c"], [0.4, 0.4, 0.4, 0.1, 0.1], (1 / 2, 2 / 3, 1)),
        # Ties in spite of rounding.
        (["a", "a", "b"], [0.1, 0.2, 0.3], (1, 0, 1 / 2)),
        (["a", "b", "c"], [0.0, 0.0, 0.0], (1 / 3, 1 / 3, 1 / 3)),
        # Missing answers are no candidates, missing confidences have no weight.
        ([None, "", None, "a", "b", "b"], [1.0, 1.0, 1.0, 0.1, None, None], (0, 1, 1)),
        ([None, "a"], [1.0, None], (1, 1, 1)),
        ([None, ""], [1.0, 0.5], (0, 0, 0)),
    ],
)
def test_votes_by_hand(voting, answers, confidences, expected):
    assert votes(voting, answers, confidences) == pytest.approx(expected)


def test_no_result_depends_on_an_order(voting):
    rng = random.Random(0)
    for _ in range(20):
        samples = [(rng.choice(["a", "b", "c", None]), rng.choice([None, 0.1, 0.2, 0.3, 0.7])) for _ in range(6)]
        results = {votes(voting, *zip(*rng.sample(samples, len(samples)), strict=True)) for _ in range(5)}
        assert len(results) == 1


def test_given_correctness_counts(voting):
    kwargs = {"answers": ["1/2", "0.5", "3"], "confidences": [0.5, 0.4, 0.8], "gold": "0.5"}
    assert votes(voting, **kwargs) == pytest.approx((1 / 3, 0, 0))
    assert votes(voting, **kwargs, correct=[[True, True, False]]) == pytest.approx((2 / 3, 0, 0))
    # Equal answers of which one only counts, as where the completion counts as well.
    assert votes(voting, ["x", "x"], [0.9, 0.1], correct=[np.array([1.0, 0.0])]) == (0.5, 1, 0.5)
    # A missing answer is wrong whatever is said.
    assert voting.compute(predictions=[[""]], references=[""], confidences=[[1]])["pass@1"] == 0


def test_standard_errors_are_over_prompts(voting):
    predictions, confidences = [["a", "b"], ["a", "a"], ["b", "b"]], [[0.9, 0.1]] * 3
    results = voting.compute(predictions=predictions, references=["a"] * 3, confidences=confidences)
    assert results["pass@1"] == 0.5
    assert results["pass@1_se"] == pytest.approx(np.std([0.5, 1, 0], ddof=1) / math.sqrt(3))
    assert results["highest_confidence"] == pytest.approx(2 / 3)
    one = voting.compute(predictions=predictions[:1], references=["a"], confidences=confidences[:1])
    assert all(one[name] is None for name in one if name.endswith("_se"))


def test_prompts_may_differ_in_their_number_of_samples_and_answer_nothing(voting):
    results = voting.compute(
        predictions=[[None, None], ["a", "b", "a"]], references=["a", "a"], confidences=[[None, None], [0.1] * 3]
    )
    assert results["pass@1"] == pytest.approx(1 / 3)
    assert results["majority"] == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictions": [], "references": [], "confidences": []}, "empty"),
        ({"predictions": [[]]}, r"`predictions\[0\]` is empty"),
        ({"confidences": [[0.5]]}, r"`confidences\[0\]` has 1 entries"),
        ({"confidences": [[0.5, 1.5]]}, "holds 1.5"),
        ({"confidences": [[0.5, float("nan")]]}, "holds nan"),
        ({"references": ["a", "b"]}, "Mismatch"),
        ({"correct": [[True]]}, r"`correct\[0\]` has 1 entries"),
        ({"correct": []}, "`correct` has 0 prompts"),
        ({"k": [3]}, "`k` holds 3"),
        ({"k": [0]}, "`k` holds 0"),
    ],
)
def test_bad_input(kwargs, message):
    metric = evaluate.load(str(FOLDER), keep_in_memory=True)
    inputs = {"predictions": [["a", "b"]], "references": ["a"], "confidences": [[0.1, 0.2]]}
    with pytest.raises(ValueError, match=message):
        metric.compute(**(inputs | kwargs))
