r"""
Reward functions for text, with TRL's signature: a list of completions and the data set's columns in, one number for
each completion out.

They score two layouts of a completion. The tasks in [`flow_trl.tasks`] put them together and ask for the layout in the
prompt.

* **Confidence**: `<reasoning>..</reasoning><answer>..</answer><analysis>..</analysis><confidence>q</confidence>`.
* **Two attempts**: `<first_attempt>..<answer>..</answer></first_attempt>`, then `<second_attempt>` likewise.

Completions are strings or lists of messages. The right answer is the column `answer` of the data set. What a function
lets one choose is a keyword argument, bound with `functools.partial`:

```python
from functools import partial

from flow_trl.rewards.text import brier_reward, exact_match

reward_func = partial(brier_reward, correct=exact_match)
```

Whatever a model writes, the functions return numbers: they raise only where the data set or an argument is wrong. They
may be called from any thread.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from ..utils import import_extra


CONFIDENCE_TAGS = ("reasoning", "answer", "analysis", "confidence")
ATTEMPT_TAGS = ("first_attempt", "second_attempt")

Correct = Callable[[str | None, str], bool]
Completions = Sequence[str | list[dict[str, Any]]]

MAX_ANSWER_LENGTH = 1000
TIMEOUT = 3  # seconds, for each step of math-verify


# Reading completions


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """
    Returns the text that the model wrote.

    Args:
        completion (`str` or `list[dict]`):
            A string, or messages. Of those, the assistant's count (and those without a role). Their content is a string,
            a list of parts (those with text count), or `None`, as beside tool calls.

    Returns:
        `str`: the text; that of several messages is joined by newlines.

    Example:

    ```python
    >>> completion_text([{"role": "assistant", "content": "<answer>4</answer>"}])
    '<answer>4</answer>'
    ```
    """
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message.get("content")
        if message.get("role", "assistant") != "assistant" or content is None:
            continue
        parts = [content] if isinstance(content, str) else content
        texts.append("".join(part if isinstance(part, str) else part.get("text") or "" for part in parts))
    return "\n".join(texts)


def extract_tag(text: str, tag: str) -> str | None:
    """
    Returns what stands between a pair of tags.

    Args:
        text (`str`):
            Text to look in.
        tag (`str`):
            Name of the tag, without brackets. Upper and lower case differ.

    Returns:
        `str` or `None`: from the first opening tag to the next closing tag, without white space at its ends; `None` if
        there is no such pair.

    Example:

    ```python
    >>> extract_tag("<answer> 4 </answer><answer>5</answer>", "answer")
    '4'
    ```
    """
    return _split_at_tag(text, tag)[0]


def _split_at_tag(text: str, tag: str) -> tuple[str | None, str]:
    """The content of the first pair of tags and the text after it; `None` and the whole text if there is none."""
    _, opening, rest = text.partition(f"<{tag}>")
    content, closing, after = rest.partition(f"</{tag}>")
    return (content.strip(), after) if opening and closing else (None, text)


def parse_confidence(text: str) -> float | None:
    """
    Reads the confidence that a completion states.

    It is the content of the first pair of `<confidence>` tags that follows the answer (of the first, where there is no
    answer), and must be a plain decimal number from 0 to 1: `0.7`, `.7`, `0`, `1.`, `1.00`. A sign, an exponent, a
    percentage, a fraction, a word, a decimal comma or anything beside the number is not accepted, nor is a number above 1.

    Args:
        text (`str`):
            A completion.

    Returns:
        `float` or `None`: the confidence q in [0, 1]; `None` if there is none.

    Example:

    ```python
    >>> parse_confidence("<answer>4</answer> <confidence>0.7</confidence>")
    0.7
    ```
    """
    content = extract_tag(_split_at_tag(text, "answer")[1], "confidence")
    if content is None or not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", content):
        return None
    confidence = float(content)
    return confidence if confidence <= 1 else None


# Is an answer correct?


def exact_match(prediction: str | None, answer: str) -> bool:
    """
    Says whether an answer is the right one, letter by letter.

    Args:
        prediction (`str` or `None`):
            The model's answer; `None` if it gave none.
        answer (`str`):
            The right answer.

    Returns:
        `bool`: whether they are equal, but for white space at their ends. `None` is never correct.

    Example:

    ```python
    >>> exact_match(" 4 ", "4")
    True
    ```
    """
    return prediction is not None and prediction.strip() == str(answer).strip()


def math_correct(prediction: str | None, answer: str) -> bool:
    r"""
    Says whether an answer is mathematically equal to the right one, by
    [math-verify](https://github.com/huggingface/Math-Verify).

    Both are put into `\boxed{}` and parsed as LaTeX, so `1/2`, `0.5` and `\frac{1}{2}` are equal, and a currency sign or
    a unit within `\text{}` does not count. Words do: `18 dollars` and `x is 18` are not 18. Expressions are evaluated:
    `9 + 9` is. Equal strings are always correct.

    Not correct is whatever cannot be parsed, compared within a few seconds, or has more than 1000 characters. Outside
    the main thread, where the timeouts of math-verify do not work, it runs in a process of its own that is started once
    and ends with this one. Results are cached.

    Args:
        prediction (`str` or `None`):
            The model's answer; `None` if it gave none.
        answer (`str`):
            The right answer.

    Returns:
        `bool`: whether they are equal. `None` and the empty text are never correct.

    Raises:
        MissingExtraError: if math-verify is not installed.

    Example:

    ```python
    >>> math_correct("0.5", r"\frac{1}{2}")
    True
    ```
    """
    if not prediction or not prediction.strip():
        return False
    return _math_correct(prediction.strip(), str(answer).strip())


@lru_cache(maxsize=2**15)
def _math_correct(prediction: str, answer: str) -> bool:
    import_extra("math_verify", extra="math", purpose="Comparing mathematical answers")
    if prediction == answer:
        return True
    if max(len(prediction), len(answer)) > MAX_ANSWER_LENGTH:
        return False
    if threading.current_thread() is threading.main_thread():
        return _math_verify(prediction, answer)
    return _math_verify_elsewhere(prediction, answer)


def _math_verify(prediction: str, answer: str) -> bool:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold, target = (parse(rf"\boxed{{{text}}}", parsing_timeout=TIMEOUT) for text in (answer, prediction))
        return bool(verify(gold, target, timeout_seconds=TIMEOUT))
    except (Exception, TimeoutException):  # the latter is no `Exception`
        return False


_helper: subprocess.Popen | None = None
_helper_lock = threading.Lock()


def _math_verify_elsewhere(prediction: str, answer: str) -> bool:
    global _helper
    with _helper_lock:
        if _helper is not None and _helper.poll() is not None:
            _stop_helper()
        if _helper is None:
            # Not `multiprocessing`, which may run the user's script again.
            _helper = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # an interrupt is for this process, with whose end it ends
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            _helper.stdin.write(json.dumps([prediction, answer]) + "\n")
            _helper.stdin.flush()
            return json.loads(_helper.stdout.readline())
        except (OSError, ValueError):  # it has ended
            return False


def _stop_helper() -> None:
    global _helper
    with suppress(OSError), _helper:
        _helper.kill()
    _helper = None


def _serve() -> None:
    """Answers `[prediction, answer]` on each line of the standard input, until that is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the parser may print is no reply
    for line in sys.stdin:
        print(json.dumps(_math_verify(*json.loads(line))), file=replies, flush=True)


# An answer and the confidence in it


def correctness_reward(
    completions: Completions, answer: Sequence[str] | None = None, *, correct: Correct = math_correct, **kwargs: Any
) -> list[float]:
    """
    Rewards a correct answer: c is 1 if the content of the first `<answer>` is correct, else 0.

    It is an outcome function as well: `Block(..., outcome=correctness_reward)`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`; the prediction is `None` where there is no answer.
        kwargs:
            Not used.

    Returns:
        `list[float]`: c, 1.0 or 0.0.

    Raises:
        ValueError: if the data set has no column `answer`.

    Example:

    ```python
    >>> correctness_reward(["<answer>0.5</answer>", "<answer>2</answer>", "0.5"], answer=["1/2", "1/2", "1/2"])
    [1.0, 0.0, 0.0]
    ```
    """
    texts = [completion_text(completion) for completion in completions]
    return _correctness([extract_tag(text, "answer") for text in texts], answer, correct)


def brier_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a confidence q in the answer by the Brier score,

    $$ r = -(q - c)^2, $$

    with c = 1 if the answer is correct and 0 if not ([RLCR](https://huggingface.co/papers/2507.16806)). Its
    expectation is highest where q is the probability of being correct.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`.
        log_metric (`Callable`, *optional*):
            Passed by the trainer. The share of completions without a readable confidence
            ([`~rewards.text.parse_confidence`]) is logged as `confidence/unparsable`.
        kwargs:
            Not used.

    Returns:
        `list[float]`: rewards in [-1, 0]; -1, the lowest, without a readable confidence.

    Raises:
        ValueError: if the data set has no column `answer`.

    Example:

    ```python
    >>> brier_reward(["<answer>4</answer><confidence>0.5</confidence>", "<answer>4</answer>"], answer=["4", "4"])
    [-0.25, -1.0]
    ```
    """
    c = correctness_reward(completions, answer, correct=correct)
    q = _confidences(completions, log_metric)
    return [-1.0 if qi is None else 0.0 - (qi - ci) ** 2 for qi, ci in zip(q, c, strict=True)]


def bce_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    eps: float = 0.01,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a confidence q in the answer by the logarithmic score (the negative binary cross-entropy),

    $$ r = c \log q + (1 - c) \log (1 - q), \quad q \in [\varepsilon, 1 - \varepsilon], $$

    with c = 1 if the answer is correct and 0 if not ([Blockwise Advantage
    Estimation](https://huggingface.co/papers/2602.10231)). Its expectation is highest where q is the probability of being
    correct.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`.
        eps (`float`, *optional*, defaults to `0.01`):
            Confidences are clipped to [eps, 1 - eps], in (0, 0.5). The default is the step of a confidence with two
            decimals: only 0 and 1 change, and the lowest reward is -4.6.
        log_metric (`Callable`, *optional*):
            Passed by the trainer. The share of completions without a readable confidence
            ([`~rewards.text.parse_confidence`]) is logged as `confidence/unparsable`.
        kwargs:
            Not used.

    Returns:
        `list[float]`: rewards in [log eps, log(1 - eps)]; log eps, the lowest, without a readable confidence.

    Raises:
        ValueError: if `eps` is not in (0, 0.5), or if the data set has no column `answer`.

    Example:

    ```python
    >>> bce_reward(["<answer>4</answer><confidence>0.5</confidence>"], answer=["4"])
    [-0.6931471805599453]
    ```
    """
    if not 0 < eps < 0.5:
        raise ValueError(f"`eps={eps}`: confidences are clipped to [eps, 1 - eps]; it must be in (0, 0.5).")
    c = correctness_reward(completions, answer, correct=correct)
    q = _confidences(completions, log_metric)
    rewards = []
    for qi, ci in zip(q, c, strict=True):
        # The probability that was given to what is the case.
        p = 0.0 if qi is None else qi if ci else 1 - qi
        rewards.append(math.log(min(max(p, eps), 1 - eps)))
    return rewards


def rlcr_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a correct answer and the confidence q in it with one number for the whole completion, as
    [RLCR](https://huggingface.co/papers/2507.16806) does:

    $$ r = c - (q - c)^2, $$

    with c = 1 if the answer is correct and 0 if not. It is the sum of [`~rewards.text.correctness_reward`] and
    [`~rewards.text.brier_reward`].

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`.
        log_metric (`Callable`, *optional*):
            Passed by the trainer. The share of completions without a readable confidence
            ([`~rewards.text.parse_confidence`]) is logged as `confidence/unparsable`.
        kwargs:
            Not used.

    Returns:
        `list[float]`: rewards in [0, 1] for correct answers and in [-1, 0] for others; the lowest of those, c - 1,
        without a readable confidence.

    Raises:
        ValueError: if the data set has no column `answer`.

    Example:

    ```python
    >>> rlcr_reward(["<answer>4</answer><confidence>0.5</confidence>"] * 2, answer=["4", "5"])
    [0.75, -0.25]
    ```
    """
    c = correctness_reward(completions, answer, correct=correct)
    scores = brier_reward(completions, answer, correct=correct, log_metric=log_metric)
    return [ci + score for ci, score in zip(c, scores, strict=True)]


def confidence_format_reward(completions: Completions, **kwargs: Any) -> list[float]:
    """
    Rewards the layout of a completion with a confidence: `<reasoning>`, `<answer>`, `<analysis>` and `<confidence>`, each
    once and closed, in this order, with nothing but white space around them.

    What stands within the tags does not count: an unreadable confidence is scored by the confidence's own reward.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        kwargs:
            Not used.

    Returns:
        `list[float]`: 1.0 or 0.0.

    Example:

    ```python
    >>> confidence_format_reward(["<answer>4</answer>"])
    [0.0]
    ```
    """
    return [float(_is_sequence(completion_text(completion), CONFIDENCE_TAGS)) for completion in completions]


# Two attempts


def first_attempt_reward(
    completions: Completions, answer: Sequence[str] | None = None, *, correct: Correct = math_correct, **kwargs: Any
) -> list[float]:
    """
    Rewards a correct first attempt: c_1 is 1 if the `<answer>` within `<first_attempt>` is correct, else 0.

    It is an outcome function as well: `Block(..., outcome=first_attempt_reward)`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`; the prediction is `None` where there is no answer.
        kwargs:
            Not used.

    Returns:
        `list[float]`: c_1, 1.0 or 0.0.

    Raises:
        ValueError: if the data set has no column `answer`.

    Example:

    ```python
    >>> first_attempt_reward(["<first_attempt>2 + 2 <answer>4</answer></first_attempt>"], answer=["4"])
    [1.0]
    ```
    """
    return _correctness([_attempts(completion)[0] for completion in completions], answer, correct)


def second_attempt_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    different: float = 0.1,
    **kwargs: Any,
) -> list[float]:
    """
    Rewards a correct second attempt, and a little one that at least tries another answer ([Blockwise Advantage
    Estimation](https://huggingface.co/papers/2602.10231)): 1 if the `<answer>` within `<second_attempt>` is correct, 0.1
    if it is wrong and differs from that of the first attempt, 0 if it is the same or missing.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`. It also says whether both attempts have the same answer.
        different (`float`, *optional*, defaults to `0.1`):
            Reward of a wrong answer that differs from the first one.
        kwargs:
            Not used.

    Returns:
        `list[float]`: 1.0, `different` or 0.0.

    Raises:
        ValueError: if the data set has no column `answer`.

    Example:

    ```python
    >>> text = "<first_attempt><answer>{}</answer></first_attempt><second_attempt><answer>{}</answer></second_attempt>"
    >>> second_attempt_reward([text.format(5, 4), text.format(5, 6), text.format(5, 5)], answer=["4", "4", "4"])
    [1.0, 0.1, 0.0]
    ```
    """
    attempts = [_attempts(completion) for completion in completions]
    rewards = _correctness([second for _, second in attempts], answer, correct)
    for i, (first, second) in enumerate(attempts):
        if second and not rewards[i] and (first is None or not correct(second, first)):
            rewards[i] = different
    return rewards


def two_attempts_format_reward(completions: Completions, **kwargs: Any) -> list[float]:
    """
    Rewards the layout of a completion with two attempts: `<first_attempt>` and `<second_attempt>`, each once and closed,
    in this order, with nothing but white space around them, and each with one `<answer>`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        kwargs:
            Not used.

    Returns:
        `list[float]`: 1.0 or 0.0.

    Example:

    ```python
    >>> two_attempts_format_reward(["<first_attempt><answer>4</answer></first_attempt>"])
    [0.0]
    ```
    """
    rewards = []
    for completion in completions:
        text = completion_text(completion)
        attempts = [extract_tag(text, tag) or "" for tag in ATTEMPT_TAGS]
        one_answer = all(
            extract_tag(attempt, "answer") is not None and attempt.count("<answer>") == attempt.count("</answer>") == 1
            for attempt in attempts
        )
        rewards.append(float(_is_sequence(text, ATTEMPT_TAGS) and one_answer))
    return rewards


def _correctness(predictions: list[str | None], answer: Sequence[str] | None, correct: Correct) -> list[float]:
    if answer is None:
        raise ValueError(
            "The data set has no column `answer`, which holds the right answers: rename the one that does with "
            "`dataset.rename_column(..., 'answer')`, or let `prepare` of a task in `flow_trl.tasks` do it."
        )
    return [float(correct(*pair)) for pair in zip(predictions, answer, strict=True)]


def _confidences(completions: Completions, log_metric: Callable[[str, float], None] | None) -> list[float | None]:
    confidences = [parse_confidence(completion_text(completion)) for completion in completions]
    if log_metric is not None and confidences:
        log_metric("confidence/unparsable", confidences.count(None) / len(confidences))
    return confidences


def _attempts(completion: str | list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """The answers of the first and of the second attempt."""
    first, rest = _split_at_tag(completion_text(completion), ATTEMPT_TAGS[0])
    second = extract_tag(rest, ATTEMPT_TAGS[1])
    return extract_tag(first or "", "answer"), extract_tag(second or "", "answer")


def _is_sequence(text: str, tags: tuple[str, ...]) -> bool:
    """Whether the text consists of these pairs of tags, each once and in order, and white space."""
    if any(text.count(bracket) != 1 for tag in tags for bracket in (f"<{tag}>", f"</{tag}>")):
        return False
    pairs = r"\s*".join(rf"<{tag}>.*</{tag}>" for tag in tags)
    return re.fullmatch(rf"\s*{pairs}\s*", text, re.DOTALL) is not None
