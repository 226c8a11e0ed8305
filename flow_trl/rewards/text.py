r"""
Reward functions for text, with TRL's signature: a list of completions and the data set's columns in, one number for
each completion out.

They score two layouts of a completion. The tasks in [`flow_trl.tasks`] put them together and ask for the layout in the
prompt.

* **Confidence**: `<reasoning>..</reasoning><answer>..</answer><analysis>..</analysis><confidence>q</confidence>`.
* **Two attempts**: `<first_attempt>..<answer>..</answer></first_attempt>`, then `<second_attempt>` likewise.

Of several answers the last before the confidence counts, which is the last that follows an answer; answers and confidences
may be written as people write them ([`~rewards.text.math_correct`], [`~rewards.text.parse_confidence`]). With `strict=True`,
and `correct=math_correct_strict`, the first counts and nothing but the bare expression or number.

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

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from ..utils import import_extra
from . import math_pool


CONFIDENCE_TAGS = ("reasoning", "answer", "analysis", "confidence")
ATTEMPT_TAGS = ("first_attempt", "second_attempt")

Correct = Callable[[str | None, str], bool]
Completions = Sequence[str | list[dict[str, Any]]]

MAX_ANSWER_LENGTH = 1000
CACHE_SIZE = 2**16


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
    Returns what stands from the first opening tag of a name (without brackets, as it is written) to the next closing tag,
    without white space at its ends; `None` if there is no such pair.

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


def _last_tag(text: str, tag: str, end: int) -> tuple[int, str] | None:
    """Where the last pair of tags before a position begins, and what stands in it."""
    while (start := text.rfind(f"<{tag}>", 0, end)) >= 0:
        closing = text.find(f"</{tag}>", start, end)
        if closing >= 0:
            return start, text[start + len(tag) + 2 : closing].strip()
        end = start
    return None


def _read_pair(text: str, first: str, second: str, strict: bool) -> tuple[str | None, str | None]:
    """What stands in two pairs of tags, of which the second follows the first."""
    if strict:
        content, rest = _split_at_tag(text, first)
        return content, extract_tag(rest, second)
    later = _last_tag(text, second, len(text))
    earlier = later and _last_tag(text, first, later[0])
    if earlier is None:
        earlier = _last_tag(text, first, len(text))
        later = None if earlier else later
    return earlier and earlier[1], later and later[1]


def read_answer(text: str, strict: bool = False) -> str | None:
    """
    Reads the answer that a completion gives: what stands in the last `<answer>` before the confidence, or if `strict` in
    the first; `None` if there is none.

    Example:

    ```python
    >>> read_answer("<answer>5</answer> No: <answer>4</answer> <confidence>0.7</confidence>")
    '4'
    ```
    """
    return _read_pair(text, "answer", "confidence", strict)[0]


def parse_confidence(text: str, strict: bool = False) -> float | None:
    """
    Reads the confidence that a completion states.

    It is the content of the last pair of `<confidence>` tags that follows an answer (of the last, where there is no
    answer): a decimal number from 0 to 1, also with a decimal comma, or a percentage, with or without Markdown or a final
    dot: `0.7`, `.7`, `1.`, `0,7`, `70%`, `**0.7**`. A sign, an exponent, a fraction, a word or a number above 1 is not
    accepted.

    Args:
        text (`str`):
            A completion.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the first pair after the first answer counts, and must be a plain decimal number.

    Returns:
        `float` or `None`: the confidence q in [0, 1]; `None` if there is none.

    Example:

    ```python
    >>> parse_confidence("<answer>4</answer> <confidence>70 %</confidence>")
    0.7
    ```
    """
    content = _read_pair(text, "answer", "confidence", strict)[1]
    if content is None:
        return None
    percentage = False
    if not strict:
        content = _without_markdown(content).replace("\\%", "%").strip("$ ")
        percentage = content.endswith("%")
        content = content.removesuffix("%").rstrip()
        content = re.sub(r"^([0-9]*),([0-9]+)$", r"\1.\2", content)
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", content):
        return None
    confidence = float(content) / (100 if percentage else 1)
    return confidence if confidence <= 1 else None


def _without_markdown(text: str) -> str:
    text = re.sub(r"^#+\s+|\*\*|__|`", "", text.strip()).strip()
    if len(text) > 2 and text[0] == text[-1] == "*":
        text = text[1:-1].strip()
    return text.rstrip(".").rstrip() if re.search(r"[^.]\.$", text) else text


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
    [math-verify](https://github.com/huggingface/Math-Verify), however it is wrapped.

    As [`~rewards.text.math_correct_strict`], and also right are Markdown (`**18**`), a final dot, a currency or a unit
    (`USD 18`, `18 dollars`, `90%` for 90 as well as for 0.9), a decimal comma (`0,9`), `The answer is ...`, and a sentence
    with one number, unless a word changes it (`not 18`, `at least 18`, `18 or more`).

    Arguments, result and error are those of [`~rewards.text.math_correct_strict`].

    Example:

    ```python
    >>> math_correct("The answer is **18** apples.", "18")
    True
    ```
    """
    return _math_correct([prediction], [answer], strict=False)[0]


def math_correct_strict(prediction: str | None, answer: str) -> bool:
    r"""
    Says whether an answer is mathematically equal to the right one, by
    [math-verify](https://github.com/huggingface/Math-Verify).

    Both are put into `\boxed{}` and parsed as LaTeX, so `1/2`, `0.5` and `\frac{1}{2}` are equal, and a currency sign or
    a unit within `\text{}` does not count. Words do: `18 dollars` and `x is 18` are not 18. Expressions are evaluated:
    `9 + 9` is. Equal strings are always correct.

    Not correct is whatever cannot be parsed, has more than 1000 characters, or takes too long: a few seconds for an answer,
    15 for all that are compared at once ([`~rewards.math_pool.compare`]). Results are cached.

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
    >>> math_correct_strict("0.5", r"\frac{1}{2}")
    True
    ```
    """
    return _math_correct([prediction], [answer], strict=True)[0]


_cache: dict[tuple[str, str, bool], bool] = {}


def _math_correct(predictions: Sequence[str | None], answers: Sequence[str], strict: bool) -> list[bool]:
    """Whether answers are right; those that have to be compared are compared together."""
    keys = [
        ((prediction or "").strip(), str(answer).strip(), strict)
        for prediction, answer in zip(predictions, answers, strict=True)
    ]
    found: dict[tuple[str, str, bool], bool] = {}
    jobs: dict[tuple[str, str, bool], math_pool.Job] = {}
    for key in dict.fromkeys(keys):
        prediction, answer, _ = key
        if not prediction:
            found[key] = False
            continue
        import_extra("math_verify", extra="math", purpose="Comparing mathematical answers")
        if prediction == answer or key in _cache:
            found[key] = prediction == answer or _cache[key]
        elif max(len(prediction), len(answer)) > MAX_ANSWER_LENGTH:
            found[key] = False
        else:
            readings = [prediction] if strict else _readings(prediction)
            same = [True if reading == answer else _same_number(reading, answer) for reading in readings]
            unknown = tuple(reading for reading, result in zip(readings, same, strict=True) if result is None)
            if True in same or not unknown:
                found[key] = True in same
            else:
                jobs[key] = unknown, answer
    for key, result in zip(jobs, math_pool.compare(list(jobs.values())), strict=True):
        found[key] = bool(result)
        if result is not None:
            if len(_cache) >= CACHE_SIZE:
                del _cache[next(iter(_cache))]
            _cache[key] = result
    return [found[key] for key in keys]


math_correct.many = partial(_math_correct, strict=False)
math_correct_strict.many = partial(_math_correct, strict=True)


_RATIONAL = re.compile(r"([-+]?)(?:([0-9]+(?:\.[0-9]+)?)|([0-9]+)/([0-9]+)|\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\})")


def _same_number(prediction: str, answer: str) -> bool | None:
    """Whether two plain numbers or fractions are the same; `None` where that has to be found out otherwise."""
    values = []
    for text in (prediction, answer):
        match = _RATIONAL.fullmatch(text)
        if match is None:
            return None
        sign, number, *fractions = match.groups()
        top, bottom = ([part for part in fractions if part] + ["1", "1"])[:2]
        if number is None and int(bottom) == 0:
            return None
        values.append(Fraction(number or Fraction(int(top), int(bottom))) * (-1 if sign == "-" else 1))
    if values[0] == values[1]:
        return True
    return None if "." in prediction + answer else False


_NUMBER = re.compile(
    r"(?<![\w.,/])[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?![0-9])"
)
_LEAD = re.compile(
    r"[A-Za-z]\s+is\s+|(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?(?:answer|result|solution|total)"
    r"\s*(?:is|are|equals|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_UNITS = frozenset("km m cm mm kg g mg lb lbs oz l ml h min s ms mph kmh usd eur gbp am pm".split())
# With one of these a sentence says something else than its number.
_CHANGING = frozenset(
    """not no never none nor neither cannot except without less more than least most over under above below about
    approximately approx around roughly nearly almost between exceeds minus negative plus times by divided half third quarter
    double twice triple dozen squared cubed root square cube power factorial percentile or either per hundred hundreds
    thousand million billion trillion k one two three four five six seven eight nine ten eleven twelve if unless maybe
    perhaps wrong incorrect unknown""".split()
)


def _readings(prediction: str) -> list[str]:
    """What an answer may mean: itself, and what is left of it without what people put around an answer."""
    text = _without_markdown(prediction)
    text = re.sub(r"\\text\{\s*([A-Za-z ]*)\}", r" \1", text) if "\\text" in text else text
    if len(text) > 2 and (text[0], text[-1]) in {('"', '"'), ("'", "'"), ("“", "”")}:
        text = text[1:-1]
    text = _without_markdown(text)
    bare = _without_markdown(_LEAD.sub("", text, count=1) if _LEAD.match(text) else text)
    readings = [prediction, text, bare]
    if re.fullmatch(r"[-+]?[0-9]+,[0-9]{1,2}|[-+]?0,[0-9]+", bare):
        readings.append(bare.replace(",", "."))
    numbers = list(_NUMBER.finditer(bare))
    if len(numbers) == 1 and numbers[0][0] != bare:
        before, after = bare[: numbers[0].start()], bare[numbers[0].end() :]
        unit = re.match(r"[^\W\d_]+", after)
        words = [word.lower() for word in re.findall(r"[^\W\d_]+", f"{before} {after}")]
        signs = set(re.sub(r"[\w\s]", "", before + after)) | set(re.findall(r"[\d_]", before + after))
        if (
            signs <= set("$€£¥%°.,:;'’\"“”-")
            and not before.rstrip().endswith("-")
            and (unit is None or unit[0].lower() in _UNITS)
            and all(len(word) > 1 or word in ("a", "i") or word in _UNITS for word in words)
            and not _CHANGING.intersection(words)
            and not any(word.endswith("n") and f"{word}'t" in bare.lower() for word in words)
        ):
            readings.append(numbers[0][0].replace(",", "").replace("\u2212", "-"))
    return list(dict.fromkeys(reading for reading in readings if reading))


# An answer and the confidence in it


def correctness_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    strict: bool = False,
    **kwargs: Any,
) -> list[float]:
    """
    Rewards a correct answer: c is 1 if the content of the last `<answer>` before the confidence is correct, else 0.

    It is an outcome function as well: `Block(..., outcome=correctness_reward)`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions to score.
        answer (`list[str]`):
            The right answers, a column of the data set.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`; the prediction is `None` where there is no answer.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the first answer counts.
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
    return _correctness([read_answer(text, strict) for text in texts], answer, correct)


def brier_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    strict: bool = False,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a confidence q in the answer by the Brier score,

    $$ r = -(q - c)^2, $$

    with c = 1 if the answer is correct and 0 if not ([RLCR](https://huggingface.co/papers/2507.16806)). Its
    expectation is highest where q is the probability of being correct.

    The arguments that are not listed are those of [`~rewards.text.correctness_reward`].

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Whether the first answer and confidence count, and only a plain number is a confidence.
        log_metric (`Callable`, *optional*):
            Passed by the trainer. The share of completions without a readable confidence
            ([`~rewards.text.parse_confidence`]) is logged as `confidence/unparsable`.

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
    read = _correctness_and_confidence(completions, answer, correct, strict, log_metric)
    return [-1.0 if q is None else 0.0 - (q - c) ** 2 for c, q in read]


def bce_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    strict: bool = False,
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

    The arguments that are not listed are those of [`~rewards.text.brier_reward`].

    Args:
        eps (`float`, *optional*, defaults to `0.01`):
            Confidences are clipped to [eps, 1 - eps], in (0, 0.5). The default is the step of a confidence with two
            decimals: only 0 and 1 change, and the lowest reward is -4.6.

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
    rewards = []
    for c, q in _correctness_and_confidence(completions, answer, correct, strict, log_metric):
        # The probability that was given to what is the case.
        p = 0.0 if q is None else q if c else 1 - q
        rewards.append(math.log(min(max(p, eps), 1 - eps)))
    return rewards


def dcpo_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    prompts: Sequence[Any],
    correct: Correct = math_correct,
    strict: bool = False,
    group_weight: float = 0.5,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a confidence q that is near to how often the prompt is answered correctly and to whether it was
    ([DCPO](https://huggingface.co/papers/2603.09117)),

    $$ r = -\lvert q - (\lambda \bar c + (1 - \lambda) c) \rvert, $$

    with c = 1 if the answer is correct and 0 if not, and \\( \bar c \\) its mean over the completions of the same prompt.

    The arguments that are not listed are those of [`~rewards.text.brier_reward`].

    Args:
        prompts (`list`):
            The prompt of each completion; those that are equal are a group. A process sees its own completions alone,
            so `per_device_train_batch_size * steps_per_generation` must be a multiple of `num_generations`.
        group_weight (`float`, *optional*, defaults to `0.5`):
            The weight \\( \lambda \\) of the group, in [0, 1].

    Returns:
        `list[float]`: rewards in [-1, 0]; -1, the lowest, without a readable confidence.

    Raises:
        ValueError: if `group_weight` is not in [0, 1], or if the data set has no column `answer`.

    Example:

    ```python
    >>> completions = [f"<answer>{a}</answer><confidence>0.5</confidence>" for a in (4, 5)]
    >>> dcpo_reward(completions, answer=["4", "4"], prompts=["2 + 2?"] * 2)
    [-0.25, -0.25]
    ```
    """
    if not 0 <= group_weight <= 1:
        raise ValueError(f"`group_weight={group_weight}`: it must be in [0, 1].")
    read = _correctness_and_confidence(completions, answer, correct, strict, log_metric)
    groups: dict[str, list[float]] = {}
    for prompt, (c, _) in zip(prompts, read, strict=True):
        groups.setdefault(str(prompt), []).append(c)
    means = {prompt: sum(values) / len(values) for prompt, values in groups.items()}
    return [
        -1.0 if q is None else 0.0 - abs(q - group_weight * means[str(prompt)] - (1 - group_weight) * c)
        for prompt, (c, q) in zip(prompts, read, strict=True)
    ]


dcpo_reward.needs_whole_groups = True


def rlcr_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    strict: bool = False,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    r"""
    Rewards a correct answer and the confidence q in it with one number for the whole completion, as
    [RLCR](https://huggingface.co/papers/2507.16806) does:

    $$ r = c - (q - c)^2, $$

    with c = 1 if the answer is correct and 0 if not. It is the sum of [`~rewards.text.correctness_reward`] and
    [`~rewards.text.brier_reward`].

    The arguments are those of [`~rewards.text.brier_reward`].

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
    c = correctness_reward(completions, answer, correct=correct, strict=strict)
    scores = brier_reward(completions, answer, correct=correct, strict=strict, log_metric=log_metric)
    return [ci + score for ci, score in zip(c, scores, strict=True)]


def confidence_format_reward(completions: Completions, **kwargs: Any) -> list[float]:
    """
    Rewards the layout of a completion with a confidence: `<reasoning>`, `<answer>`, `<analysis>` and `<confidence>`, each
    once and closed, in this order, with nothing but white space around them.

    What stands within the tags does not count: an unreadable confidence is scored by the confidence's own reward.
    Nothing but `completions` is used.

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
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    strict: bool = False,
    **kwargs: Any,
) -> list[float]:
    """
    Rewards a correct first attempt: c_1 is 1 if the `<answer>` within `<first_attempt>` is correct, else 0.

    It is an outcome function as well: `Block(..., outcome=first_attempt_reward)`.

    The arguments that are not listed are those of [`~rewards.text.correctness_reward`].

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Whether the first attempts and answers count, and not the last.

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
    return _correctness(
        [read_attempts(completion_text(completion), strict)[0] for completion in completions], answer, correct
    )


def second_attempt_reward(
    completions: Completions,
    answer: Sequence[str] | None = None,
    *,
    correct: Correct = math_correct,
    different: float = 0.1,
    strict: bool = False,
    **kwargs: Any,
) -> list[float]:
    """
    Rewards a correct second attempt, and a little one that at least tries another answer ([Blockwise Advantage
    Estimation](https://huggingface.co/papers/2602.10231)): 1 if the `<answer>` within `<second_attempt>` is correct, 0.1
    if it is wrong and differs from that of the first attempt, 0 if it is the same or missing.

    The arguments that are not listed are those of [`~rewards.text.first_attempt_reward`].

    Args:
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`. It also says whether both attempts have the same answer.
        different (`float`, *optional*, defaults to `0.1`):
            Reward of a wrong answer that differs from the first one.

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
    attempts = [read_attempts(completion_text(completion), strict) for completion in completions]
    rewards = _correctness([second for _, second in attempts], answer, correct)
    for i, (first, second) in enumerate(attempts):
        if second and not rewards[i] and (first is None or not correct(second, first)):
            rewards[i] = different
    return rewards


def two_attempts_format_reward(completions: Completions, **kwargs: Any) -> list[float]:
    """
    Rewards the layout of a completion with two attempts: `<first_attempt>` and `<second_attempt>`, each once and closed,
    in this order, with nothing but white space around them, and each with one `<answer>`.
    Nothing but `completions` is used.

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
    if len(predictions) != len(answer):
        raise ValueError(f"There are {len(predictions)} completions and {len(answer)} values in the column `answer`.")
    many = getattr(correct, "many", None)
    results = many(predictions, answer) if many else map(correct, predictions, answer)
    return [float(result) for result in results]


def _correctness_and_confidence(
    completions: Completions,
    answer: Sequence[str] | None,
    correct: Correct,
    strict: bool,
    log_metric: Callable[[str, float], None] | None,
) -> list[tuple[float, float | None]]:
    correctness = correctness_reward(completions, answer, correct=correct, strict=strict)
    confidences = [parse_confidence(completion_text(completion), strict) for completion in completions]
    if log_metric is not None and confidences:
        log_metric("confidence/unparsable", confidences.count(None) / len(confidences))
    return list(zip(correctness, confidences, strict=True))


def read_attempts(text: str, strict: bool = False) -> tuple[str | None, str | None]:
    """
    Reads the answers of both attempts in a completion: what stands in the `<answer>` of each, of several in the last or if
    `strict` in the first; `None` if there is none.

    Example:

    ```python
    >>> read_attempts("<first_attempt><answer>4</answer></first_attempt>")
    ('4', None)
    ```
    """
    return tuple(
        _read_pair(attempt or "", "answer", "confidence", strict)[0]
        for attempt in _read_pair(text, *ATTEMPT_TAGS, strict)
    )


def _is_sequence(text: str, tags: tuple[str, ...]) -> bool:
    """Whether the text consists of these pairs of tags, each once and in order, and white space."""
    if any(text.count(bracket) != 1 for tag in tags for bracket in (f"<{tag}>", f"</{tag}>")):
        return False
    pairs = r"\s*".join(rf"<{tag}>.*</{tag}>" for tag in tags)
    return re.fullmatch(rf"\s*{pairs}\s*", text, re.DOTALL) is not None
