import sys

import pytest
from PIL import Image, ImageDraw, ImageFont

from flow_trl.rewards import get_reward_func
from flow_trl.rewards.ocr import OCRReward, ocr_score
from flow_trl.utils import MissingExtraError


WORDS = ["CAT", "HELP", "QUEEN", "SKY", "BREAD"]


def write(text, size=32, font_size=11, mode="RGB"):
    image = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).text((size / 2, size / 2), text, fill="black", font=font, anchor="mm", align="center")
    return image.convert(mode)


@pytest.fixture(scope="module")
def reward_func():
    pytest.importorskip("rapidocr_onnxruntime")
    return OCRReward()


def test_reads_small_words(reward_func):
    images = [write(word, font_size=10) for word in WORDS]
    assert reward_func(prompts=[f'the word "{word}"' for word in WORDS], images=images) == [1.0] * len(WORDS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_reads_every_mode(reward_func, mode):
    images = [write("CAT", mode=mode), write("CAT", size=128, font_size=30, mode=mode)]
    assert reward_func(prompts=["", ""], images=images, text=["CAT", "CAT"]) == [1.0, 1.0]


def test_reads_larger_images_with_several_lines(reward_func):
    image = write("Next Bus\n10 Minutes", size=256, font_size=32)
    assert reward_func(prompts=['a sign that says "Next bus 10 minutes"'], images=[image]) == [1.0]


@pytest.mark.parametrize(
    ("target", "distance", "length"),
    [
        ("CAT", 0, 3),
        ("c a t", 0, 3),  # case and spaces do not count
        ("CAR", 1, 3),  # a substitution
        ("CATS", 1, 4),  # an insertion
        ("AT", 1, 2),  # a deletion
        ("TAC", 2, 3),
        ("HELLO", 5, 5),
        ("I", 1, 1),  # a distance of 3, counted as the target's length
    ],
)
def test_score_is_one_minus_the_normalised_edit_distance(reward_func, target, distance, length):
    image = write("CAT")
    assert reward_func(prompts=[f'the word "{target}"'], images=[image]) == [1 - distance / length]
    assert reward_func(prompts=["a word"], images=[image], text=[target]) == [1 - distance / length]


@pytest.mark.parametrize(
    ("reading", "target", "expected"),
    [
        ("xx Hello World yy", "hello world", 1),  # whatever stands beside it
        ("HELLO", "h e l l o", 1),
        ("helo", "hello", 4 / 5),
        ("xxx helo", "hello", 1 / 5),  # not contained: the letters beside it cost
        ("a long sentence", "cat", 0),  # a distance above the target's length counts as that
        ("", "cat", 0),
    ],
)
def test_flow_grpo_s_rule(reading, target, expected):
    assert ocr_score(reading, target, contained=True) == pytest.approx(expected)


def test_flow_grpo_s_rule_by_name(reward_func):
    image = write("Next Bus\n10 Minutes", size=256, font_size=32)
    columns = {"prompts": ['a sign "next bus"', 'a sign "last bus"', "a sign"], "images": [image] * 3}
    assert reward_func(**columns) == [0.0, 0.0, None]
    scores = get_reward_func("ocr_flow_grpo")(**columns)
    assert scores == [1.0, 0.0, None]


def test_a_blank_target_has_no_score():
    with pytest.raises(ValueError, match="`target` is ' '"):
        ocr_score("cat", " ")


def test_nothing_to_read_scores_zero(reward_func):
    images = [Image.new("RGB", (size, size), "white") for size in (32, 128)]
    assert reward_func(prompts=['"CAT"'] * 2, images=images) == [0.0, 0.0]


def test_target(reward_func):
    images = [write("CAT")] * 6
    prompts = ["a cat", 'an empty ""', 'the words "CAT" and "DOG"', "in curly quotes: “CAT”", '"DOG"', '"DOG"']
    text = [None, None, None, None, "CAT", " "]  # a given text is the target, and a blank one is none
    assert reward_func(prompts=prompts, images=images, text=text) == [None, None, 1.0, 1.0, 1.0, None]


def test_order_and_batch_do_not_matter(reward_func):
    images = [write("CAT"), write("CAT", size=128, font_size=30), *(write(word, font_size=10) for word in WORDS)]
    text = ["CAR", "CARS", "CAT", "HELLO", "QUEUE", "SKI", "BROAD"]
    together = reward_func(prompts=[""] * 7, images=images, text=text)
    alone = [reward_func(prompts=[""], images=[i], text=[t])[0] for i, t in zip(images, text, strict=True)]
    backwards = reward_func(prompts=[""] * 7, images=images[::-1], text=text[::-1])[::-1]
    assert together == alone == backwards
    assert together == pytest.approx([2 / 3, 0.5, 1.0, 0.6, 0.6, 2 / 3, 0.8])


def test_no_images(reward_func):
    assert reward_func(prompts=[], images=[], text=[], other=[]) == []


def test_videos_are_refused(reward_func):
    assert not reward_func.takes_videos
    with pytest.raises(ValueError, match="`ocr` takes single images.* a function of your own that picks frames"):
        reward_func(prompts=['"CAT"'], images=[[write("CAT")] * 3])


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"^The OCR reward .*flow-trl\[ocr\]"):
        OCRReward()
