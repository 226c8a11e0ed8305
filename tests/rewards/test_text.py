import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import flow_trl.utils
from flow_trl.rewards import math_pool
from flow_trl.rewards import text as text_rewards
from flow_trl.rewards.text import (
    bce_reward,
    brier_reward,
    completion_text,
    confidence_format_reward,
    correctness_reward,
    dcpo_reward,
    exact_match,
    extract_tag,
    first_attempt_reward,
    math_correct,
    math_correct_strict,
    parse_confidence,
    rlcr_reward,
    second_attempt_reward,
    two_attempts_format_reward,
)


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
RIGHT, WRONG = "<answer>4</answer>", "<answer>5</answer>"
SCORES = [brier_reward, bce_reward, rlcr_reward]
WITH_ANSWER = [correctness_reward, *SCORES, first_attempt_reward, second_attempt_reward]


def confident(answer, confidence):
    return f"<answer>{answer}</answer><confidence>{confidence}</confidence>"


def twice(first, second):
    attempts = zip(("first_attempt", "second_attempt"), (first, second), strict=True)
    return "".join(f"<{tag}>So <answer>{answer}</answer></{tag}>" for tag, answer in attempts)


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.fixture(autouse=True)
def no_cache():
    text_rewards._cache.clear()


@pytest.fixture(autouse=True, scope="module")
def no_processes_left():
    yield
    math_pool.stop()


# Reading completions


@pytest.mark.parametrize(
    "completion, text",
    [
        ("", ""),
        ("plain ", "plain "),
        ([], ""),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"content": "no role"}], "no role"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
        ([{"role": "assistant", "tool_calls": [{}]}], ""),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "tool", "content": "<answer>9</answer>"},
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "more"},
                {"role": "assistant", "content": "second"},
            ],
            "first\nsecond",
        ),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}], "ab"),
        ([{"role": "assistant", "content": [{"type": "text", "text": None}]}], ""),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    "text, content",
    [
        ("<answer>4</answer>", "4"),
        ("so <answer>\n 4 </answer>.", "4"),
        ("<answer>4\n5</answer>", "4\n5"),
        ("<answer></answer>", ""),
        ("<answer>4</answer><answer>5</answer>", "4"),
        ("</answer><answer>4</answer>", "4"),
        ("<answer>3<answer>4</answer>", "3<answer>4"),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer>4<answer>", None),
        ("<ANSWER>4</ANSWER>", None),
        ("<answer>4<answer>", None),
        ("< answer>4</answer>", None),
        ("", None),
    ],
)
def test_extract_tag(text, content):
    assert extract_tag(text, "answer") == content


@pytest.mark.parametrize(
    "content, confidence",
    [
        ("0.7", 0.7), (".7", 0.7), ("0.70", 0.7), ("00.7", 0.7), ("1", 1), ("1.", 1), ("1.0", 1), ("1.000", 1), ("01", 1),
        ("0", 0), ("0.", 0), (".0", 0), ("0.0", 0), (" 0.7 ", 0.7), ("\n0.7\n", 0.7), ("0.123456789", 0.123456789),
        ("0." + "3" * 5000, 1 / 3),
    ],
)  # fmt: skip
def test_parse_confidence(content, confidence):
    for strict in (False, True):
        found = parse_confidence(f"<confidence>{content}</confidence>", strict)
        assert found == pytest.approx(confidence, abs=0, rel=1e-12)


@pytest.mark.parametrize(
    "content",
    [
        "", " ", "high", "nan", "NaN", "inf", "-inf", "1.5", "1.01", "2", "70", "70%", "0.7%", "-0.1", "-0", "-0.0", "+0.7",
        "1e-1", "7e-1", "0x1", "0,7", "7/10", "0.7.1", ".", "..7", "0. 7", "0.7 0.8", "0.7, sure", "about 0.7", "0.7\n0.8",
        "q=0.7", "$0.7$", "\\boxed{0.7}", "0_1", "٠.٧", "０.７", "½", "²", "None", "True", "1" * 5000, "<b>0.7</b>",
        "0.7\x00",
    ],
)  # fmt: skip
def test_no_confidence(content):
    assert parse_confidence(f"<confidence>{content}</confidence>", strict=True) is None


@pytest.mark.parametrize(
    "text, confidence",
    [
        ("0.7", None),
        ("<confidence>0.7", None),
        ("<answer>0.7</answer>", None),
        ("<confidence>0.7</confidence>", 0.7),
        ("<confidence>0.7</confidence><confidence>0.8</confidence>", 0.7),
        # What stands before the answer is in the solution, not in the block of the confidence.
        (f"<confidence>0.2</confidence>{RIGHT}<confidence>0.7</confidence>", 0.7),
        (f"<confidence>0.2</confidence>{RIGHT}", None),
        ("<answer>4<confidence>0.7</confidence>", 0.7),
    ],
)
def test_where_the_confidence_is(text, confidence):
    assert parse_confidence(text, strict=True) == confidence


# Is an answer correct?


@pytest.mark.parametrize(
    "prediction, answer, expected",
    [
        ("4", "4", True), (" 4\n", "4", True), ("4", " 4 ", True), ("4.0", "4", False), ("a", "A", False),
        (None, "4", False), ("", "4", False), (None, "None", False), ("4", 4, True),
    ],
)  # fmt: skip
def test_exact_match(prediction, answer, expected):
    assert exact_match(prediction, answer) is expected


EQUAL = [
    ("0.5", "1/2"), ("1/2", r"\frac{1}{2}"), (r"\frac12", "0.5"), (r"\dfrac{2}{4}", "1/2"), ("18.0", "18"), ("$18", "18"),
    (r"\$18", "18"), ("$18$", "18"), (r"18\text{ dollars}", "18"), ("18 cm", "18"), ("1,234", "1234"),
    ("10,080", r"10,\!080"), ("x = 18", "18"), (r"\boxed{18}", "18"), ("9 + 9", "18"), ("50%", "0.5"), ("90", r"90^\circ"),
    (r"2^{1/2}", r"\sqrt{2}"), ("1+x", "x + 1"), ("6-5i", "6 - 5i"), ("-2, 1", "1,-2"), (r"\{2, 1\}", r"\{1,2\}"),
    (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"), ("C", r"\text{(C)}"), ("evelyn", r"\text{Evelyn}"),
    ("18", 18), (" 18 ", "18"), ("no mathematics {", "no mathematics {"),
]  # fmt: skip
UNEQUAL = [
    ("17", "18"), ("-18", "18"), ("18 dollars", "18"), ("the answer is 18", "18"), ("17, 18", "18"), ("18 or 19", "18"),
    ("17 18", "18"), ("0.333", r"\frac{1}{3}"), ("3.14", r"\pi"), ("D", r"\text{(C)}"), ("x + 2", "x + 1"),
    ("(1, 2)", "(2, 1)"), ("1/0", "18"), ("nan", "18"), ("inf", "18"), (None, "18"), ("", "18"), (" ", "18"), ("", ""),
    (None, "None"), ("}", "18"), ("}{", "18"), ("{", "18"), ("$", "18"), ("\\", "18"), (r"\frac{", "18"),
    (r"17}\boxed{18", "18"), ("\x00\ud800", "18"), ("été 🙂", "18"), ("<answer>", "18"), ("%s {} \\1", "18"),
]  # fmt: skip


def test_math_correct_strict():
    pairs = EQUAL + UNEQUAL
    expected = [True] * len(EQUAL) + [False] * len(UNEQUAL)
    results = math_correct_strict.many(*zip(*pairs, strict=True))
    assert [pair for pair, *same in zip(pairs, results, expected, strict=True) if same[0] != same[1]] == []
    text_rewards._cache.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: math_correct_strict(*pair), pairs[::4])) == expected[::4]


def test_endless_computation(monkeypatch):
    monkeypatch.setattr(math_pool, "ANSWER_SECONDS", (0.1, 0.5))
    for call in (math_correct, partial(in_a_thread, math_correct)):
        assert call("9^{9^{9^9}}", "18") is False
        assert call("18.0", "18") is True


@pytest.mark.parametrize("prediction", ["1+" * 100_000 + "1", "(" * 100_000, "18" + " " * 2000 + "x", "a" * 1001])
def test_very_long_answers_are_not_compared(prediction, monkeypatch):
    monkeypatch.setattr(math_pool, "compare", lambda jobs: [True for job in jobs])
    assert math_correct(prediction, "18") is False
    assert math_correct("18", prediction) is False
    assert math_correct(prediction, prediction) is True


def test_each_pair_is_compared_once(monkeypatch):
    calls = []
    monkeypatch.setattr(math_pool, "compare", lambda jobs: calls.extend(jobs) or [True for job in jobs])
    for _ in range(3):
        assert rlcr_reward([confident("2+2", 1), confident(" 2+2 ", 1)], answer=["4", "4"]) == [1, 1]
    assert calls == [(("2+2",), "4")]


def test_missing_math_verify(monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(flow_trl.utils.importlib, "import_module", missing)
    for prediction in ("18", "18.0"):
        with pytest.raises(ImportError, match=re.escape('pip install "flow-trl[math]"')):
            math_correct(prediction, "18")
    assert correctness_reward([RIGHT], answer=["4"], correct=exact_match) == [1.0]


@pytest.mark.skipif(not GSM8K.exists(), reason="the problems are not there")
def test_gsm8k():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 700
    for answer in answers:
        number = int(answer.replace(",", ""))
        assert math_correct(answer, answer)
        assert math_correct(rf"\${number:,}.00", answer)
        assert not math_correct(str(number + 1), answer)


# An answer and the confidence in it


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(
    "func, completions, rewards",
    [
        (correctness_reward, [RIGHT, WRONG, "4", ""], [1, 0, 0, 0]),
        (brier_reward, [confident(4, 0.7), confident(5, 0.7), RIGHT, ""], [-0.09, -0.49, -1, -1]),
        (bce_reward, [confident(4, 0.7), confident(5, 0.7), RIGHT], [math.log(0.7), math.log(0.3), math.log(0.01)]),
        (rlcr_reward, [confident(4, 0.7), confident(5, 0.7), RIGHT, WRONG], [0.91, -0.49, 0, -1]),
        (first_attempt_reward, [twice(4, 5), twice(5, 4), RIGHT], [1, 0, 0]),
        (second_attempt_reward, [twice(4, 5), twice(5, 4), RIGHT], [0.1, 1, 0]),
    ],
)
def test_rewards(func, completions, rewards, conversational):
    if conversational:
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    # As TRL and the trainer of blocks call it.
    result = func(
        prompts=["2 + 2?"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        answer=["4"] * len(completions),
        level=[1] * len(completions),
        trainer_state=None,
        log_extra=lambda *args: None,
        log_metric=lambda *args: None,
        block_texts=[{}] * len(completions),
    )
    assert result == pytest.approx(rewards)
    assert all(type(value) is float for value in result)


@pytest.mark.parametrize("q", [0, 0.01, 0.3, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("c, answer", [(1, "4"), (0, "5")])
def test_closed_forms(q, c, answer):
    completions = [confident(4, q)]
    clipped = min(max(q, 0.01), 0.99)
    assert brier_reward(completions, [answer]) == pytest.approx([-((q - c) ** 2)])
    assert rlcr_reward(completions, [answer]) == pytest.approx([c - (q - c) ** 2])
    assert bce_reward(completions, [answer]) == pytest.approx(
        [c * math.log(clipped) + (1 - c) * math.log(1 - clipped)]
    )


@pytest.mark.parametrize("func", SCORES)
@pytest.mark.parametrize("p", [0.1, 0.35, 0.8])
def test_the_honest_confidence_is_best(func, p):
    def expected(q):
        right, wrong = func([confident(4, q)] * 2, ["4", "5"])
        return p * right + (1 - p) * wrong

    assert max((i / 100 for i in range(101)), key=expected) == p


def test_perfect_scores_are_zero_without_a_sign():
    assert [math.copysign(1, r) for r in brier_reward([confident(4, 1), confident(4, 0)], ["4", "5"])] == [1, 1]


@pytest.mark.parametrize("func, worst", [(brier_reward, [-1, -1]), (bce_reward, [math.log(0.01)] * 2), (rlcr_reward, [0, -1])])  # fmt: skip
@pytest.mark.parametrize("confidence", ["high", "", "1.5", "nan", "-0.1"])
def test_unreadable_confidence_gets_the_lowest_score(func, worst, confidence):
    assert func([confident(4, confidence)] * 2, ["4", "5"]) == pytest.approx(worst)
    anything = [func([confident(4, i / 10)] * 2, ["4", "5"]) for i in range(11)]
    assert [min(rewards) for rewards in zip(*anything, strict=True)] == pytest.approx(worst)


@pytest.mark.parametrize("func", SCORES)
@pytest.mark.parametrize("confidences, share", [(["0.5"] * 4, 0), (["0.5", "high", "1", ""], 0.5), (["2"] * 4, 1)])
def test_share_of_unreadable_confidences_is_logged(func, confidences, share):
    logged = []
    completions = [confident(4, confidence) for confidence in confidences]
    func(completions, ["4"] * 4, log_metric=lambda *metric: logged.append(metric))
    assert logged == [("confidence/unparsable", share)]


def test_eps():
    completions = [confident(4, 1), confident(4, 0)]
    assert bce_reward(completions, ["4", "4"], eps=0.1) == pytest.approx([math.log(0.9), math.log(0.1)])
    for eps in (0, -0.1, 0.5, 1, float("nan")):
        with pytest.raises(ValueError, match=f"`eps={eps}`"):
            bce_reward(completions, ["4", "4"], eps=eps)


@pytest.mark.parametrize("func", WITH_ANSWER)
def test_missing_answer_column(func):
    with pytest.raises(ValueError, match="no column `answer`"):
        func(prompts=["2 + 2?"], completions=[RIGHT], completion_ids=[[1]], solution=["4"])


@pytest.mark.parametrize("func", WITH_ANSWER)
def test_lengths_must_agree(func):
    with pytest.raises(ValueError):
        func([RIGHT, RIGHT], answer=["4"])


@pytest.mark.parametrize("func", WITH_ANSWER)
def test_no_completions(func):
    assert func([], answer=[]) == []


@pytest.mark.parametrize("func", WITH_ANSWER)
def test_correct_is_asked(func):
    asked = []
    partial(func, correct=lambda *pair: asked.append(pair) or False)(completions=[twice(4, 5)], answer=["4.0"])
    assert asked and all(isinstance(value, str) for pair in asked for value in pair)


GARBAGE = [
    "",
    "<answer>",
    "</answer><answer>",
    "<confidence>" * 5000,
    "\x00\ud800",
    "(" * 50_000,
    "<answer>}{</answer>",
]
GARBAGE += [twice("}{", "{"), twice("", ""), confident("{", "{"), "<first_attempt>" * 3000, "<answer></answer>"]


@pytest.mark.parametrize("func", [*WITH_ANSWER, confidence_format_reward, two_attempts_format_reward])
def test_garbage(func):
    start = time.perf_counter()
    rewards = func(completions=GARBAGE, answer=["18"] * len(GARBAGE))
    assert time.perf_counter() - start < 20
    assert len(rewards) == len(GARBAGE) and all(math.isfinite(reward) and reward <= 1 for reward in rewards)


# Layout

FOUR = "<reasoning>a\nb</reasoning><answer>4</answer><analysis>c</analysis><confidence>0.5</confidence>"


@pytest.mark.parametrize(
    "text, reward",
    [
        (FOUR, 1),
        (f"\n{FOUR.replace('><', '> <')} \n", 1),
        (FOUR.replace("0.5", "high"), 1),
        (FOUR.replace("a\nb", ""), 1),
        (f"Well, {FOUR}", 0),
        (f"{FOUR}.", 0),
        (FOUR * 2, 0),
        (FOUR.replace("</answer>", "</answer> so "), 0),
        (FOUR.replace("</confidence>", ""), 0),
        (FOUR.replace("<answer>", ""), 0),
        (FOUR.replace("b", "b <answer>4</answer>"), 0),
        (FOUR.replace("c", "c </analysis>"), 0),
        (FOUR.replace("reasoning", "Reasoning"), 0),
        (FOUR[FOUR.index("<analysis>") :] + FOUR[: FOUR.index("<analysis>")], 0),
        (FOUR[: FOUR.index("<analysis>")], 0),
        ("<reasoning><answer></answer></reasoning><analysis></analysis><confidence></confidence>", 0),
        ("", 0),
    ],
)
def test_confidence_format(text, reward):
    assert confidence_format_reward([text, [{"role": "assistant", "content": text}]]) == [reward, reward]


TWO = twice(4, 5)


@pytest.mark.parametrize(
    "text, reward",
    [
        (TWO, 1),
        (" " + TWO.replace("><second", ">\n<second") + "\n", 1),
        (f"Well, {TWO}", 0),
        (f"{TWO}!", 0),
        (TWO.replace("</second_attempt>", ""), 0),
        (TWO.replace("<answer>5</answer>", "5"), 0),
        (TWO.replace("<answer>4</answer>", "4"), 0),
        (TWO.replace("<answer>5</answer>", "<answer>5</answer><answer>6</answer>"), 0),
        (TWO.replace("<answer>5", "<answer><answer>5"), 0),
        (TWO.replace("first", "third"), 0),
        (TWO.replace("</first_attempt>", "</first_attempt> or "), 0),
        (TWO.replace("first", "x").replace("second", "first").replace("x", "second"), 0),
        (TWO * 2, 0),
        ("", 0),
    ],
)
def test_two_attempts_format(text, reward):
    assert two_attempts_format_reward([text, [{"role": "assistant", "content": text}]]) == [reward, reward]


# Two attempts


@pytest.mark.parametrize(
    "text, first, second",
    [
        (twice("4", "4"), 1, 1),
        (twice("4", "5"), 1, 0.1),
        (twice("5", "4"), 0, 1),
        (twice("5", "6"), 0, 0.1),
        (twice("5", "5"), 0, 0),
        (twice("0.5", "1/2"), 0, 0),  # the same in another form
        (twice("so {", "so {"), 0, 0),
        (twice("so {", "so }"), 0, 0.1),
        (twice("5", ""), 0, 0),  # no answer is no other answer
        (twice("", "5"), 0, 0.1),
        ("<first_attempt>4</first_attempt><second_attempt><answer>4</answer></second_attempt>", 0, 1),
        ("<first_attempt><answer>4</answer></first_attempt><second_attempt>4</second_attempt>", 1, 0),
        ("<first_attempt><answer>4</answer></first_attempt><second_attempt><answer>4</answer>", 1, 0),
        ("<first_attempt><answer>4</answer><second_attempt><answer>4</answer></second_attempt>", 0, 1),
        ("<second_attempt><answer>4</answer></second_attempt><first_attempt><answer>4</answer></first_attempt>", 1, 0),
        (RIGHT, 0, 0),
        ("", 0, 0),
    ],
)
def test_two_attempts(text, first, second):
    assert first_attempt_reward([text], ["4"]) == [first]
    assert second_attempt_reward([text], ["4"]) == [second]


def test_dcpo():
    """A group of four, half of it right, with the target of each between that and its own outcome."""
    completions = [confident(4, 0.75), confident(4, 1), confident(5, 0.25), confident(5, "high"), confident(4, 1)]
    prompts = ["a"] * 4 + ["b"]
    func = partial(dcpo_reward, correct=exact_match)
    assert func(completions, ["4"] * 5, prompts=prompts) == pytest.approx([0, -0.25, 0, -1, 0])
    assert func(completions, ["4"] * 5, prompts=prompts, group_weight=1.0)[:2] == pytest.approx([-0.25, -0.5])
    with pytest.raises(ValueError, match="`group_weight=2`"):
        func(completions, ["4"] * 5, prompts=prompts, group_weight=2)


def test_reward_of_a_different_answer():
    assert second_attempt_reward([twice(5, 6), twice(5, 5)], ["4", "4"], different=0.3) == [0.3, 0]


def test_outcomes_are_hashable():
    assert len({*correctness_reward([RIGHT, WRONG, RIGHT], ["4"] * 3)}) == 2
    assert len({*first_attempt_reward([twice(4, 4), twice(5, 4)], ["4"] * 2)}) == 2
