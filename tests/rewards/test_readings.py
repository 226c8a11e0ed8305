"""How answers and confidences are read: a table of inputs, decided one by one."""

import pytest

from flow_trl.rewards import math_pool
from flow_trl.rewards.text import (
    correctness_reward,
    math_correct,
    math_correct_strict,
    parse_confidence,
    read_answer,
    read_attempts,
)


@pytest.fixture(autouse=True, scope="module")
def no_processes_left():
    yield
    math_pool.stop()


RIGHT = [
    # as it is
    ("18", "18"), (" 18\n", "18"), ("18.0", "18"), ("018", "18"), ("+18", "18"), ("-5", "-5"), ("1,234", "1234"), ("0.5", "1/2"),
    (r"\frac{1}{2}", "0.5"), ("9 + 9", "18"), ("3 * 6 = 18", "18"), ("x = 18", "18"), (r"\boxed{18}", "18"), ("$18$", "18"),
    ("(1, 2)", "(1, 2)"), (r"2\sqrt{2}", r"\sqrt{8}"), ("evelyn", r"\text{Evelyn}"),
    # Markdown, a final dot, quotes
    ("**18**", "18"), ("*18*", "18"), ("__18__", "18"), ("`18`", "18"), ("#### 18", "18"), ("18.", "18"), ("**18.**", "18"),
    ("**18**.", "18"), ('"18"', "18"), ("“18”", "18"), ("**x = 18**", "18"), ("0.5.", "1/2"), (r"**\frac{1}{2}**", "0.5"),
    ("**Evelyn**", "Evelyn"), ("Evelyn.", "Evelyn"),
    # units and currencies
    ("18 dollars", "18"), ("$18", "18"), (r"\$18", "18"), ("USD 18", "18"), ("18 USD", "18"), ("€18", "18"), ("18 €", "18"),
    ("$18.00", "18"), ("$1,234.50", "1234.5"), ("18 apples", "18"), ("18 cm", "18"), ("18cm", "18"), ("18 km", "18"),
    (r"18 \text{ dollars}", "18"), ("90%", "90"), ("90%", "0.9"), ("90 %", "90"), ("90 percent", "90"), ("-5 degrees", "-5"),
    ("18 dollars a day", "18"), ("30°", "30"),
    # decimal commas
    ("0,9", "0.9"), ("2,5", "2.5"), ("2,50", "2.5"), ("0,125", "0.125"),
    # sentences with one number
    ("The answer is 18", "18"), ("The answer is 18.", "18"), ("The final answer is: $18.", "18"), ("Answer: 18", "18"),
    ("So the answer is 1/2.", "0.5"), ("x is 18", "18"), ("He has 18 apples left.", "18"), ("Total: 18 dollars", "18"),
    ("It is 18", "18"), ("Thus, the result is **18**.", "18"), (r"The answer is \frac{1}{2}", "1/2"), ("She earns $18.", "18"),
]  # fmt: skip
WRONG = [
    ("17", "18"), ("17.", "18"), ("**17**", "18"), ("-18", "18"), ("The answer is 17", "18"), ("17 dollars", "18"),
    ("18 or 19", "18"), ("17, 18", "18"), ("17 18", "18"), ("between 17 and 18", "17"), ("not 18", "18"),
    ("at least 18", "18"), ("more than 18", "18"), ("18 or more", "18"), ("about 18", "18"), ("minus 18", "18"), ("18 million", "18"),
    ("18 dozen", "18"), ("18 and a half", "18"), ("half of 18", "18"), ("18x", "18"), ("18 x", "18"), ("x + 18", "18"), ("18!", "18"),
    ("10 - 8", "18"), ("18^2", "18"), ("18/36", "18"), ("the answer is unknown", "18"), ("", "18"), ("**", "18"),
    (".", "18"), ("90%", "9"), ("0,9", "9"), ("1,234", "1.234"),
]  # fmt: skip
CONFIDENCES = [
    ("0.7", 0.7), ("0.7.", 0.7), ("**0.7**", 0.7), ("`0.7`", 0.7), ("0,7", 0.7), ("70%", 0.7), ("70 %", 0.7), (r"70\%", 0.7),
    ("**70%**", 0.7), ("100%", 1.0), ("0%", 0.0), ("0.7%", 0.007), ("$0.7$", 0.7), ("7,5%", 0.075), ("1,0", 1.0),
    ("101%", None), ("70", None), ("1,5", None), ("0.7 or 0.8", None), ("-0.7", None), ("high", None), ("7/10", None), ("%", None),
]  # fmt: skip
STRICTLY_WRONG = {"18 dollars", "The answer is 18", "18."}


def test_answers():
    assert len(RIGHT) + len(WRONG) + len(CONFIDENCES) >= 100
    table = [*RIGHT, *WRONG]
    results = math_correct.many([prediction for prediction, _ in table], [answer for _, answer in table])
    surprises = [
        (pair, result)
        for k, (pair, result) in enumerate(zip(table, results, strict=True))
        if result != (k < len(RIGHT))
    ]
    assert surprises == []


def test_strictly_read_answers():
    pairs = [pair for pair in RIGHT if pair[0] in STRICTLY_WRONG]
    assert len(pairs) == 3 and not any(math_correct_strict(*pair) for pair in pairs)
    assert math_correct_strict("0.5", r"\frac{1}{2}")


@pytest.mark.parametrize("content, confidence", CONFIDENCES)
def test_confidences(content, confidence):
    text = f"<confidence>{content}</confidence>"
    assert parse_confidence(text) == (confidence if confidence is None else pytest.approx(confidence, rel=1e-12))
    if content != "0.7":
        assert parse_confidence(text, strict=True) is None


SURE = "<confidence>{}</confidence>"


@pytest.mark.parametrize(
    "text, answer, confidence, first",
    [
        ("<answer>5</answer> No: <answer>4</answer>" + SURE.format(0.7), "4", 0.7, "5"),
        (f"<answer>result</answer>{SURE.format(0.1)} So <answer>4</answer>{SURE.format(0.7)}", "4", 0.7, "result"),
        (f"<answer>4</answer>{SURE.format(0.7)} rather {SURE.format(0.5)}", "4", 0.5, "4"),
        (f"<answer>4</answer>{SURE.format(0.7)}<answer>5</answer>", "4", 0.7, "4"),
        (f"{SURE.format(0.7)}<answer>4</answer>", "4", None, "4"),
        (f"<answer>3<answer>4</answer>{SURE.format(0.7)}", "4", 0.7, "3<answer>4"),
        (f"<answer>4</answer></answer>{SURE.format(0.7)}", "4", 0.7, "4"),
        (f"<answer>4{SURE.format(0.7)}", None, 0.7, None),
        ("<answer>4</answer> <answer>5", "4", None, "4"),
        ("4", None, None, None),
    ],
)
def test_which_answer_and_confidence(text, answer, confidence, first):
    assert (read_answer(text), parse_confidence(text)) == (answer, confidence)
    assert read_answer(text, strict=True) == first
    assert correctness_reward([text], ["4"]) == [float(answer == "4")]
    assert correctness_reward([text], ["4"], strict=True) == [float(first == "4")]


def test_which_attempts():
    attempt = "<{0}_attempt>{1} <answer>{2}</answer></{0}_attempt>".format
    text = (
        attempt("first", "", "result") + attempt("second", "", "result") + attempt("first", "<answer>3</answer> no", 4)
    )
    text += attempt("second", "", 5)
    assert read_attempts(text) == ("4", "5")
    assert read_attempts(text, strict=True) == ("result", "result")


# Time


HOSTILE = [f"9^{{9^{{9^{{{k}}}}}}}" for k in range(9, 60)] + [f"({k}!)!" for k in range(1000, 1051)]


def test_many_answers_with_hostile_ones(caplog, monkeypatch):
    """2048 answers, of which 5% never end. On a machine with other work, CPU time and not the clock is what is promised."""
    monkeypatch.setattr(math_pool, "BATCH_SECONDS", 5.0)
    math_correct("2^{1/2}", r"\sqrt{2}")  # the processes are there
    pairs = [(str(k), str(k)) for k in range(900)] + [(f"{k} dollars", str(k)) for k in range(600)]
    pairs += [(f"{k}/7", rf"\frac{{{2 * k}}}{{14}}") for k in range(396)] + [
        (f"{k}x + 1", f"1 + {k}x") for k in range(2, 52)
    ]
    right = len(pairs)
    pairs += [(text, "18") for text in HOSTILE]
    assert len(pairs) == 2048 and len(HOSTILE) / len(pairs) > 0.049
    results = math_correct.many([prediction for prediction, _ in pairs], [answer for _, answer in pairs])
    assert results == [True] * right + [False] * len(HOSTILE)
    assert len(caplog.messages) <= 1 and all(len(message) < 200 for message in caplog.messages)


def test_processes_that_end_are_started_again():
    assert math_correct("2^{1/2}", r"\sqrt{2}")
    math_pool._idle[0].process.kill()
    assert math_correct("3^{1/2}", r"\sqrt{3}")
    math_pool.stop()
    assert math_correct("5^{1/2}", r"\sqrt{5}")
