import numpy as np
import pytest

from flow_trl import metrics


@pytest.fixture(scope="module")
def pass_at_k():
    return metrics.load("pass_at_k", keep_in_memory=True)


def human_eval(n, c, k):
    """As the code of the paper computes it."""
    return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def test_equals_the_code_of_the_paper(pass_at_k):
    rng = np.random.default_rng(0)
    predictions = [(rng.random(n) < p).astype(int).tolist() for n, p in ((20, 0.1), (50, 0.5), (200, 0.02), (20, 0))]
    results = pass_at_k.compute(predictions=predictions, k=[1, 10, 20])
    for k in (1, 10, 20):
        expected = [human_eval(len(row), sum(row), k) for row in predictions]
        assert results[f"pass@{k}"] == pytest.approx(np.mean(expected))
        assert results[f"pass@{k}_se"] == pytest.approx(np.std(expected, ddof=1) / 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictions": []}, "`predictions` is empty"),
        ({"predictions": [[1], []]}, r"`predictions\[1\]` is \[\]"),
        ({"predictions": [[0, 2]]}, r"`predictions\[0\]` is \[0.0, 2.0\]"),
        ({"predictions": [[1, None]]}, r"`predictions\[0\]` is \[1.0, None\]"),
        ({"k": [3]}, "`k` holds 3, but a prompt has 2 answers"),
        ({"k": [0]}, "`k` holds 0"),
    ],
)
def test_bad_input(kwargs, message):
    metric = metrics.load("pass_at_k", keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": [[1, 0]], **kwargs})
