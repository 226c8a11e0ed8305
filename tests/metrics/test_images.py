"""Metrics of images, and of what is read in them or found in them."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image
from rapidfuzz.distance import Levenshtein

from flow_trl import metrics
from flow_trl.rewards.clip import ClipScore
from flow_trl.tiny import CLIP_FOLDER, load_clip, load_prompts, scene_reward
from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.scenes import render_scene


PICTURE = Path(__file__).parents[2] / "model_cards" / "tiny-scenes-control-variate" / "before_after.png"


# CLIP


@pytest.fixture(scope="module")
def rows():
    return load_prompts("scenes", "test").select(range(8)).to_list()


@pytest.fixture(scope="module")
def pictures(rows):
    """Right ones for the even rows, a red circle for the others."""
    red_circle = [{"class": "circle", "count": 1, "color": "red"}]
    return [render_scene(row["include"] if i % 2 == 0 else red_circle, seed=i) for i, row in enumerate(rows)]


def test_clip_score_is_the_mean_of_the_reward(rows, pictures, tmp_path):
    prompts = [row["prompt"] for row in rows]
    scores = ClipScore(*load_clip())(prompts=prompts, images=pictures)
    metric = metrics.load("clip_score", keep_in_memory=True)
    results = metric.compute(predictions=pictures, references=prompts, model=str(CLIP_FOLDER), batch_size=3)
    assert results["scores"] == pytest.approx(scores, abs=1e-3)
    assert results["clip_score"] == pytest.approx(np.mean(scores))
    assert results["clip_score_se"] == pytest.approx(np.std(scores, ddof=1) / 8**0.5)
    # Paths as well as images, and groups
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(8)]
    grouped = metric.compute(predictions=paths, references=prompts, model=str(CLIP_FOLDER), groups=[0, 0, 1, 1] * 2)
    assert grouped["scores"] == pytest.approx(scores, abs=1e-3)
    assert grouped["clip_score_se"] != pytest.approx(results["clip_score_se"])


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_bad_input_of_clip_metrics(name):
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="`predictions` is empty"):
        metrics.load(name, keep_in_memory=True).compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="`groups` has 1 entries, but there are 2"):
        metrics.load(name, keep_in_memory=True).compute(predictions=[image] * 2, references=["a"] * 2, groups=[1])
    with pytest.raises(ValueError, match='`model` is "nothing/there", from which no CLIP can be loaded'):
        metrics.load(name, keep_in_memory=True).compute(predictions=[image], references=["a"], model="nothing/there")


# OCR


@pytest.fixture(scope="module")
def ocr_accuracy():
    return metrics.load("ocr_accuracy", keep_in_memory=True)


@pytest.mark.parametrize(
    ("reading", "target", "flow_grpo", "flow_trl"),
    [
        ("Fresh Bread", "fresh bread", 1, 1),
        ("FRESHBREAD", "Fresh\nBread", 1, 1),
        ("the Fresh Bread", "Fresh Bread", 1, 0.7),
        ("Frash Bread", "Fresh Bread", 0.9, 0.9),
        ("a much longer text without it", "cat", 0, 0),
        ("", "cat", 0, 0),
    ],
)
def test_both_rules_of_ocr(ocr_accuracy, reading, target, flow_grpo, flow_trl):
    results = ocr_accuracy.compute(predictions=[reading], references=[target])
    assert (results["flow_grpo"], results["flow_trl"]) == pytest.approx((flow_grpo, flow_trl))
    assert results["exact"] == float(flow_trl == 1)
    assert results["readings"] == [reading] and results["flow_grpo_se"] is None


def test_the_stricter_rule_is_rapidfuzz_normalized_for_texts_of_one_length(ocr_accuracy):
    pairs = [("kitten", "mitten"), ("flaw", "lawn"), ("abcd", "wxyz")]
    results = ocr_accuracy.compute(predictions=[a for a, _ in pairs], references=[b for _, b in pairs])
    similar = [Levenshtein.normalized_similarity(a, b) for a, b in pairs]
    assert results["flow_trl"] == pytest.approx(np.mean(similar))
    assert results["flow_trl_se"] == pytest.approx(np.std(similar, ddof=1) / 3**0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictions": [], "references": []}, "`predictions` is empty"),
        ({"references": ["a", " \n"]}, r"`references\[1\]` is ' \\n'"),
        ({"references": ["a"]}, "Mismatch"),
        ({"groups": [1, 2, 3]}, "`groups` has 3 entries, but there are 2"),
        ({"predictions": ["a", None]}, r"`predictions\[1\]` is None"),
        ({"predictions": ["a", str(PICTURE)]}, r"`predictions\[1\]` is .*, which is no reading: .* open images"),
    ],
)
def test_bad_input_of_ocr(kwargs, message):
    metric = metrics.load("ocr_accuracy", keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": ["a", "b"], "references": ["a", "b"], **kwargs})


# GenEval


@pytest.fixture(scope="module")
def geneval():
    return metrics.load("geneval", keep_in_memory=True)


def test_geneval_of_flags_is_the_summary_of_its_script(geneval):
    rng = np.random.default_rng(0)
    tags = ["single_object"] * 5 + ["counting"] * 12 + ["position"] * 3
    correct = rng.random(20) < 0.6
    results = geneval.compute(predictions=correct, references=tags)
    shares = {tag: np.mean([c for c, t in zip(correct, tags, strict=True) if t == tag]) for tag in dict.fromkeys(tags)}
    assert {tag: results[tag] for tag in shares} == pytest.approx(shares)
    assert results["overall"] == pytest.approx(np.mean(list(shares.values()))) != pytest.approx(correct.mean())
    errors = [results[f"{tag}_se"] for tag in shares]
    assert results["overall_se"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 3)
    assert results["correct"] == correct.tolist()


def test_geneval_of_images_is_the_strict_reward(geneval, rows, pictures):
    columns = {name: [row[name] for row in rows] for name in ("tag", "include", "exclude")}
    expected = scene_reward(strict=True)(images=pictures, **columns)
    assert 0 < sum(expected) < 8
    for detector in (detect_shapes, "flow_trl.tiny.detector.detect_shapes"):
        results = geneval.compute(predictions=pictures, references=rows, detector=detector)
        assert results["correct"] == [score == 1 for score in expected]
    # GenEval's own lines: an index as a number, and no keys without need
    line = {
        "tag": "position",
        "prompt": "",
        "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
    }
    line["include"][1]["position"] = ["left of", 0]
    image = render_scene(line["include"], seed=0)
    assert geneval.compute(predictions=[image], references=[line], detector=detect_shapes)["position"] == 1


def test_four_images_of_a_prompt_are_not_four_prompts(geneval):
    correct, tags = [True, True, False, False], ["colors"] * 4
    alone = geneval.compute(predictions=correct, references=tags)
    together = geneval.compute(predictions=correct, references=tags, groups=["a", "a", "b", "b"])
    assert together["colors_se"] == 0.5 > alone["colors_se"]
    assert geneval.compute(predictions=correct, references=tags, groups=["a"] * 4)["overall_se"] is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictions": [], "references": []}, "`predictions` is empty"),
        ({"references": ["overall", "a"]}, "must not be 'overall'"),
        ({"references": [{"tag": "colors"}] * 2}, r"`references\[0\]` is .*`tag` and `include`"),
        ({"predictions": [1, 0.7]}, r"`predictions\[1\]` is 0.7: .* True or False"),  # a graded score
        ({"predictions": ["no", "yes"]}, r"`predictions\[0\]` is 'no'"),
        ({"predictions": [Image.new("RGB", (8, 8))] * 2}, "Pass images with GenEval's metadata"),
        ({"groups": [1]}, "`groups` has 1 entries, but there are 2"),
    ],
)
def test_bad_input_of_geneval(kwargs, message):
    metric = metrics.load("geneval", keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": [True, False], "references": ["a", "b"], **kwargs})


def test_geneval_of_images_without_a_detector_names_the_remedy(pictures, rows):
    metric = evaluate.load(str(metrics.FOLDER / "geneval"), keep_in_memory=True)
    with pytest.raises(ValueError, match="network"):
        metric.compute(predictions=pictures, references=rows)
