import math
import pickle
import re
from functools import partial

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, Value
from trl.trainer.utils import get_callable_name

import flow_trl.utils
from flow_trl import Block
from flow_trl.blocks import check_blocks, find_blocks
from flow_trl.rewards.text import (
    confidence_format_reward,
    correctness_reward,
    exact_match,
    math_correct,
    math_correct_strict,
    two_attempts_format_reward,
)
from flow_trl.tasks import Task, confidence_task, two_attempt_task


CONFIDENT = "<reasoning>2 + 2</reasoning><answer>{}</answer>\n<analysis>Sure.</analysis><confidence>{}</confidence>"
TWICE = "<first_attempt><answer>{}</answer></first_attempt>\n<second_attempt><answer>{}</answer></second_attempt>"
TASKS = [confidence_task, partial(confidence_task, score="brier"), two_attempt_task]


def score(funcs, weights, completions, **columns):
    rows = [func(prompts=[""] * len(completions), completions=completions, **columns) for func in funcs]
    return [sum(w * r for w, r in zip(weights, values, strict=True)) for values in zip(*rows, strict=True)]


@pytest.mark.parametrize("task", TASKS)
def test_blocks(task):
    task = task()
    assert isinstance(task, Task) and all(isinstance(block, Block) for block in task.blocks)
    assert check_blocks(task.blocks) == task.blocks
    assert task.blocks[0].outcome is None and task.blocks[1].outcome is not None
    assert len(task.scalar_reward_funcs) == len(task.scalar_reward_weights)
    with pytest.raises(AttributeError):
        task.system_prompt = ""


@pytest.mark.parametrize("task", TASKS)
def test_system_prompt_names_the_tags(task):
    task = task()
    for block in task.blocks:
        assert all(f"<{tag}>" in task.system_prompt and f"</{tag}>" in task.system_prompt for tag in block.tags)
    assert "<answer>" in task.system_prompt
    assert "  " not in task.system_prompt and "{" not in task.system_prompt


@pytest.mark.parametrize("task", TASKS)
def test_reward_functions_can_be_sent_to_another_process(task):
    task = task(correct="exact", format_weight=0.5)
    for func in [*task.scalar_reward_funcs, *(func for block in task.blocks for func in block.reward_funcs)]:
        assert isinstance(pickle.loads(pickle.dumps(func))(completions=[CONFIDENT], answer=["4"]), list)


def test_confidence_task():
    solution, confidence = confidence_task().blocks
    assert (solution.name, solution.tags) == ("solution", ("reasoning", "answer"))
    assert (confidence.name, confidence.tags) == ("confidence", ("analysis", "confidence"))
    assert [get_callable_name(func) for func in solution.reward_funcs] == ["correctness_reward"]
    assert [get_callable_name(func) for func in confidence.reward_funcs] == ["bce_reward"]
    assert get_callable_name(confidence.outcome) == "correctness_reward"


@pytest.mark.parametrize("name, confidence", [("brier", [-0.16, -0.49]), ("bce", [-0.510825623766, -1.203972804326])])
def test_confidence_task_rewards(name, confidence):
    task = confidence_task(score=name)
    completions, columns = [CONFIDENT.format("4.0", 0.6), CONFIDENT.format("5", 0.7)], {"answer": ["4", "4"]}
    assert score(task.blocks[0].reward_funcs, [1], completions, **columns) == [1, 0]
    assert score(task.blocks[1].reward_funcs, [1], completions, **columns) == pytest.approx(confidence)
    assert task.blocks[1].outcome(completions=completions, **columns) == [1, 0]
    # A confidence that is missing is worth no more than one that cannot be read, or is as wrong as can be.
    worst = score(task.blocks[1].reward_funcs, [1], [CONFIDENT.format("4", "?"), CONFIDENT.format("5", 1)], **columns)
    assert worst == pytest.approx([task.blocks[1].missing_reward] * 2)
    # The baseline scores the whole completion by the sum over the blocks.
    scalar = score(task.scalar_reward_funcs, task.scalar_reward_weights, completions, **columns)
    assert scalar == pytest.approx([1 + confidence[0], confidence[1]])


def test_blocks_are_found():
    task, text = confidence_task(), CONFIDENT.format(4, 0.6)
    spans = find_blocks(text, task.blocks)
    assert [text[slice(*span)] for span in spans] == text.split("\n")
    text = TWICE.format(4, 5)
    assert [text[slice(*span)] for span in find_blocks(text, two_attempt_task().blocks)] == text.split("\n")


def test_two_attempt_task():
    task = two_attempt_task()
    completions = [TWICE.format(*pair) for pair in [(4, 4), (5, 4), (5, 6), (5, 5)]]
    columns = {"answer": ["4"] * 4}
    first, second = task.blocks
    assert (first.name, first.tags, second.name, second.tags) == (
        "first_attempt", ("first_attempt",), "second_attempt", ("second_attempt",),
    )  # fmt: skip
    assert score(first.reward_funcs, [1], completions, **columns) == [1, 0, 0, 0]
    assert score(second.reward_funcs, [1], completions, **columns) == [1, 1, 0.1, 0]
    assert second.outcome(completions=completions, **columns) == [1, 0, 0, 0]
    scalar = score(task.scalar_reward_funcs, task.scalar_reward_weights, completions, **columns)
    assert scalar == [2, 1, 0.1, 0]


@pytest.mark.parametrize(
    "task, func", [(confidence_task, confidence_format_reward), (two_attempt_task, two_attempts_format_reward)]
)
def test_format_weight(task, func):
    plain, task = task(), task(format_weight=0.25)
    assert func not in [*plain.blocks[0].reward_funcs, *plain.scalar_reward_funcs]
    assert task.blocks[0].reward_funcs[-1] is func and task.blocks[0].reward_weights == [1.0, 0.25]
    assert func not in task.blocks[1].reward_funcs
    assert task.scalar_reward_funcs[-1] is func and task.scalar_reward_weights[-1] == 0.25
    assert plain.scalar_reward_weights == task.scalar_reward_weights[:-1]


@pytest.mark.parametrize("task", [confidence_task, two_attempt_task])
def test_strict(task):
    loose, strict = task(), task(strict=True)
    assert [block.occurrence for block in loose.blocks] == ["last", "last"]
    assert [block.occurrence for block in strict.blocks] == ["first", "first"]
    for func in [*strict.blocks[0].reward_funcs, strict.blocks[1].outcome, *strict.scalar_reward_funcs]:
        assert func.keywords == {"correct": math_correct_strict, "strict": True}
    completions = [CONFIDENT.format("5</answer> no <answer>4.", "60%"), CONFIDENT.format("4", 0.6)]
    if task is confidence_task:
        assert loose.blocks[1].reward_funcs[0](completions, answer=["4", "4"]) == pytest.approx([math.log(0.6)] * 2)
        assert strict.blocks[1].reward_funcs[0](completions, answer=["4", "4"]) == pytest.approx(
            [math.log(0.01), math.log(0.6)]
        )


@pytest.mark.parametrize("task", [confidence_task, two_attempt_task])
def test_checkpoints_name_only_what_was_asked_for(task):
    """A run goes on from a checkpoint only if its blocks have the same description, so defaults are not in it."""
    assert task(correct="exact").blocks[1].outcome.keywords == {"correct": exact_match}
    assert task(correct="exact", strict=True).blocks[1].outcome.keywords == {"correct": exact_match, "strict": True}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "correct, function", [("math", math_correct), ("exact", exact_match), (str.__eq__, str.__eq__)]
)
def test_correct(task, correct, function):
    task = task(correct=correct)
    funcs = [func for block in task.blocks for func in [*block.reward_funcs, block.outcome] if func is not None]
    assert {func.keywords["correct"] for func in [*funcs, *task.scalar_reward_funcs]} == {function}


@pytest.mark.parametrize(
    "task, arguments, message",
    [
        (confidence_task, {"score": "log"}, "`score='log'`: it must be 'bce' or 'brier' or 'dcpo'"),
        (
            confidence_task,
            {"correct": "maths"},
            "`correct='maths'`: it must be 'exact', 'math', 'math_strict' or a function",
        ),
        (two_attempt_task, {"correct": None}, "`correct=None`"),
        (confidence_task, {"format_weight": -0.1}, "`format_weight=-0.1`"),
        (two_attempt_task, {"format_weight": float("nan")}, "`format_weight=nan`"),
        (two_attempt_task, {"format_weight": float("inf")}, "`format_weight=inf`"),
    ],
)
def test_wrong_arguments(task, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task(**arguments)


@pytest.mark.parametrize("task", TASKS)
def test_math_verify_is_asked_for_at_once(task, monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(flow_trl.utils.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=re.escape('pip install "flow-trl[math]"')):
        task()
    assert task(correct="exact").blocks


# prepare


def test_prepare():
    dataset = Dataset.from_dict({"problem": ["2 + 2?", "1/2 + 1/2?"], "answer": [" 4 ", "1"], "level": [1, 2]})
    task = confidence_task()
    prepared = task.prepare(dataset)
    assert set(prepared.column_names) == {"prompt", "answer", "level"}
    assert prepared[0] == {
        "prompt": [{"role": "system", "content": task.system_prompt}, {"role": "user", "content": "2 + 2?"}],
        "answer": "4",
        "level": 1,
    }
    assert dataset.column_names == ["problem", "answer", "level"]


@pytest.mark.parametrize(
    "columns, names",
    [
        ({"question": ["2 + 2?"], "final": [4]}, ("question", "final")),
        ({"prompt": ["2 + 2?"], "answer": [4]}, ("prompt", "answer")),
        ({"prompt": ["other"], "problem": ["2 + 2?"], "answer": ["It is 4."], "final": [4]}, ("problem", "final")),
    ],
)
def test_prepare_other_columns(columns, names):
    prepared = two_attempt_task().prepare(Dataset.from_dict(columns), *names)
    assert set(prepared.column_names) == {"prompt", "answer"}
    assert prepared[0]["prompt"][1] == {"role": "user", "content": "2 + 2?"}
    assert prepared[0]["answer"] == "4"


def test_prepared_rows_reach_the_rewards():
    row = confidence_task().prepare(Dataset.from_dict({"problem": ["2 + 2?"], "answer": [4]}))[0]
    completions = [[{"role": "assistant", "content": CONFIDENT.format(4, 0.6)}]]
    assert correctness_reward(prompts=[row["prompt"]], completions=completions, answer=[row["answer"]]) == [1.0]


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"question": ["2"], "answer": ["4"]},
            "`prompt_column='problem'`: the data set has no such column. It has 'q",
        ),
        ({"problem": ["2"], "solution": ["4"]}, "`answer_column='answer'`: the data set has no such column"),
        ({"problem": ["2", None], "answer": ["4", "4"]}, "Row 1: the problem in column 'problem' is None"),
        ({"problem": ["2", " "], "answer": ["4", "4"]}, "Row 1: the problem in column 'problem' is ' '"),
        ({"problem": [2], "answer": ["4"]}, "Row 0: the problem in column 'problem' is 2"),
        ({"problem": ["2", "3"], "answer": ["4", None]}, "Row 1: there is no answer in column 'answer'"),
        ({"problem": ["2"], "answer": [" "]}, "Row 0: there is no answer in column 'answer'"),
    ],
)
def test_prepare_wrong_data(columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        confidence_task().prepare(Dataset.from_dict(columns))


def test_prepare_wants_one_split():
    splits = DatasetDict(train=Dataset.from_dict({"problem": ["2"], "answer": ["4"]}))
    with pytest.raises(TypeError, match=re.escape("such as `dataset['train']`")):
        confidence_task().prepare(splits)


def test_prepare_a_streamed_data_set():
    rows = [{"problem": f"{n} + 2?", "answer": n + 2, "level": n} for n in range(3)]
    task = confidence_task()
    expected = task.prepare(Dataset.from_list(rows)).to_list()
    known = task.prepare(Dataset.from_list(rows).to_iterable_dataset())
    assert list(known) == expected and known.features["answer"] == Value("string")
    unknown = IterableDataset.from_generator(lambda: iter(rows))
    assert unknown.column_names is None
    assert list(task.prepare(unknown)) == expected
    renamed = task.prepare(unknown.rename_columns({"problem": "prompt", "answer": "final"}), "prompt", "final")
    assert list(renamed) == expected


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "2", "answer": "4"}, "`prompt_column='problem'`: the data set has no such column. It has 'q"),
        ({"problem": "2", "answer": None}, "Row 0: there is no answer in column 'answer'"),
    ],
)
def test_prepare_a_streamed_data_set_with_wrong_rows(row, message):
    prepared = confidence_task().prepare(IterableDataset.from_generator(lambda: iter([row])))
    with pytest.raises(ValueError, match=re.escape(message)):
        next(iter(prepared))
