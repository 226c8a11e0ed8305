import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from flow_trl.rewards.scene import (
    GENEVAL_COLORS,
    MASK2FORMER,
    Detection,
    SceneReward,
    TransformersDetector,
    relations,
    score_scene,
)
from flow_trl.tiny import CLIP_FOLDER, LANGUAGE_FOLDER, load_prompts, scene_reward
from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.scenes import render_scene


RED_CIRCLE = Detection("circle", "red", (2, 10, 12, 20), 0.9)  # left
BLUE_SQUARE = Detection("square", "blue", (20, 10, 30, 20), 0.8)  # right
LEFT_OF = [
    {"class": "square", "count": 1, "color": "blue"},
    {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
]


def mirrored(row):
    """The same scene with its relation turned round, or its count one up, or another colour."""
    row = deepcopy(row)
    entry = row["include"][-1]
    if entry["position"]:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        entry["position"][0] = opposite[entry["position"][0]]
    elif entry["color"]:
        entry["color"] = "red" if entry["color"] != "red" else "blue"
    else:
        entry["count"] += 1
    return row


def test_relations_are_geneval_s():
    middle = (20, 20, 30, 30)
    assert relations((0, 20, 10, 30), middle) == {"left of"}
    assert relations((40, 20, 50, 30), middle) == {"right of"}
    assert relations((20, 0, 30, 10), middle) == {"above"}
    assert relations((20, 40, 30, 50), middle) == {"below"}
    assert relations((0, 0, 10, 10), middle) == {"left of", "above"}
    assert relations(middle, middle) == relations((21, 21, 31, 31), middle) == set()


def test_strict_score_is_one_for_ground_truth_and_zero_for_other_metadata():
    rows = load_prompts("scenes", "test").select(range(200)).to_list()
    columns = {"images": [render_scene(row["include"], seed=i) for i, row in enumerate(rows)]}
    reward = scene_reward(strict=True)
    right = reward(
        **columns, include=[row["include"] for row in rows], exclude=[row["exclude"] for row in rows], tag=["x"] * 200
    )
    wrong = reward(**columns, include=[mirrored(row)["include"] for row in rows])
    assert set(right) <= {0.0, 1.0}
    assert np.mean(right) >= 0.98 and np.mean(wrong) <= 0.02
    graded = scene_reward()(**columns, include=[mirrored(row)["include"] for row in rows])
    assert all(0 < score < 1 for score in graded)


def test_graded_score_is_the_mean_of_its_parts():
    def graded(found):
        return score_scene(found, LEFT_OF)

    assert graded([RED_CIRCLE, BLUE_SQUARE]) == 1
    assert graded([]) == 0
    # parts: square, its colour, circle, its colour, its position
    assert graded([BLUE_SQUARE]) == pytest.approx(2 / 5)
    assert graded([RED_CIRCLE]) == pytest.approx(2 / 5)
    assert graded([Detection("circle", "green", RED_CIRCLE.box), BLUE_SQUARE]) == pytest.approx(4 / 5)
    assert graded([Detection("circle", "red", (2, 20, 12, 30)), Detection("square", "blue", (2, 0, 12, 10))]) == 4 / 5
    two_circles = [RED_CIRCLE, Detection("circle", "red", (2, 22, 10, 30), 0.7), BLUE_SQUARE]
    assert graded(two_circles) == pytest.approx(2 / 5)  # a surplus object costs count, colour and position
    assert score_scene(two_circles, LEFT_OF, strict=True) == 1  # which GenEval forgives unless `exclude` names it
    assert score_scene(two_circles, LEFT_OF, [{"class": "circle", "count": 2}], strict=True) == 0


@pytest.mark.parametrize(("found", "expected"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (6, 0), (9, 0)])
def test_graded_count_falls_with_the_error(found, expected):
    objects = [Detection("circle", "red", (i, 0, i + 1, 1)) for i in range(found)]
    assert score_scene(objects, [{"class": "circle", "count": 3}]) == pytest.approx(expected)


def test_strict_score_looks_at_the_most_confident_objects():
    include = [{"class": "circle", "count": 1, "color": "red"}]
    red, green = Detection("circle", "red", (0, 0, 9, 9), 0.9), Detection("circle", "green", (20, 0, 29, 9), 0.5)
    assert score_scene([green, red], include, strict=True) == 1
    assert score_scene([Detection("circle", "green", (20, 0, 29, 9), 0.95), red], include, strict=True) == 0


def test_real_geneval_rows_are_scored_in_their_own_format_and_from_a_dataset():
    lines = """
    {"tag": "counting", "include": [{"class": "wine glass", "count": 2}], "exclude": [{"class": "wine glass", "count": 3}], "prompt": "a photo of two wine glasses"}
    {"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, {"class": "scissors", "count": 1, "color": "black"}], "prompt": "a photo of a pink handbag and a black scissors"}
    {"tag": "position", "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a cow right of a laptop"}
    """
    rows = [json.loads(line) for line in lines.strip().splitlines()]
    found = [
        [Detection("wine glass", None, (i, 0, i + 10, 10)) for i in (0, 20)],
        [Detection("handbag", "pink", (0, 0, 9, 9)), Detection("scissors", "black", (20, 0, 29, 9))],
        [Detection("laptop", "black", (0, 0, 9, 9)), Detection("cow", "white", (20, 0, 29, 9))],
    ]
    images = [Image.new("RGB", (8, 8))] * 3
    strict = SceneReward(detector=lambda images: found, strict=True)
    columns = {name: [row.get(name) for row in rows] for name in ("include", "exclude", "tag")}
    assert strict(prompts=["", "", ""], images=images, **columns) == [1, 1, 1]
    columns["include"][2][1]["position"] = ["right of", "0"]  # arrow cannot hold a text and a number in one list
    columns = Dataset.from_dict(columns).to_dict()  # which fills missing keys with None
    assert columns["include"][0][0]["color"] is None
    assert strict(prompts=["", "", ""], images=images, **columns) == [1, 1, 1]
    found[0].append(Detection("wine glass", None, (40, 0, 50, 10)))
    found[1][0].color = "red"
    found[2].reverse()
    found[2][0].box = (-30, 0, -20, 10)
    assert strict(prompts=["", "", ""], images=images, **columns) == [0, 0, 0]


def test_rows_without_metadata_do_not_apply():
    image = render_scene([{"class": "circle", "count": 1}], seed=0)
    reward = scene_reward()
    assert reward(prompts=["a", "b"], images=[image] * 2, include=[None, [{"class": "circle", "count": 1}]]) == [
        None,
        1,
    ]
    assert reward(prompts=["a"], images=[image], include=[None]) == [None]
    with pytest.raises(ValueError, match="column `include`"):
        reward(prompts=["a"], images=[image])


def test_position_must_refer_to_an_earlier_entry():
    include = [{"class": "circle", "count": 1, "position": ["left of", 0]}]
    with pytest.raises(ValueError, match="index of an earlier entry"):
        score_scene([RED_CIRCLE], include)


def test_names_of_the_rewards():
    assert SceneReward(list).__name__ == "scene"
    assert SceneReward(list, strict=True).__name__ == "scene_strict"
    assert SceneReward(list, strict=True, name="photos").__name__ == "photos"


@pytest.mark.parametrize("detector", [(), (None,), ("facebook/mask2former",)])
def test_a_detector_must_be_passed(detector):
    with pytest.raises(TypeError, match=f"`detector` is {detector[0] if detector else None!r}") as info:
        SceneReward(*detector)
    assert "`TransformersDetector()` for photos" in str(info.value)
    assert "`flow_trl.tiny.detector.detect_shapes` for the tiny world" in str(info.value)


def test_videos_are_refused():
    reward, image = SceneReward(list, name="geneval"), Image.new("RGB", (8, 8))
    assert not reward.takes_videos
    with pytest.raises(ValueError, match="`geneval` takes single images.* a function of your own that picks frames"):
        reward(prompts=["a"], images=[[image, image]], include=[[{"class": "circle", "count": 1}]])


@pytest.mark.parametrize("model", [MASK2FORMER, "/no/such/folder", LANGUAGE_FOLDER, CLIP_FOLDER])
def test_a_model_that_is_no_detector(model):
    with pytest.raises(ValueError, match=f'(?s)`model` is "{model}", from which no instance segmentation') as info:
        TransformersDetector(model)
    assert MASK2FORMER in str(info.value) and "network" in str(info.value)
    assert "`flow_trl.tiny.scene_reward()`" in str(info.value)


# GenEval's detector, on small models


@pytest.fixture(scope="module")
def pipe():
    from transformers import (
        ImageSegmentationPipeline,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=30, num_labels=2,
        id2label={0: "circle", 1: "keyboard"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    return ImageSegmentationPipeline(model=model, image_processor=Mask2FormerImageProcessorPil(size=[64, 64]))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("mask2former")
    pipe.model.save_pretrained(path)
    pipe.image_processor.save_pretrained(path)
    return path


class Sure:
    """Stands where the processor does, with chosen scores, classes and masks for what the model says of an image."""

    def __init__(self, processor, objects):
        self.processor, self.objects = processor, objects

    def __call__(self, **kwargs):
        return self.processor(**kwargs)

    def post_process_instance_segmentation(self, outputs, threshold, target_sizes, return_binary_maps):
        height, width = target_sizes[0]
        masks = torch.zeros(len(self.objects), height, width)
        for mask, (_, _, box) in zip(masks, self.objects, strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        infos = [{"label_id": label, "score": score} for label, score, _ in self.objects]
        return [{"segmentation": masks, "segments_info": infos}] * len(target_sizes)


def test_the_detector_loads_a_segmentation_model_and_a_clip(folder, pipe):
    image = render_scene([{"class": "circle", "count": 1}], seed=0)
    detector = TransformersDetector(folder, CLIP_FOLDER, threshold=0.0, batch_size=2)
    images = [image, image.resize((48, 40)), image.convert("L")]
    found = detector(images)
    assert len(found) == 3 and all(found)
    for picture, objects in zip(images, found, strict=True):
        assert {found.label for found in objects} <= {"circle", "computer keyboard"}  # GenEval's name
        assert max(sum(found.label == label for found in objects) for label in ("circle", "computer keyboard")) <= 16
        assert [found.score for found in objects] == sorted((found.score for found in objects), reverse=True)
        for detection in objects:
            assert detection.mask.size == picture.size and detection.mask.getbbox() == detection.box
            assert detection.color is None
    assert found == TransformersDetector(pipe, CLIP_FOLDER, threshold=0.0)(images)
    include = [[{"class": "circle", "count": 1, "color": "red"}]] * 3
    scores = SceneReward(detector)(images=images, include=include, tag=["counting", "colors", None])
    assert all(0 <= score <= 1 for score in scores)


def test_thresholds_and_the_largest_number_of_a_class(pipe, monkeypatch):
    detector = TransformersDetector(pipe, CLIP_FOLDER)
    boxes = [(i, 0, i + 1, 2) for i in range(20)]
    objects = [(0, 0.5 + i / 100, box) for i, box in enumerate(boxes)]
    objects += [(1, 0.3, (0, 10, 4, 14)), (1, 0.31, (4, 10, 8, 14)), (1, 0.95, (8, 10, 12, 14))]
    monkeypatch.setattr(detector, "processor", Sure(detector.processor, objects))
    (found,) = detector([Image.new("RGB", (32, 32))])
    circles = [detection for detection in found if detection.label == "circle"]
    assert [detection.box for detection in circles] == boxes[:3:-1]  # the 16 most confident
    assert [detection.score for detection in found if detection.label == "computer keyboard"] == [0.95, 0.31]
    include = [[{"class": "computer keyboard", "count": 1}]] * 2
    exclude = [[{"class": "computer keyboard", "count": 2}]] * 2
    strict = SceneReward(detector, strict=True)
    columns = {"images": [Image.new("RGB", (32, 32))] * 2, "include": include, "exclude": exclude}
    assert strict(**columns, tag=["counting", "single_object"]) == [1, 0]


def test_colors_are_told_by_clip_from_what_the_mask_shows(pipe, monkeypatch):
    detector = TransformersDetector(pipe, CLIP_FOLDER)
    rows = [{"class": "circle", "count": 1, "color": color} for color in ("red", "green", "blue", "yellow")]
    images = [render_scene([row], seed=i) for i, row in enumerate(rows)]
    found = [detect_shapes([image])[0][0] for image in images]
    pairs = []
    for image, detection in zip(images, found, strict=True):
        background = np.asarray(image.convert("RGB"), float)[0, 0]
        mask = np.abs(np.asarray(image.convert("RGB"), float) - background).max(axis=2) > 40
        detection.color, detection.mask = None, Image.fromarray(255 * mask.astype(np.uint8))
        detection.box = detection.mask.getbbox()
        pairs.append((image, detection))
    detector.name_colors(pairs)
    assert [detection.color for _, detection in pairs] == [row["color"] for row in rows]
    # The same from the model's submodules: the mean of three phrases for each colour, grey outside of the mask.
    image, detection = pairs[0]
    model, tokenizer = detector.encoder.model, detector.encoder.processor.tokenizer
    pixels = np.where(np.asarray(detection.mask)[..., None] > 0, np.asarray(image.convert("RGB")), 0x99)
    left, top, right, bottom = map(int, detection.box)
    crop = Image.fromarray(pixels[top:bottom, left:right].astype(np.uint8))
    with torch.no_grad():
        inputs = detector.encoder.processor(images=[crop], return_tensors="pt")
        embedding = model.get_image_features(**inputs).pooler_output[0]
        scores = []
        for color in GENEVAL_COLORS:
            phrases = [
                f"a photo of a {color} circle",
                f"a photo of a {color}-colored circle",
                f"a photo of a {color} object",
            ]
            inputs = tokenizer(phrases, padding=True, truncation=True, max_length=14, return_tensors="pt")
            text = model.get_text_features(**inputs).pooler_output
            direction = (text / text.norm(dim=1, keepdim=True)).mean(dim=0)
            scores.append((direction @ embedding / direction.norm()).item())
    assert GENEVAL_COLORS[int(np.argmax(scores))] == detection.color
    asked = []
    monkeypatch.setattr(detector, "name_colors", asked.extend)
    monkeypatch.setattr(
        detector, "processor", Sure(detector.processor, [(0, 0.9, (0, 0, 4, 4)), (1, 0.9, (4, 4, 8, 8))])
    )
    include = [[{"class": "circle", "count": 1}], [{"class": "circle", "count": 1, "color": "red"}]]
    SceneReward(detector)(images=images[:2], include=include)
    assert [(image, detection.label) for image, detection in asked] == [(images[1], "circle")]  # where it is asked for
