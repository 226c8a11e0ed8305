"""Tasks for [`BlockwiseGRPOTrainer`]: the instruction, the blocks, and the same rewards for plain GRPO."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .blocks import Block
from .rewards.text import (
    Correct,
    bce_reward,
    brier_reward,
    confidence_format_reward,
    correctness_reward,
    dcpo_reward,
    exact_match,
    first_attempt_reward,
    math_correct,
    math_correct_strict,
    rlcr_reward,
    second_attempt_reward,
    two_attempts_format_reward,
)
from .utils import import_extra


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


CONFIDENCE_SYSTEM_PROMPT = """\
You solve problems and say how likely your solution is to be right. Write four parts, in this order and nothing else:

<reasoning>Solve the problem step by step.</reasoning>
<answer>Only the final result, without words or explanation.</answer>
<analysis>Look at your solution critically: which steps could be wrong, and what did you not check?</analysis>
<confidence>The probability that your answer is right, as a decimal number from 0 to 1, for example 0.35.</confidence>

Be honest about the probability: of all answers to which you give 0.3, three in ten should be right. Claiming more or \
less than you believe costs points."""

TWO_ATTEMPTS_SYSTEM_PROMPT = """\
You get two attempts at each problem, and write both, in this order and nothing else:

<first_attempt>Solve the problem step by step, then give the result: <answer>result</answer></first_attempt>
<second_attempt>Check your first attempt. If you find a mistake, solve the problem anew, in another way if you can; if \
not, keep the result. Then give it: <answer>result</answer></second_attempt>

Within <answer> write only the final result, without words or explanation."""

CORRECT: dict[str, Correct] = {"exact": exact_match, "math": math_correct, "math_strict": math_correct_strict}
# With the lowest reward, which is that of a confidence that cannot be read, or is missing.
SCORES = {"bce": (bce_reward, math.log(0.01)), "brier": (brier_reward, -1.0), "dcpo": (dcpo_reward, -1.0)}


@dataclass(frozen=True)
class Task:
    """
    What a model should write, and how it is rewarded.

    Args:
        system_prompt (`str`):
            Says how a completion should look.
        blocks (`list[Block]`):
            The blocks of a completion, for [`BlockwiseGRPOTrainer`].
        scalar_reward_funcs (`list[Callable]`):
            Reward functions for the whole completion: the same task for [`~trl.GRPOTrainer`], the baseline.
        scalar_reward_weights (`list[float]`):
            Their weights, for `GRPOConfig(reward_weights=...)`.

    Example:

    ```python
    from trl import GRPOConfig, GRPOTrainer

    from flow_trl import BlockwiseGRPOTrainer
    from flow_trl.tasks import confidence_task

    task = confidence_task()
    dataset = task.prepare(load_dataset("HuggingFaceH4/MATH-500", split="test"))

    trainer = BlockwiseGRPOTrainer("Qwen/Qwen2.5-3B-Instruct", blocks=task.blocks, train_dataset=dataset)

    baseline = GRPOTrainer(
        "Qwen/Qwen2.5-3B-Instruct",
        reward_funcs=task.scalar_reward_funcs,
        args=GRPOConfig(reward_weights=task.scalar_reward_weights),
        train_dataset=dataset,
    )
    ```
    """

    system_prompt: str
    blocks: list[Block]
    scalar_reward_funcs: list[Callable]
    scalar_reward_weights: list[float]

    def prepare(
        self,
        dataset: "Dataset | IterableDataset",
        prompt_column: str = "problem",
        answer_column: str = "answer",
    ) -> "Dataset | IterableDataset":
        """
        Makes a data set for training: the column `prompt` holds the system prompt and the problem as messages, the
        column `answer` the right answer as a string. Other columns stay.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Problems and their answers: one split. A streamed one is checked row by row as it is read.
            prompt_column (`str`, *optional*, defaults to `"problem"`):
                Column with the problem, a string.
            answer_column (`str`, *optional*, defaults to `"answer"`):
                Column with the final answer, a string or a number. A column `answer` beside it (in GSM8K the whole
                solution) is replaced.

        Returns:
            [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: as `dataset`, with `prompt` and `answer` and
            without `prompt_column` and `answer_column`.

        Raises:
            TypeError: if `dataset` is a dictionary of splits.
            ValueError: if a column is missing, or a row has no problem or no answer.

        Example:

        ```python
        >>> dataset = Dataset.from_list([{"problem": "2 + 2?", "answer": 4}])
        >>> row = confidence_task().prepare(dataset)[0]
        >>> [message["role"] for message in row["prompt"]], row["answer"]
        (['system', 'user'], '4')
        ```
        """
        from datasets import Features, Value

        if isinstance(dataset, Mapping):
            raise TypeError(
                f"`dataset` is a dictionary of splits: pass one of them, such as `dataset[{[*dataset][0]!r}]`."
            )

        def check_columns(columns: Collection[str]) -> None:
            for argument, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
                if column not in columns:
                    raise ValueError(
                        f"`{argument}={column!r}`: the data set has no such column. It has "
                        f"{', '.join(map(repr, columns))}."
                    )

        features = dataset.features  # None where a streamed data set does not know its columns before it is read
        if features is not None:
            check_columns(features)

        def prepare_row(row: dict, index: int) -> dict:
            check_columns(row)
            problem, answer = row[prompt_column], row[answer_column]
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError(
                    f"Row {index}: the problem in column {prompt_column!r} is {problem!r}: it must be text."
                )
            answer = "" if answer is None else str(answer).strip()
            if not answer:
                raise ValueError(
                    f"Row {index}: there is no answer in column {answer_column!r}. Leave such rows out with "
                    "`dataset.filter(...)`."
                )
            messages = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": problem}]
            return {"prompt": messages, "answer": answer}

        # Said rather than inferred: a column that was there would keep its type, and `answer` may be a number.
        text = Value("string")
        if features is not None:
            kept = {name: kind for name, kind in features.items() if name not in (prompt_column, answer_column)}
            features = Features({**kept, "prompt": [{"role": text, "content": text}], "answer": text})
        return dataset.map(
            prepare_row, with_indices=True, remove_columns=[prompt_column, answer_column], features=features
        )


def confidence_task(
    *,
    score: Literal["bce", "brier", "dcpo"] = "bce",
    correct: Literal["math", "math_strict", "exact"] | Correct = "math",
    format_weight: float = 0.0,
    strict: bool = False,
) -> Task:
    """
    Solve a problem, then say how likely the solution is to be right ([Blockwise Advantage
    Estimation](https://huggingface.co/papers/2602.10231)).

    The block `solution` (`<reasoning>`, `<answer>`) is rewarded for being correct, the block `confidence` (`<analysis>`,
    `<confidence>`) by a proper scoring rule; its outcome is whether the solution is correct. The scalar baseline is the
    sum of correctness and score, which for `"brier"` is [`~rewards.text.rlcr_reward`].

    Args:
        score (`str`, *optional*, defaults to `"bce"`):
            Score of the confidence: `"bce"` ([`~rewards.text.bce_reward`]), `"brier"` ([`~rewards.text.brier_reward`]) or
            `"dcpo"` ([`~rewards.text.dcpo_reward`]; [DCPO](https://huggingface.co/papers/2603.09117) with
            `BlockwiseGRPOConfig(baseline="group", scale_rewards="group")`).
        correct (`str` or `Callable`, *optional*, defaults to `"math"`):
            When an answer is correct: `"math"` ([`~rewards.text.math_correct`]), `"math_strict"`
            ([`~rewards.text.math_correct_strict`]), `"exact"` ([`~rewards.text.exact_match`]) or a function
            `correct(prediction, answer) -> bool`.
        format_weight (`float`, *optional*, defaults to `0.0`):
            Weight of [`~rewards.text.confidence_format_reward`] in the first block and in the baseline, at least 0.
            What makes a model write the second block is that without it the first one is charged its `missing_reward`
            (`BlockwiseGRPOConfig(charge_missing=True)`); this wants the exact layout too.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to read as the paper's setting does, with `"math"` standing for `"math_strict"`: the first block of
            several and the first answer count, and nothing but the bare expression or number.

    Returns:
        [`Task`]: the task.

    Raises:
        ValueError: if an argument does not fit.
        MissingExtraError: for `correct="math"`, if math-verify is not installed.

    Example:

    ```python
    >>> [block.name for block in confidence_task().blocks]
    ['solution', 'confidence']
    ```
    """
    if score not in SCORES:
        raise ValueError(f"`score={score!r}`: it must be {' or '.join(map(repr, SCORES))}.")
    reading, occurrence = _reading(correct, strict)
    func, lowest = SCORES[score]
    correctness, scoring = partial(correctness_reward, **reading), partial(func, **reading)
    solution, solution_weights = _with_format([correctness], confidence_format_reward, format_weight)
    scalar = [partial(rlcr_reward, **reading)] if score == "brier" else [correctness, scoring]
    scalar, scalar_weights = _with_format(scalar, confidence_format_reward, format_weight)
    return Task(
        system_prompt=CONFIDENCE_SYSTEM_PROMPT,
        blocks=[
            Block(
                "solution",
                solution,
                tags=("reasoning", "answer"),
                reward_weights=solution_weights,
                occurrence=occurrence,
            ),
            Block(
                "confidence",
                scoring,
                tags=("analysis", "confidence"),
                outcome=correctness,
                missing_reward=lowest,
                occurrence=occurrence,
            ),
        ],
        scalar_reward_funcs=scalar,
        scalar_reward_weights=scalar_weights,
    )


def two_attempt_task(
    *,
    correct: Literal["math", "math_strict", "exact"] | Correct = "math",
    format_weight: float = 0.0,
    strict: bool = False,
) -> Task:
    """
    Solve a problem, then try again ([Blockwise Advantage Estimation](https://huggingface.co/papers/2602.10231)).

    Each attempt is a block with its own `<answer>`: the first is rewarded by [`~rewards.text.first_attempt_reward`], the
    second by [`~rewards.text.second_attempt_reward`], and its outcome is whether the first was correct. The scalar
    baseline is the sum of both.

    Args:
        correct, format_weight, strict:
            As for [`confidence_task`]; the layout is that of [`~rewards.text.two_attempts_format_reward`].

    Returns:
        [`Task`]: the task.

    Raises:
        ValueError: if an argument does not fit.
        MissingExtraError: for `correct="math"`, if math-verify is not installed.

    Example:

    ```python
    >>> [block.name for block in two_attempt_task(correct="exact").blocks]
    ['first_attempt', 'second_attempt']
    ```
    """
    reading, occurrence = _reading(correct, strict)
    first, second = partial(first_attempt_reward, **reading), partial(second_attempt_reward, **reading)
    first_rewards, first_weights = _with_format([first], two_attempts_format_reward, format_weight)
    scalar, scalar_weights = _with_format([first, second], two_attempts_format_reward, format_weight)
    return Task(
        system_prompt=TWO_ATTEMPTS_SYSTEM_PROMPT,
        blocks=[
            Block(
                "first_attempt",
                first_rewards,
                tags="first_attempt",
                reward_weights=first_weights,
                occurrence=occurrence,
            ),
            Block("second_attempt", second, tags="second_attempt", outcome=first, occurrence=occurrence),
        ],
        scalar_reward_funcs=scalar,
        scalar_reward_weights=scalar_weights,
    )


def _reading(correct: str | Correct, strict: bool) -> tuple[dict[str, Any], str]:
    """How completions are read: `correct` and `strict` of reward functions, and `occurrence` of blocks."""
    if strict and correct == "math":
        correct = "math_strict"
    function = CORRECT.get(correct) if isinstance(correct, str) else correct
    if not callable(function):
        raise ValueError(
            f"`correct={correct!r}`: it must be {', '.join(map(repr, CORRECT))} or a function "
            "`correct(prediction, answer) -> bool`."
        )
    if function in (math_correct, math_correct_strict):  # now, not at the first reward
        import_extra("math_verify", extra="math", purpose="Comparing mathematical answers")
    # Checkpoints name the arguments of outcome functions: one that has its default is left out.
    return {"correct": function} | ({"strict": True} if strict else {}), "first" if strict else "last"


def _with_format(funcs: list[Callable], format_reward: Callable, weight: float) -> tuple[list[Callable], list[float]]:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"`format_weight={weight!r}`: it must be at least 0 and finite.")
    weights = [1.0] * len(funcs)
    return (funcs, weights) if weight == 0 else ([*funcs, format_reward], [*weights, float(weight)])
