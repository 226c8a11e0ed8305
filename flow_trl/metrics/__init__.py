"""
Metrics as modules for [`evaluate`](https://huggingface.co/docs/evaluate): one folder each, with its card, its test cases and
the app of its Space.

[`load`] loads one by its name, `evaluate.load(folder)` by its folder, and `python -m flow_trl.metrics push --namespace user`
makes each a Space, from which `evaluate.load("user/name")` loads it. What has no value (the standard error of a single
sample) is `None`, so that `evaluate.save` writes valid JSON.
"""

import math
from collections.abc import Hashable, Sequence
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


def check_samples(n: int, groups: Sequence[Hashable] | None = None) -> None:
    """Raises a `ValueError` if none of `n` samples is there to evaluate, or if there are not as many groups."""
    if n == 0:
        raise ValueError("`predictions` is empty: there is nothing to evaluate.")
    if groups is not None and len(groups) != n:
        raise ValueError(f"`groups` has {len(groups)} entries, but there are {n} samples: pass one for each.")


def summarize(name: str, values: Sequence[float], groups: Sequence[Hashable] | None = None) -> dict[str, float | None]:
    """
    A mean and its standard error.

    Args:
        name (`str`):
            Name of the mean.
        values (`Sequence[float]`):
            One or more values.
        groups (`Sequence`, *optional*):
            Names what each value belongs to, such as the prompt of an image: values of one group resemble each other and are
            not worth as many independent ones.

    Returns:
        `dict[str, float | None]`: `name`, and `{name}_se`, std / sqrt(n), or with groups the one that allows for their
        resemblance: sqrt(G / (G - 1) * sum over groups of (sum of deviations from the mean)^2) / n. It is `None` for one value
        or group.

    Raises:
        ValueError: if there are no values, or not as many groups.

    Example:

    ```python
    >>> summarize("accuracy", [0, 1, 1, 1])
    {'accuracy': 0.75, 'accuracy_se': 0.25}
    ```
    """
    n = len(values)
    check_samples(n, groups)
    mean = math.fsum(values) / n
    deviations: dict[Hashable, list[float]] = {}
    for group, value in zip(range(n) if groups is None else groups, values, strict=True):
        deviations.setdefault(group, []).append(value - mean)
    count, squares = len(deviations), math.fsum(math.fsum(own) ** 2 for own in deviations.values())
    return {name: mean, f"{name}_se": math.sqrt(count / (count - 1) * squares) / n if count > 1 else None}


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    The unbiased estimate of pass@k of [Chen et al.](https://huggingface.co/papers/2107.03374): the probability that one or more of
    k samples, drawn without replacement from n of which c are correct, is correct.

    Args:
        n (`int`):
            Number of samples.
        c (`int`):
            Number of correct ones.
        k (`int`):
            Number that is drawn, from 1 to n.

    Returns:
        `float`: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: if `k` is below 1 or above n.

    Example:

    ```python
    >>> pass_at_k(4, 1, 2)
    0.5
    ```
    """
    if not 1 <= k <= n:
        raise ValueError(f"`k` holds {k}, but a prompt has {n} answers: use values from 1 to {n}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
