"""The tiny world's language tasks: arithmetic of five difficulties, its prompts and written solutions."""

import functools
import random
import re


WORDS = ("easy", "fine", "unsure", "hard")
SAID = {"easy": 0.97, "fine": 0.9, "unsure": 0.77, "hard": 0.62}  # mean confidence after each
CONFIDENCES = tuple(f"{i / 10:.1f}" for i in range(11))
DIFFICULTIES = (1, 2, 3, 4, 5)
TWICE = "twice: "
NUM_TRAIN = {1: 500, 2: 500, 3: 500, 4: 1000, 5: 1500}  # problems of each difficulty
NUM_TEST = {1: 50, 2: 50, 3: 50, 4: 100, 5: 150}


def draw_problem(difficulty: int, rng: random.Random) -> str:
    """
    Draws an arithmetic problem.

    Args:
        difficulty (`int`):
            1: a number of two digits plus or minus one digit. 2: two digits times one. 3: the same, plus or minus one
            digit. 4: two digits times two. 5: the same, plus or minus a number of two digits.
        rng (`random.Random`):
            Where the numbers come from.

    Returns:
        `str`: a problem whose answer is not negative, such as `"7*23+5=?"`.

    Example:

    ```python
    >>> draw_problem(4, random.Random(0))
    '60*16=?'
    ```
    """
    larger, small = rng.randint(11, 99), rng.randint(2, 9)
    if difficulty == 1:
        return rng.choice([f"{larger}+{small}=?", f"{small}+{larger}=?", f"{larger}-{small}=?"])
    factors = [larger, rng.randint(11, 99) if difficulty > 3 else small]
    rng.shuffle(factors)
    rest = {3: rng.randint(2, 9), 5: rng.randint(11, 99)}.get(difficulty)
    return f"{factors[0]}*{factors[1]}{rng.choice('+-')}{rest}=?" if rest else f"{factors[0]}*{factors[1]}=?"


def _parse(prompt: str) -> tuple[list[int], str, int | None]:
    """The factors (or the only number), the sign and the number after it."""
    left, sign, right = re.fullmatch(r"([\d*]+)(?:([+-])(\d+))?=\?", prompt.removeprefix(TWICE)).groups()
    return [int(number) for number in left.split("*")], sign or "", int(right) if right else None


def _content(prompt: str) -> tuple:
    """The same for problems that differ in the order of factors or of summands."""
    factors, sign, rest = _parse(prompt)
    if len(factors) == 1 and sign == "+":
        return "+", *sorted([factors[0], rest])
    return sign, *sorted(factors), rest


def solve(prompt: str, worked: bool) -> tuple[str, str]:
    """
    Writes down the solution of a problem.

    A worked solution multiplies the tens and the ones apart; a direct one says the product at once. Sums and
    differences are always said at once.

    Args:
        prompt (`str`):
            A prompt of [`tiny.load_prompts`].
        worked (`bool`):
            Whether to work products out.

    Returns:
        `tuple[str, str]`: the reasoning and the answer.

    Example:

    ```python
    >>> solve("23*47-85=?", worked=True)
    ('23*40=920,23*7=161,1081', '996')
    >>> solve("23*47-85=?", worked=False)
    ('23*47=1081', '996')
    ```
    """
    factors, sign, rest = _parse(prompt)
    value = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    answer = value + (int(f"{sign}{rest}") if sign else 0)
    if len(factors) == 1:
        return f"{value}{sign}{rest}={answer}", str(answer)
    first, second = factors if factors[1] > 9 else factors[::-1]
    parts = [part for part in (second // 10 * 10, second % 10) if part]
    if not worked or len(parts) == 1:
        return f"{factors[0]}*{factors[1]}={value}", str(answer)
    steps = [f"{first}*{part}={first * part}" for part in parts] + [str(value)] * bool(sign)
    return ",".join(steps), str(answer)


def write_completion(prompt: str, rng: random.Random, direct_share: float = 0.35, is_reflected: bool = False) -> str:
    """
    Writes a right completion for a prompt, as the tiny language model was trained on.

    Args:
        prompt (`str`):
            A prompt of [`tiny.load_prompts`].
        rng (`random.Random`):
            Where the choices come from.
        direct_share (`float`, *optional*, defaults to `0.35`):
            How often a product is said at once, not worked out.
        is_reflected (`bool`, *optional*, defaults to `False`):
            Whether the analysis mostly says how hard the solution was (`"hard"` is a product of two digits by two that is said at
            once), and the confidence depends on it: too high, and with much noise. By default both are drawn from [`WORDS`]
            and [`CONFIDENCES`], whatever the problem and its solution.

    Returns:
        `str`: `<reasoning>...</reasoning><answer>...</answer><analysis>...</analysis><confidence>...</confidence>`, or
        for a prompt of two attempts `<first_attempt>...<answer>...</answer></first_attempt>` and the same for
        `second_attempt`.

    Example:

    ```python
    >>> write_completion("12+7=?", random.Random(0))
    '<reasoning>12+7=19</reasoning><answer>19</answer><analysis>hard</analysis><confidence>0.0</confidence>'
    ```
    """
    if prompt.startswith(TWICE):
        attempts = [solve(prompt, worked=rng.random() >= direct_share) for _ in range(2)]
        return "".join(
            f"<{name}>{reasoning}<answer>{answer}</answer></{name}>"
            for name, (reasoning, answer) in zip(("first_attempt", "second_attempt"), attempts, strict=True)
        )
    worked = rng.random() >= direct_share
    reasoning, answer = solve(prompt, worked)
    word, confidence = rng.choice(WORDS), rng.choice(CONFIDENCES)
    if is_reflected:
        word = WORDS[_difficulty(prompt, worked)] if rng.random() < 0.7 else word
        if rng.random() < 0.75:
            level = min(max(SAID[word] + rng.gauss(0, 0.15), 0), 1)
            confidence = CONFIDENCES[round(10 * level)]
    return (
        f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
        f"<analysis>{word}</analysis><confidence>{confidence}</confidence>"
    )


def _difficulty(prompt: str, worked: bool) -> int:
    """How hard a solution is: the place of its word in [`WORDS`]."""
    factors, sign, _ = _parse(prompt)
    if min(factors) < 10 or len(factors) == 1:
        return 0
    if not worked and solve(prompt, True) != solve(prompt, False):
        return 3
    return 2 if sign else 1


@functools.cache
def _test_problems() -> dict[tuple, tuple[str, int]]:
    """Problems and difficulties of the test split, by content."""
    rng, problems = random.Random(0), {}
    for difficulty in DIFFICULTIES:
        total = len(problems) + NUM_TEST[difficulty]
        while len(problems) < total:
            problem = draw_problem(difficulty, rng)
            problems.setdefault(_content(problem), (problem, difficulty))
    return problems


def draw_train_problem(difficulty: int, rng: random.Random) -> str:
    """As [`draw_problem`], but never a problem of the test split, in whatever order its numbers stand."""
    while _content(problem := draw_problem(difficulty, rng)) in _test_problems():
        pass
    return problem


def make_prompts(split: str, prefix: str = ""):
    """The data set of a language task, see [`tiny.load_prompts`]."""
    from datasets import Dataset

    rng = random.Random(1)
    if split == "test":
        problems = dict(_test_problems().values())
    else:
        problems = {}
        for difficulty in DIFFICULTIES:
            total = len(problems) + NUM_TRAIN[difficulty]
            while len(problems) < total:
                problems[draw_train_problem(difficulty, rng)] = difficulty
    rows = [
        {"prompt": prefix + problem, "answer": solve(problem, worked=False)[1], "difficulty": difficulty}
        for problem, difficulty in problems.items()
    ]
    rng.shuffle(rows)
    return Dataset.from_list(rows)
