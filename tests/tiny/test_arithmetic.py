import random
import re

import pytest

from flow_trl.tiny import load_prompts
from flow_trl.tiny.arithmetic import CONFIDENCES, WORDS, draw_problem, solve, write_completion


def content(prompt):
    """The same for problems that differ only in the order of factors or summands."""
    left, sign, rest = re.fullmatch(r"([\d*]+)([+-]?)(\d*)=\?", prompt).groups()
    if "*" not in left and sign == "+":
        return frozenset([left, rest]), sign
    return frozenset(left.split("*")), sign, rest


@pytest.fixture(scope="module")
def splits():
    return {split: load_prompts("arithmetic", split).to_dict() for split in ("train", "test")}


def test_splits_are_large_distinct_and_the_same_every_time(splits):
    train, test = splits["train"]["prompt"], splits["test"]["prompt"]
    assert len(set(train)) == len(train) == 4000 and len(set(test)) == len(test) == 400
    assert not {content(prompt) for prompt in train} & {content(prompt) for prompt in test}
    assert load_prompts("arithmetic", "test").to_dict() == splits["test"]
    assert train[:2] == ["84*13=?", "32*89=?"]


def test_answers_are_right_and_mostly_hard(splits):
    for rows in splits.values():
        for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
            assert str(eval(prompt.removesuffix("=?"))) == answer and int(answer) >= 0
        assert [rows["difficulty"].count(level) * 8 // len(rows["prompt"]) for level in range(1, 6)] == [1, 1, 1, 2, 3]


def test_two_attempts_have_the_same_problems(splits):
    rows = load_prompts("arithmetic_two_attempts", "test").to_dict()
    assert rows == {**splits["test"], "prompt": [f"twice: {prompt}" for prompt in splits["test"]["prompt"]]}


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(ValueError, match="`name` is 'algebra'.*'arithmetic_two_attempts'"):
        load_prompts("algebra")
    with pytest.raises(ValueError, match="`split` is 'validation'"):
        load_prompts("arithmetic", "validation")


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("worked", [True, False])
def test_every_step_of_a_solution_is_right(difficulty, worked):
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(difficulty, rng)
        reasoning, answer = solve(problem, worked)
        assert eval(problem.removesuffix("=?")) == int(answer)
        for step in reasoning.split(","):
            assert "=" not in step or eval(step.replace("=", "=="))
    assert worked or "," not in reasoning


def test_solutions_read_as_documented():
    assert solve("80-71=?", True) == solve("80-71=?", False) == ("80-71=9", "9")
    assert solve("34*7=?", True) == ("7*30=210,7*4=28", "238")
    assert solve("34*20=?", True) == ("34*20=680", "680")
    assert solve("23*47-85=?", True) == ("23*40=920,23*7=161,1081", "996")
    assert solve("twice: 23*47-85=?", False) == ("23*47=1081", "996")


def test_completions_have_their_format_and_say_nothing_of_their_confidence():
    rng = random.Random(0)
    completion = (
        "<reasoning>1[+]2=3</reasoning><answer>3</answer><analysis>(.*)</analysis><confidence>(.*)</confidence>"
    )
    found = [re.fullmatch(completion, write_completion("1+2=?", rng)) for _ in range(2000)]
    for group, values in ((1, WORDS), (2, CONFIDENCES)):
        counts = [sum(match[group] == value for match in found) for value in values]
        assert sum(counts) == 2000 and max(counts) < 1.4 * min(counts)
    attempts = "<first_attempt>1[+]2=3<answer>3</answer></first_attempt>"
    attempts += attempts.replace("first", "second")
    assert re.fullmatch(attempts, write_completion("twice: 1+2=?", rng))


def test_reflected_completions_say_how_hard_they_were():
    rng, said = random.Random(0), {word: [] for word in WORDS}
    cases = {
        "1+2=?": (0.35, 0),
        "23*7+5=?": (1, 0),
        "23*47=?": (0, 1),
        "23*40=?": (1, 1),
        "23*47+5=?": (0, 2),
        "23*47+6=?": (1, 3),
    }
    for prompt, (share, word) in cases.items():
        words = []
        for _ in range(1000):
            completion = write_completion(prompt, rng, direct_share=share, is_reflected=True)
            match = re.search("<analysis>(.*)</analysis><confidence>(.*)</confidence>", completion)
            words.append(match[1])
            said[match[1]].append(float(match[2]))
        assert 0.73 < words.count(WORDS[word]) / 1000 < 0.82  # 0.7 + 0.3 / 4
    means = [sum(values) / len(values) for values in said.values()]
    # A quarter has any confidence; the others are cut off at 1.
    assert means == sorted(means, reverse=True) and 0.78 < means[0] < 0.84 and 0.56 < means[3] < 0.62


def test_products_are_said_at_once_as_often_as_asked():
    rng = random.Random(0)
    for share in (0, 0.35, 1):
        direct = ["," not in write_completion("23*47=?", rng, direct_share=share) for _ in range(500)]
        assert abs(sum(direct) / 500 - share) < 0.06
