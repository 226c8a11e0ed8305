"""Reward functions that behave in every way they can, scored without a trainer; and the stream that scores images."""

import asyncio
import itertools
import logging
import math
import queue
import socket
import threading
import weakref
from collections import Counter, defaultdict
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerState

from flow_trl import scoring
from flow_trl.generation import Stopwatch, stream
from flow_trl.scoring import RewardLog, Scorer, in_thread


PROMPTS = ["a cat", "a dog", "a cow"]
REDS = [30, 10, 20]
NAN = math.nan


def pictures(reds=REDS):
    return [Image.new("RGB", (6, 4), (red, 0, 0)) for red in reds]


def frames(image):
    return image if isinstance(image, list) else [image]


def redness(prompts, images, **columns):
    return [frames(image)[0].getpixel((5, 3))[0] for image in images]


def score(reward_funcs, columns=None, images=None, **options):
    return Scorer(reward_funcs, **options)(pictures() if images is None else images, PROMPTS, columns)


def same(scores, expected):
    torch.testing.assert_close(scores, torch.tensor(expected).float(), rtol=0, atol=0, equal_nan=True)


def names(error, *words):
    message = " ".join([str(error), *getattr(error, "__notes__", [])])
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def fail(error):
    raise error


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(scoring, "LAST_BACKOFF", 0.003)


@pytest.fixture
def release():
    """What a function that hangs waits for, so that it ends with the test."""
    event = threading.Event()
    yield event
    event.set()


# What functions return, in each of the ways in which they are called


def sync(body):
    def judge(prompts, images):
        return body()

    return judge


def asynchronous(body):
    async def judge(prompts, images):
        await asyncio.sleep(0)
        return body()

    return judge


def coroutine(body):
    def judge(prompts, images):
        return asynchronous(body)(prompts, images)

    return judge


WAYS = {
    "sync": (sync, {}),
    "in a thread": (sync, {"reward_timeout": 60}),
    "async": (asynchronous, {}),
    "async, timed": (asynchronous, {"reward_timeout": 60}),
    "a coroutine": (coroutine, {}),
}
ways = pytest.mark.parametrize("way, options", WAYS.values(), ids=WAYS)

SCORES = {
    "a list": (lambda: [1, 2.5, -3], [1, 2.5, -3]),
    "a tuple": (lambda: (1, 2, 3), [1, 2, 3]),
    "a generator": (lambda: (i / 2 for i in range(3)), [0, 0.5, 1]),
    "a map": (lambda: map(abs, [-1, -2, -3]), [1, 2, 3]),
    "values of a dict": (lambda: {"a": 1, "b": 2, "c": 3}.values(), [1, 2, 3]),
    "an array": (lambda: np.arange(3, dtype=np.int8), [0, 1, 2]),
    "an array of objects": (lambda: np.array([1, None, Fraction(1, 2)]), [1, NAN, 0.5]),
    "an array (N, 1)": (lambda: np.ones((3, 1)), [1, 1, 1]),
    "numpy's scalars": (lambda: [np.float16(0.5), np.int64(2), np.bool_(True)], [0.5, 2, 1]),
    "0-d arrays": (lambda: [np.array(1.5), np.array(2), np.array(False)], [1.5, 2, 0]),
    "a tensor": (lambda: torch.arange(3), [0, 1, 2]),
    "a tensor with gradients": (lambda: torch.ones(3, requires_grad=True) * 2, [2, 2, 2]),
    "a bfloat16 tensor": (lambda: torch.full((3,), 0.1, dtype=torch.bfloat16), [0.10009765625] * 3),
    "a tensor (N, 1)": (lambda: torch.arange(3.0)[:, None], [0, 1, 2]),
    "0-d tensors": (lambda: [torch.tensor(1), torch.tensor(2.5), torch.tensor(True)], [1, 2.5, 1]),
    "decimals": (lambda: [Decimal("0.5"), Decimal(2), Decimal("-1e2")], [0.5, 2, -100]),
    "fractions": (lambda: [Fraction(1, 4), Fraction(3), Fraction(10**400, 10**400 * 2)], [0.25, 3, 0.5]),
    "booleans": (lambda: [True, False, True], [1, 0, 1]),
    "the largest float32": (lambda: [torch.finfo(torch.float32).max, 1e-50, -0.0], [3.4028234663852886e38, 0, 0]),
    "None for some": (lambda: [None, 2, None], [NAN, 2, NAN]),
    "None for all": (lambda: [None] * 3, [NAN] * 3),
}


@ways
@pytest.mark.parametrize("case", SCORES)
def test_scores(case, way, options):
    body, expected = SCORES[case]
    scores = score([redness, way(body)], **options)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    same(scores, list(zip(REDS, expected, strict=True)))


async def async_generator():
    yield 1.0


LIST, FINITE = "must return a list with one score for each of the 3 images", "must be finite; return `None` where"
NUMBER, NUMBER_OF = "a score is a number, or `None` where", "must return one for each image (`None` where"
NO_SCORES = {
    "None": (lambda: None, TypeError, ["returned None, a NoneType", LIST]),
    "a dict": (lambda: {"a": 1, "b": 2, "c": 3}, TypeError, ["returned {'a': 1, 'b': 2, 'c': 3}, a dict", LIST]),
    "a counter": (lambda: Counter("abc"), TypeError, ["a Counter", LIST]),
    "keys of a dict": (lambda: {1: "a", 2: "b", 3: "c"}.keys(), TypeError, ["a dict_keys", LIST]),
    "a string": (lambda: "123", TypeError, ["returned '123', a str", LIST]),
    "bytes": (lambda: b"123", TypeError, ["returned b'123', a bytes", LIST]),
    "a set": (lambda: {1, 2, 3}, TypeError, ["returned {1, 2, 3}, a set", LIST]),
    "a frozen set": (lambda: frozenset([1, 2, 3]), TypeError, ["a frozenset", LIST]),
    "a number": (lambda: 0.5, TypeError, ["returned 0.5, a float", LIST]),
    "a 0-d tensor": (lambda: torch.tensor(0.5), TypeError, ["returned tensor(0.5", "a Tensor", LIST]),
    "a 0-d array": (lambda: np.array(0.5), TypeError, ["returned array(0.5), a ndarray", LIST]),
    "an async generator": (async_generator, TypeError, ["a async_generator", LIST]),
    "nothing": (lambda: [], ValueError, ["returned 0 scores for 3 images", NUMBER_OF]),
    "too few": (lambda: [1, 2], ValueError, ["returned 2 scores for 3 images", NUMBER_OF]),
    "too many": (lambda: (0.5 for _ in range(4)), ValueError, ["returned 4 scores for 3 images", NUMBER_OF]),
    "a tensor (1, N)": (lambda: torch.ones(1, 3), ValueError, ["returned 1 scores for 3 images", NUMBER_OF]),
    "a tensor (N, 2)": (lambda: torch.ones(3, 2), TypeError, ["a Tensor, for image 0 (prompt 'a cat')", NUMBER]),
    "a string among them": (
        lambda: [1, "good", 3],
        TypeError,
        ["'good', a str, for image 1 (prompt 'a dog')", NUMBER],
    ),
    "an array of strings": (lambda: np.array(["1", "2", "3"]), TypeError, ["'1', a str, for image 0", NUMBER]),
    "nested": (lambda: [1, 2, [3]], TypeError, ["[3], a list, for image 2 (prompt 'a cow')", NUMBER]),
    "complex": (lambda: [1, 2, 3j], TypeError, ["3j, a complex, for image 2", NUMBER]),
    "a complex tensor": (lambda: torch.ones(3) * 1j, TypeError, ["1j, a complex, for image 0", NUMBER]),
    "NaN": (lambda: [1, NAN, 3], ValueError, ["returned nan for image 1 (prompt 'a dog')", FINITE]),
    "NaN of numpy": (lambda: np.array([1, 2, np.nan]), ValueError, ["nan for image 2 (prompt 'a cow')", FINITE]),
    "NaN of decimal": (lambda: [Decimal("NaN")] * 3, ValueError, ["nan for image 0 (prompt 'a cat')", FINITE]),
    "signaling NaN": (lambda: [1, 2, Decimal("sNaN")], ValueError, ["nan for image 2 (prompt 'a cow')", FINITE]),
    "infinity": (lambda: torch.tensor([1, math.inf, 3]), ValueError, ["returned inf for image 1", FINITE]),
    "minus infinity": (lambda: [1, 2, -math.inf], ValueError, ["returned -inf for image 2", FINITE]),
    "infinite in float32": (lambda: [1, 1e39, 3], ValueError, ["returned 1e+39 for image 1", FINITE]),
    "too large for a float": (lambda: [10**400, 2, 3], ValueError, ["returned 1000", "00 for image 0", FINITE]),
    "too large a decimal": (lambda: [Decimal("1e400"), 2, 3], ValueError, ["for image 0 (prompt 'a cat')", FINITE]),
}


@ways
@pytest.mark.parametrize("case", NO_SCORES)
def test_no_scores(case, way, options):
    body, kind, words = NO_SCORES[case]
    with pytest.raises(kind) as info:
        score([redness, way(body)], **options)
    names(info.value, "Reward function `judge` returned", *words)


RAISED = {
    "an error": (lambda: fail(ConnectionError("the judge is asleep")), ConnectionError, "the judge is asleep"),
    "a timeout of its own": (lambda: fail(TimeoutError("the judge is slow")), TimeoutError, "the judge is slow"),
    "an error in a generator": (lambda: (len(i) for i in [1, 2, 3]), TypeError, "object of type 'int' has no len()"),
    "the end of an iterator": (lambda: next(iter([])), (StopIteration, RuntimeError), ""),
}


@ways
@pytest.mark.parametrize("case", RAISED)
def test_what_a_function_raises_is_raised(case, way, options):
    body, kind, words = RAISED[case]
    with pytest.raises(kind) as info:
        score([redness, way(body)], **options)
    names(info.value, words, "Raised by the reward function `judge` for 3 images, the first of them", "prompt 'a cat'")


@ways
def test_a_function_that_does_not_take_a_column(way, options):
    func = way(lambda: [1, 2, 3])
    with pytest.raises(TypeError, match=r"judge\(\) got an unexpected keyword argument 'style'") as info:
        score(func, {"style": ["oil"] * 3}, **options)
    names(info.value, "Raised by the reward function `judge`")
    same(score(func, {"style": ["oil"] * 3}, reward_on_error="none", **options), [[NAN]] * 3)


@ways
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_exit_is_no_failed_score(error, way, options):
    """An async function could end the event loop with it, for which others wait."""
    awaited = way in (asynchronous, coroutine)
    exits = iter([True, False])
    scorer = Scorer([way(lambda: fail(error()) if next(exits) else [1, 2, 3])], **options)
    with pytest.raises(RuntimeError if awaited else error) as info:
        scorer(pictures(), PROMPTS)
    if awaited:
        names(info.value, f"It raised {error.__name__}()", "`judge`")
    same(scorer(pictures(), PROMPTS), [[1], [2], [3]])


@pytest.mark.parametrize("way", [asynchronous, coroutine])
def test_a_task_that_was_cancelled_is_a_failed_call(way):
    same(score(way(lambda: fail(asyncio.CancelledError())), reward_on_error="none"), [[NAN]] * 3)


# What functions do to what they get


def reverse(prompts, images, nested):
    for values in (prompts, images, nested):
        values.reverse()


def clear(prompts, images, nested):
    for values in (prompts, images, nested):
        values.clear()


def sort(prompts, images, nested):
    prompts.sort()
    images.sort(key=id)
    nested.sort(key=lambda value: value["words"])


def paint(prompts, images, nested):
    for frame in itertools.chain.from_iterable(map(frames, images)):
        frame.paste((99, 99, 99), (0, 0, 6, 4))
        frame.putpixel((5, 3), (77, 0, 0))
        frame.load()[5, 3] = (88, 0, 0)


def close(prompts, images, nested):
    for frame in itertools.chain.from_iterable(map(frames, images)):
        frame.close()


def scribble(prompts, images, nested):
    nested[0]["words"].append("!")
    nested[1].clear()
    images[0] = prompts[0] = None


def pixels(number_of_frames=None):
    images = torch.from_numpy(np.stack([np.asarray(image) for image in pictures()]))
    return images if number_of_frames is None else images[:, None].repeat(1, number_of_frames, 1, 1, 1)


IMAGES = {
    "PIL images": pictures,
    "lists of frames": lambda: [[image, image.rotate(180)] for image in pictures()],
    "pixels": pixels,
    "pixels of videos": lambda: pixels(2),
}


@pytest.mark.parametrize("mischief", [reverse, clear, sort, paint, close, scribble])
@pytest.mark.parametrize("kind", IMAGES)
def test_what_a_function_does_to_its_arguments_reaches_nobody(mischief, kind):
    seen = []

    def vandal(prompts, images, nested):
        mischief(prompts, images, nested)
        return [0, 0, 0]

    def witness(prompts, images, nested):
        seen.append((prompts, nested))
        return redness(prompts, images)

    async def async_witness(prompts, images, nested):
        return witness(prompts, images, nested)

    images, prompts, nested = IMAGES[kind](), list(PROMPTS), [{"words": [prompt]} for prompt in PROMPTS]
    scorer = Scorer([vandal, witness, async_witness])
    for _ in range(2):
        same(scorer(images, prompts, {"nested": nested}), [[0, red, red] for red in REDS])
    assert seen == [(PROMPTS, [{"words": [prompt]} for prompt in PROMPTS])] * 4
    assert prompts == PROMPTS and nested == seen[0][1]
    if isinstance(images, torch.Tensor):
        assert torch.equal(images, IMAGES[kind]())


@pytest.mark.parametrize("kind, number_of_frames", list(zip(IMAGES, [0, 2, 0, 2], strict=True)))
def test_functions_get_pil_images_and_lists_of_them(kind, number_of_frames):
    def judge(prompts, images):
        assert type(images) is list
        for image in images:
            assert type(image) is (list if number_of_frames else Image.Image)
            assert len(frames(image)) == (number_of_frames or 1)
            assert all(frame.size == (6, 4) and frame.mode == "RGB" for frame in frames(image))
        return redness(prompts, images)

    same(score(judge, images=IMAGES[kind]()), [[red] for red in REDS])


# Time


def hang(release):
    release.wait()
    return [1, 2, 3]


def hanging_generator(release):
    yield 1
    yield from hang(release)


@pytest.mark.parametrize("hangs", [hang, hanging_generator])
def test_a_function_that_hangs_is_left_behind(release, hangs):
    with pytest.raises(TimeoutError) as info:
        score(sync(lambda: hangs(release)), reward_timeout=0.1)
    names(info.value, "It took longer than `reward_timeout=0.1` seconds: allow more", "`judge`", "prompt 'a cat'")
    scores = score([sync(lambda: hangs(release)), redness], reward_timeout=0.1, reward_on_error="none")
    same(scores[:, 0], [NAN] * 3)


@pytest.mark.parametrize("way", [asynchronous, coroutine])
def test_an_async_function_that_never_ends_is_cancelled(way):
    ended = threading.Event()

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError, match="`reward_timeout=0.1`"):
        score(way(forever), reward_timeout=0.1)
    assert ended.wait(10)


def test_functions_go_on_in_one_fresh_loop_after_one_that_blocks_it(release):
    loops = defaultdict(list)

    async def blocks(prompts, images):
        loops["blocks"].append(asyncio.get_running_loop())
        if len(loops["blocks"]) == 1:
            release.wait()
        return [1, 1, 1]

    async def waits(prompts, images):
        loops["waits"].append(asyncio.get_running_loop())
        return [2, 2, 2]

    scorer = Scorer([blocks, waits, redness], reward_timeout=0.5, reward_retries=1)
    for _ in range(2):
        same(scorer(pictures(), PROMPTS), [[1, 2, red] for red in REDS])
    blocked, fresh, later = loops["blocks"]
    assert blocked is not fresh and loops["waits"] == [fresh, later] and fresh is later
    assert not scorer.failures


# Retries


@ways
@pytest.mark.parametrize("failure", [lambda: fail(OSError("busy")), lambda: [1, 2], lambda: [NAN] * 3])
def test_fails_twice_and_then_succeeds(caplog, way, options, failure):
    calls = itertools.count()
    scorer = Scorer(way(lambda: failure() if next(calls) < 2 else [1, 2, 3]), reward_retries=2, **options)
    same(scorer(pictures(), PROMPTS), [[1], [2], [3]])
    assert next(calls) == 3 and not scorer.failures
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    names(caplog.messages[0], "`judge` failed (", "called again in 0.001 seconds (retry 1 of 2)")
    names(caplog.messages[1], "`judge` failed (", "called again in 0.002 seconds (retry 2 of 2)")


def test_retries_get_what_the_first_call_got():
    seen = []

    def clears(prompts, images, style):
        seen.append((len(images), list(prompts), list(style)))
        clear(prompts, images, style)
        return [1] if len(seen) < 3 else [1, 2, 3]

    score(clears, {"style": ["oil", "ink", "oil"]}, reward_retries=2)
    assert seen == [(3, PROMPTS, ["oil", "ink", "oil"])] * 3


def test_waits_for_a_retry_grow_up_to_a_limit(caplog):
    with pytest.raises(OSError):
        score(sync(lambda: fail(OSError())), reward_retries=4)
    waits = [message.split(" in ")[1].split()[0] for message in caplog.messages]
    assert waits == ["0.001", "0.002", "0.003", "0.003"]


@ways
@pytest.mark.parametrize("retries", [0, 2])
def test_failing_to_the_end(caplog, way, options, retries):
    calls = itertools.count()

    def fails():
        raise OSError(f"busy {next(calls)}")

    with pytest.raises(OSError, match=f"busy {retries}") as info:
        score([redness, way(fails)], reward_retries=retries, **options)
    assert len(info.value.__notes__) == 1
    names(info.value, "Raised by the reward function `judge` for 3 images", "prompt 'a cat'")

    caplog.clear()
    scorer = Scorer([redness, way(fails)], reward_retries=retries, reward_on_error="none", **options)
    for count in (3, 6):
        same(scorer(pictures(), PROMPTS), [[red, NAN] for red in REDS])
        assert scorer.failures == {"judge": count}
        names(caplog.messages[-1], "`judge` failed (OSError('busy", "3 images have no score", "reward_on_error='none'")
    assert next(calls) == 3 * (retries + 1)


@ways
def test_failed_calls_keep_no_images(way, options):
    def asks():
        try:
            raise OSError("no connection")
        except OSError as error:
            raise ConnectionError("the judge is asleep") from error

    images = pixels()
    gone = weakref.ref(images)
    score([way(asks)], images=images, reward_retries=1, reward_on_error="none", **options)
    del images
    assert gone() is None


# Concurrency and the event loop


def test_async_functions_run_beside_each_other_and_beside_sync_ones():
    everyone = threading.Barrier(3)

    def here(prompts, images):
        everyone.wait(10)  # raises if one runs after another
        return [1, 1, 1]

    async def there(prompts, images):
        await asyncio.to_thread(everyone.wait, 10)
        return [2, 2, 2]

    async def elsewhere(prompts, images):
        await there(prompts, images)
        return [3, 3, 3]

    same(score([there, here, elsewhere]), [[2, 1, 3]] * 3)


def test_a_client_of_the_first_call_serves_later_ones_and_other_functions():
    ours, theirs = socket.socketpair()
    client = []

    async def judge(prompts, images):
        if not client:
            client.extend(await asyncio.open_connection(sock=ours))
        reader, writer = client
        writer.write(b"?\n")
        return [float(await asyncio.wait_for(reader.readline(), 10)) for _ in images]

    def other(prompts, images):  # sync, but what it returns is awaited
        return judge(prompts, images)

    scorer = Scorer([judge, other])
    with ours, theirs:
        for first in (1, 7):
            theirs.sendall("".join(f"{first + i}\n" for i in range(6)).encode())
            functions = [[0], [1]]
            scores = [scorer(pictures(), PROMPTS, functions=asked).nansum(dim=1) for asked in functions]
            same(torch.cat(scores), [float(first + i) for i in range(6)])
        assert theirs.recv(100) == b"?\n" * 4


@ways
def test_in_a_running_event_loop(way, options):
    async def notebook():
        return score([redness, way(lambda: [1, 2, 3])], **options)

    same(asyncio.run(notebook()), [[30, 1], [10, 2], [20, 3]])


# Weights, figures


def one(prompts, images, **columns):
    return [1, 2, None]


def two(prompts, images, **columns):
    return [None, 4, None]


def test_weighted_sum_of_what_applies():
    scorer = Scorer([one, redness, two], reward_weights=[2.0, 0.1, -1.0])
    scores = scorer(pictures(), PROMPTS)
    same(scores, [[1, 30, NAN], [2, 10, 4], [NAN, 20, NAN]])
    torch.testing.assert_close(scorer.weighted(scores), torch.tensor([2 + 3, 4 + 1 - 4, 2.0]))
    torch.testing.assert_close(scorer.weighted(scores.repeat(5, 1, 1)), torch.tensor([[5, 1, 2.0]] * 5))
    same(Scorer([one, two]).weighted(scores[:, [0, 2]]), [1, 6, 0])


def test_weight_zero_and_out_of_domain_are_watched_but_not_trained():
    scorer = Scorer([one, redness, two], [1.0, 0.0], ["two", "jpeg_compressibility"])
    assert scorer.names == ["one", "redness", "two", "jpeg_compressibility"]
    assert scorer.weights.tolist() == [1, 0, 0, 0] and scorer.trained == [0] and scorer.in_domain == [0, 1]
    scores = scorer(pictures(), PROMPTS)
    assert scores[:, 3].isfinite().all() and (scores[:, 3] < 0).all()
    same(scorer.weighted(scores), [1, 2, 0])


def test_only_those_that_are_asked():
    scorer = Scorer([fail, redness, one], [1.0, 1.0, 0.0])
    scores = scorer(pictures(), PROMPTS, functions=[1])
    same(scores, [[NAN, red, NAN] for red in REDS])
    assert scorer.unscored(scores) == ["fail"]
    assert scorer.unscored(torch.full((2, 3, 3), NAN)) == ["fail", "redness"]


def test_metrics():
    scorer = Scorer([one, redness, two])
    scores = torch.tensor([[1, 30, NAN], [2, 10, NAN], [NAN, 20, NAN], [3, 20, NAN]])
    expected = {
        "rewards/one/mean": 2,
        "rewards/one/std": (2 / 3) ** 0.5,
        "rewards/redness/mean": 20,
        "rewards/redness/std": 50**0.5,
    }
    assert scorer.metrics(scores) == pytest.approx(expected)
    errors = {"rewards/one/se": (2 / 9) ** 0.5, "rewards/redness/se": 12.5**0.5}
    assert scorer.metrics(scores, errors=True) == pytest.approx(expected | errors)
    assert scorer.metrics(scores[:1, :1].expand(1, 3), errors=True)["rewards/two/se"] == 0
    assert scorer.metrics(scores[:0], errors=True) == {}


# What functions get beside images and prompts


def test_extras_reach_those_that_take_them():
    got, log, state = {}, RewardLog(), TrainerState(global_step=3)

    def bare(prompts, images):
        got["bare"] = {}
        return [1, 1, 1]

    def metric(prompts, images, log_metric, style):
        got["metric"] = {"log_metric": log_metric, "style": style}
        log_metric("sharpness", torch.tensor(0.5))
        return [1, 1, 1]

    async def everything(prompts, images, **columns):
        got["everything"] = columns
        columns["log_metric"]("sharpness", 1)
        columns["log_extra"]("answer", ["x", "y", "z"])
        return [1, 1, 1]

    class Stateful:
        def __call__(self, prompts, images, *, trainer_state=None, style=None):
            got["Stateful"] = {"trainer_state": trainer_state, "style": style}
            return [trainer_state.global_step] * 3

    extras, style = log.extras(state), {"style": ["oil"] * 3}
    Scorer(bare)(pictures(), PROMPTS, extras=extras)
    scores = Scorer([metric, everything, Stateful()])(pictures(), PROMPTS, style, extras=extras)
    same(scores, [[1, 1, 3]] * 3)
    assert got == {
        "bare": {},
        "metric": {"log_metric": extras["log_metric"], **style},
        "everything": extras | style,
        "Stateful": {"trainer_state": state, **style},
    }
    assert log.metrics.keys() == {"sharpness"} and log.columns == {"answer": ["x", "y", "z"]}
    assert sorted(log.metrics["sharpness"]) == [0.5, 1.0]  # the async function may log after the other
    log.extras(state, columns=False)["log_extra"]("answer", ["again"])
    assert log.columns == {"answer": ["x", "y", "z"]}
    assert set(extras) == set(scoring.EXTRAS)


CHECKS = {
    "the columns that it names": (lambda prompts, images, style: None, ["style"], None),
    "all columns": (redness, ["style", "number"], None),
    "all extras": (lambda prompts, images, trainer_state, log_extra, log_metric: None, [], None),
    "no signature": (max, ["style"], None),
    "a default": (lambda prompts, images, style="oil": None, [], None),
    "a column that it does not take": (
        lambda prompts, images: None,
        ["style"],
        [TypeError, "cannot be called for `train_dataset`", "unexpected keyword argument 'style'", "`**columns`"],
    ),
    "a column that is not there": (
        lambda prompts, images, question: None,
        ["style"],
        [TypeError, "missing a required argument: 'question'", "the other columns ['style']"],
    ),
    "no images": (lambda prompts: None, [], [TypeError, "unexpected keyword argument 'images'"]),
    "positional": (lambda prompts, images, /: None, [], [TypeError, "'prompts'", "called by keyword"]),
    **{
        f"a column `{name}`": (
            redness,
            ["style", name],
            [ValueError, f"`train_dataset` has a column `{name}`", "rename"],
        )
        for name in ("prompts", "images", *scoring.EXTRAS)
    },
}


@pytest.mark.parametrize("case", CHECKS)
def test_check_of_columns(case):
    func, columns, wrong = CHECKS[case]
    scorer = Scorer([redness, func] if func is not redness else func)
    if wrong is None:
        scorer.check("train_dataset", columns)
    else:
        with pytest.raises(wrong[0]) as info:
            scorer.check("train_dataset", columns)
        names(info.value, *wrong[1:])


@pytest.mark.parametrize("takes_videos", [True, False, None])
def test_check_of_videos(takes_videos):
    def judge(prompts, images):
        return [1, 1, 1]

    if takes_videos is not None:
        judge.takes_videos = takes_videos
    scorer = Scorer([redness, judge])
    scorer.check_videos(False)
    if takes_videos is False:
        with pytest.raises(ValueError, match="`judge` scores single images.*`num_frames` to 1"):
            scorer.check_videos(True)
    else:
        scorer.check_videos(True)


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        ([[]], ValueError, ["`reward_funcs=[]` is empty", "at least one"]),
        (["orc"], ValueError, ["'orc'", "'ocr'", "pass the function itself"]),
        ([[redness, 3]], TypeError, ["3, a int", "or a callable"]),
        ([[redness, redness]], ValueError, ["['redness', 'redness']", "its own `__name__`"]),
        ([[redness, one], [1.0]], ValueError, ["`reward_weights=[1.0]` has 1 entries", "2 reward functions"]),
        ([[redness, one], [1.0, 1.0], ["one"]], ValueError, ["has 2 entries", "1 reward functions ['redness']"]),
        ([redness, None, ["redness"]], ValueError, ["`out_of_domain_rewards=['redness']` leaves none"]),
        ([redness, None, ["hps"]], ValueError, ["'hps'", "neither a built-in", "(redness)", "add the function"]),
    ],
)
def test_wrong_arguments(arguments, kind, words):
    with pytest.raises(kind) as info:
        Scorer(*arguments)
    names(info.value, *words)


@pytest.mark.parametrize("images, style", [(2, 3), (4, 3), (3, 2)])
def test_another_number_of_images_prompts_or_entries(images, style):
    with pytest.raises(ValueError) as info:
        Scorer(redness)(pictures(range(images)), PROMPTS, {"style": ["oil"] * style})
    names(info.value, f"{{'images': {images}, 'prompts': 3, 'style': {style}}}", "per image")


# The stream

overlapping = pytest.mark.parametrize("overlap", [True, False])


def outcome(future):
    assert future.done()
    return repr(future.exception()) if future.exception() else future.result()


@overlapping
@pytest.mark.parametrize("broken", [(), (0,), (2,), (4,), (0, 1, 2, 3, 4)])
def test_stream_gives_the_same_in_a_thread_or_not(overlap, broken):
    """An error of a score is in its future; the items after it are made and scored."""

    def judged(item, images):
        return fail(OSError(item)) if item in broken else (item, images * 10)

    streamed = stream(range(5), lambda item: (f"kept {item}", item + 1), judged, overlap=overlap)
    expected = [f"OSError({item})" if item in broken else (item, (item + 1) * 10) for item in range(5)]
    assert [(kept, outcome(future)) for kept, future in streamed] == [(f"kept {i}", expected[i]) for i in range(5)]


@overlapping
def test_stream_of_nothing(overlap):
    assert list(stream([], fail, fail, overlap=overlap)) == []


def test_the_next_is_made_while_one_is_scored():
    made, scoring_began = [threading.Event() for _ in range(5)], [threading.Event() for _ in range(5)]

    def make(item):
        assert item == 0 or scoring_began[item - 1].wait(10)
        made[item].set()
        return item, item

    def judged(item, images):
        scoring_began[item].set()
        return item == 4 or made[item + 1].wait(10)

    assert all(future.result() for _, future in stream(range(5), make, judged))


def test_nothing_is_made_while_one_is_scored_without_overlap():
    steps = []

    def make(item):
        steps.append(f"make {item}")
        return item, item

    for kept, _ in stream("ab", make, lambda item, images: steps.append(f"score {item}"), overlap=False):
        steps.append(f"yield {kept}")
    assert steps == ["make a", "score a", "yield a", "make b", "score b", "yield b"]


class Pixels:
    pass


@overlapping
def test_images_of_at_most_two_items_exist(overlap):
    alive, peaks, made = weakref.WeakSet(), [], [threading.Event() for _ in range(10)]

    def make(item):
        images = Pixels()
        alive.add(images)
        peaks.append(len(alive))
        made[item].set()
        return item, images

    def judged(item, images):
        assert not overlap or item == 9 or made[item + 1].wait(10)
        return item

    assert [future.result() for _, future in stream(range(10), make, judged, overlap=overlap)] == list(range(10))
    assert peaks == [1, *[2 if overlap else 1] * 9]
    assert not alive


def test_a_thread_lets_go_of_images_before_its_result_is_known():
    images, began, known = Pixels(), threading.Event(), queue.Queue()
    gone = weakref.ref(images)
    future = in_thread(partial(lambda images: began.wait(10), images))
    del images
    future.add_done_callback(lambda _: known.put(gone() is None))
    began.set()
    assert future.result(10) and known.get(timeout=10)


@overlapping
def test_a_consumer_that_stops_early(overlap):
    made, scored = [], []

    def make(item):
        made.append(item)
        return item, item

    streamed = stream(itertools.count(), make, lambda item, images: scored.append(item), overlap=overlap)
    assert [kept for kept, _ in itertools.islice(streamed, 3)] == scored == [0, 1, 2]
    streamed.close()
    assert made == [0, 1, 2, 3][: 4 if overlap else 3] and scored == [0, 1, 2]


@overlapping
def test_what_make_raises_ends_the_stream(overlap):
    made = []

    def make(item):
        made.append(item)
        return (item, item) if item < 2 else fail(OSError("no memory"))

    streamed, got = stream(range(5), make, lambda item, images: item, overlap=overlap), []
    with pytest.raises(OSError, match="no memory"):
        got.extend(future.result() for _, future in streamed)
    assert made == [0, 1, 2] and got == [0, 1][: 1 if overlap else 2]


@overlapping
def test_seconds_of_scores_and_of_waiting_for_them(overlap):
    seconds = Stopwatch()

    def judged(item, images):
        threading.Event().wait(0.05)

    list(stream(range(2), lambda item: (item, item), judged, overlap=overlap, stopwatch=seconds))
    assert seconds["reward"] >= 0.1
    assert overlap or seconds["reward_wait"] >= seconds["reward"]
