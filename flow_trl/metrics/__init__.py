"""
Metrics as modules for [`evaluate`](https://huggingface.co/docs/evaluate): one folder each, with its card, its test cases and
the app of its Space.

[`load`] loads one by its name, `evaluate.load(folder)` by its folder, and `python -m flow_trl.metrics push --namespace user`
makes each a Space, from which `evaluate.load("user/name")` loads it. What has no value (the standard error of a single
sample) is `None`, so that `evaluate.save` writes valid JSON.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import evaluate


FOLDER = Path(__file__).parent
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name)


def load(name: str, **kwargs: Any) -> "evaluate.EvaluationModule":
    """
    Loads a metric of flow_trl.

    Args:
        name (`str`):
            One of `NAMES`: `"aesthetic"`, `"calibration"`, `"clip_score"`, `"confidence_voting"`,
            `"cross_reward_generalization"`, `"geneval"`, `"ocr_accuracy"`, `"pass_at_k"` or `"pickscore"`.
        kwargs:
            Go to [`~evaluate.load`].

    Returns:
        [`~evaluate.EvaluationModule`]

    Raises:
        ValueError: if there is no such metric.

    Example:

    ```python
    >>> from flow_trl import metrics

    >>> metrics.load("pass_at_k").compute(predictions=[[1, 0, 0, 0]], k=[1, 2])
    {'pass@1': 0.25, 'pass@1_se': None, 'pass@2': 0.5, 'pass@2_se': None}
    ```
    """
    import evaluate

    if name not in NAMES:
        raise ValueError(
            f"`name` is {name!r}, which is no metric of flow_trl. There are {', '.join(map(repr, NAMES))}."
        )
    return evaluate.load(str(FOLDER / name), **kwargs)


def summarize(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """
    A mean and its standard error.

    Args:
        name (`str`):
            Name of the mean.
        values (`Sequence[float]`):
            One or more values.

    Returns:
        `dict[str, float | None]`: `name`, and `{name}_se`, std / sqrt(n), `None` for one value.

    Raises:
        ValueError: if there are no values.

    Example:

    ```python
    >>> summarize("accuracy", [0, 1, 1, 1])
    {'accuracy': 0.75, 'accuracy_se': 0.25}
    ```
    """
    n = len(values)
    if n == 0:
        raise ValueError("`predictions` is empty: there is nothing to evaluate.")
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
    return {name: mean, f"{name}_se": error}


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""
    The chance that one or more of k of n answers is correct, of which c are, \\( 1 - \binom{n - c}{k} / \binom{n}{k} \\)
    ([Chen et al.](https://huggingface.co/papers/2107.03374)).

    Args:
        n (`int`):
            Number of answers.
        c (`int`):
            How many of them are correct.
        k (`int`):
            How many are drawn, from 1 to `n`.

    Returns:
        `float`: in [0, 1].

    Example:

    ```python
    >>> pass_at_k(4, 1, 2)
    0.5
    ```
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)
