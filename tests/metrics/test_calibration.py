from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

import flow_trl


FOLDER = Path(flow_trl.__file__).parent / "metrics" / "calibration"
LOWER = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@pytest.fixture(scope="module")
def calibration():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def samples(n, decimals=1, seed=0):
    """Confidences with ties, too sure of themselves."""
    rng = np.random.default_rng(seed)
    q = rng.random(n).round(decimals)
    return q, (rng.random(n) < 0.8 * q).astype(int)


def ece(q, c):
    """The formula, bin by bin."""
    bins = {}
    for qi, ci in zip(q, c, strict=True):
        bins.setdefault(max(lower for lower in LOWER if qi >= lower), []).append((qi, ci))
    gaps = (abs(sum(qi for qi, _ in bin) - sum(ci for _, ci in bin)) for bin in bins.values())
    return sum(gaps) / len(q)


@pytest.mark.parametrize("path", [FOLDER, FOLDER / "calibration.py"])
def test_loads_offline_from_its_folder_and_its_file(path):
    results = evaluate.load(str(path)).compute(predictions=[0.25, 1.0], references=[0, 1])
    assert results["brier"] == 0.03125
    assert results["auroc"] == 1


def test_example_of_the_docstring(calibration):
    results = calibration.compute(predictions=[0.9, 0.8, 0.8, 0.3, 1.0], references=[1, 1, 0, 0, 1])
    rounded = {name: round(results[name], 3) for name in ("accuracy", "auroc", "brier", "ece")}
    assert rounded == {"accuracy": 0.6, "auroc": 0.917, "brier": 0.156, "ece": 0.2}
    assert results["bins"]["count"] == [0, 0, 0, 1, 0, 0, 0, 0, 2, 1, 1]


@pytest.mark.parametrize("decimals", [0, 1, 2, 9])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_and_the_formula(calibration, decimals, seed):
    q, c = samples(300, decimals, seed)
    results = calibration.compute(predictions=q, references=c, num_resamples=2)
    assert results["auroc"] == pytest.approx(roc_auc_score(c, q), abs=1e-12)
    assert results["brier"] == pytest.approx(brier_score_loss(c, q), abs=1e-12)
    assert results["ece"] == pytest.approx(ece(q, c), abs=1e-12)
    assert results["accuracy"] == pytest.approx(c.mean(), abs=1e-12)


def test_ece_by_hand(calibration):
    # Bin [0.7, 0.8): accuracy 1/2, mean confidence 0.75. Bin [0.2, 0.3): 0 and 0.25. Bin of 1: 1/2 and 1.
    results = calibration.compute(predictions=[0.72, 0.78, 0.25, 1.0, 1.0], references=[1, 0, 0, 1, 0])
    assert results["ece"] == pytest.approx(2 / 5 * 0.25 + 1 / 5 * 0.25 + 2 / 5 * 0.5)
    bins = results["bins"]
    assert bins["lower"] == LOWER
    assert bins["confidence"][7] == pytest.approx(0.75) and bins["accuracy"][7] == 0.5
    assert bins["confidence"][0] is None and bins["accuracy"][0] is None


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("confidence", "bin"),
    [(i / 10, i) for i in range(11)]
    + [(0.1 + 0.2, 3), (0.7999999, 7), (0.2999, 2), (0.9999999, 9), (0.05, 0), (np.nextafter(np.float32(1), 0), 9)],
)
def test_a_confidence_belongs_to_the_bin_that_begins_with_it(calibration, confidence, bin, dtype):
    results = calibration.compute(predictions=np.array([confidence], dtype), references=[1], num_resamples=2)
    assert np.flatnonzero(results["bins"]["count"]).tolist() == [bin]


def test_only_1_is_in_the_bin_of_1(calibration):
    results = calibration.compute(predictions=[np.nextafter(1.0, 0), 1.0], references=[1, 1], num_resamples=2)
    assert results["bins"]["count"][-2:] == [1, 1]


def test_standard_errors_in_closed_form(calibration):
    q, c = samples(400, decimals=2)
    results = calibration.compute(predictions=q, references=c, num_resamples=4000)
    assert results["accuracy_se"] == pytest.approx(c.std(ddof=1) / 20)
    assert results["brier_se"] == pytest.approx(((q - c) ** 2).std(ddof=1) / 20, rel=0.05)
    # DeLong's: the variances of how often a sample wins, over samples of either class.
    wins = (q[c == 1][:, None] > q[c == 0]) + 0.5 * (q[c == 1][:, None] == q[c == 0])
    delong = np.sqrt(wins.mean(1).var(ddof=1) / wins.shape[0] + wins.mean(0).var(ddof=1) / wins.shape[1])
    assert results["auroc_se"] == pytest.approx(delong, rel=0.05)


def test_standard_error_of_ece_covers_repetitions(calibration):
    # One bin whose gap does not change its sign: the ECE is then a mean.
    rng = np.random.default_rng(0)
    q, c = np.full(500, 0.95), (rng.random(500) < 0.4).astype(int)
    results = calibration.compute(predictions=q, references=c, num_resamples=4000)
    assert results["ece_se"] == pytest.approx(c.std(ddof=1) / np.sqrt(500), rel=0.05)


def test_groups_are_resampled_whole(calibration):
    # Four equal samples per prompt are worth one.
    q, c = samples(200, decimals=2)
    single = calibration.compute(predictions=q, references=c, num_resamples=4000)
    kwargs = {"predictions": q.repeat(4), "references": c.repeat(4), "num_resamples": 4000}
    grouped = calibration.compute(**kwargs, groups=[f"prompt {i}" for i in range(200) for _ in range(4)])
    ungrouped = calibration.compute(**kwargs)
    for name in ("accuracy", "auroc", "brier", "ece"):
        assert grouped[name] == pytest.approx(single[name])
        assert grouped[f"{name}_se"] == pytest.approx(single[f"{name}_se"], rel=0.1)
        if name != "ece":
            assert ungrouped[f"{name}_se"] == pytest.approx(single[f"{name}_se"] / 2, rel=0.1)


def test_reproducible_from_its_seed_alone(calibration):
    q, c = samples(50)
    results = []
    for seed in (1, 1, 2):
        np.random.seed(len(results))
        results.append(calibration.compute(predictions=q, references=c, seed=seed, num_resamples=10))
    assert results[0]["ece_se"] == results[1]["ece_se"] != results[2]["ece_se"]


def test_one_class_has_no_auroc(calibration):
    results = calibration.compute(predictions=[0.2, 0.9], references=[True, True])
    assert results["auroc"] is None and results["auroc_se"] is None
    assert results["brier"] == pytest.approx((0.64 + 0.01) / 2)
    assert results["brier_se"] > 0


@pytest.mark.parametrize("kwargs", [{}, {"groups": ["a"]}])
def test_one_sample_has_no_standard_error(calibration, kwargs):
    results = calibration.compute(predictions=[0.2], references=[0], **kwargs)
    assert all(results[f"{name}_se"] is None for name in ("accuracy", "auroc", "brier", "ece"))
    assert results["ece"] == 0.2


def test_batches_add_up(calibration):
    q, c = samples(40)
    for start in (0, 20):
        calibration.add_batch(predictions=q[start : start + 20], references=c[start : start + 20])
    batches, together = calibration.compute(), calibration.compute(predictions=q, references=c)
    assert all(batches[name] == together[name] for name in ("accuracy", "auroc", "brier", "ece", "ece_se"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictions": [], "references": []}, "empty"),
        ({"predictions": [0.5]}, "Mismatch"),
        ({"predictions": [0.5, 1.1]}, r"`predictions\[1\]` is 1.1"),
        ({"predictions": [-0.1, 1]}, r"`predictions\[0\]` is -0.1"),
        ({"predictions": [0.5, float("nan")]}, r"`predictions\[1\]` is nan"),
        ({"predictions": [0.5, None]}, r"`predictions\[1\]` is nan"),
        ({"references": [0, 2]}, r"`references\[1\]` is 2"),
        ({"references": [0.5, 1]}, r"`references\[0\]` is 0.5"),
        ({"groups": [1]}, "`groups` has 1 entries"),
        ({"num_resamples": 1}, "`num_resamples=1`"),
    ],
)
def test_bad_input(kwargs, message):
    metric = evaluate.load(str(FOLDER), keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": [0.5, 0.6], "references": [0, 1]} | kwargs))
