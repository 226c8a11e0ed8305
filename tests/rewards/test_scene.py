import json
import sys
from collections import Counter
from copy import copy, deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from flow_trl.rewards.clip import ClipEncoder
from flow_trl.rewards.scene import (
    GENEVAL_COLORS,
    MASK2FORMER,
    Detection,
    SceneReward,
    TransformersDetector,
    _Found,
    relations,
    score_scene,
)
from flow_trl.tiny import CLIP_FOLDER, LANGUAGE_FOLDER, load_clip, load_prompts, scene_reward
from flow_trl.tiny.build_clip import make_clip
from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.scenes import COLORS, render_scene
from flow_trl.utils import MissingExtraError


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


def test_position_must_be_a_relation():
    include = [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": ["leftof", 0]}]
    with pytest.raises(ValueError, match="`position` of entry 1 .*'leftof'.* must be one of 'left of', 'right of'"):
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


# The detector for photos, on random models

CLASSES = {0: "keyboard", 1: "apple", 2: "stop sign"}
NAMES = ["computer keyboard", "apple", "stop sign"]


def noise(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Mask2Former that is sure of what it sees, and a CLIP of words that tells colours, as `save_pretrained` writes."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=40, id2label=CLASSES,
    )  # fmt: skip
    model, (clip, processor) = Mask2FormerForUniversalSegmentation(config), make_clip()
    torch.nn.init.normal_(model.class_predictor.weight, std=2.0)
    for weight in clip.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    words = ["a", "photo", "of", "-", "colored", "object", *GENEVAL_COLORS, *" ".join(NAMES).split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}, "<pad>"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    clip.config.text_config.eos_token_id = 2
    clip.text_model.eos_token_id = 2
    path = tmp_path_factory.mktemp("models")
    for part in (model, Mask2FormerImageProcessorPil(size={"height": 384, "width": 384})):
        part.save_pretrained(path / "mask2former")
    for part in (clip, processor):
        part.save_pretrained(path / "clip")
    return path


@pytest.fixture(scope="module")
def detector(folders):
    return TransformersDetector(folders / "mask2former", folders / "clip", shortest_edge=64)


def test_objects_are_those_of_geneval_s_rule(detector, folders):
    images = [noise(96, 64, 0), noise(64, 64, 1), noise(80, 100, 2).convert("L")]
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders / "mask2former").eval()
    found = detector(images)
    sizes = [(64, 96), (64, 64), (80, 64)]  # the shorter edge is 64; the last is padded to a multiple of 32
    for image, (height, width), objects in zip(images, sizes, found, strict=True):
        rgb = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        pixels = np.zeros((height + height % 32, width, 3), np.float32)
        pixels[:height] = (rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            outputs = model(torch.tensor(pixels).permute(2, 0, 1)[None])
        logits = torch.nn.functional.interpolate(outputs.masks_queries_logits, pixels.shape[:2], mode="bilinear")
        logits = logits[..., :height, :]
        masks = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear")[0].double().numpy()
        odds = np.exp(outputs.class_queries_logits[0].double().numpy())
        odds /= odds.sum(1, keepdims=True)
        pairs = sorted(((odds[q, c], q, c) for q in range(40) for c in range(3)), reverse=True)[:100]
        expected = []
        for probability, query, label in pairs:
            inside = masks[query] > 0
            if not inside.any():
                continue
            score = probability * (1 / (1 + np.exp(-masks[query][inside]))).mean()
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            if score > 0.3:
                expected.append((NAMES[label], score, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
        expected.sort(key=lambda one: -one[1])
        expected = [one for i, one in enumerate(expected) if [x[0] for x in expected[:i]].count(one[0]) < 16]
        assert 3 <= len(expected) == len(objects)
        for (label, score, box), one in zip(expected, objects, strict=True):
            assert (one.label, one.score) == (label, pytest.approx(score, abs=1e-4))
            assert np.abs(np.subtract(one.box, box)).max() <= 1  # a pixel may be on the edge


def test_at_most_sixteen_of_a_class(detector):
    counts = [Counter(one.label for one in objects) for objects in detector([noise(64, 64, i) for i in range(4)])]
    assert max(max(count.values()) for count in counts) == 16


def test_colours_are_clip_s_of_the_object_on_grey(detector, folders):
    clip, processor = (part.from_pretrained(folders / "clip") for part in (CLIPModel, CLIPProcessor))
    seen = set()
    for seed in range(8):
        image = noise(80, 60, seed)
        mask = np.zeros((60, 80), bool)
        mask[10:40, 20:50] = np.random.default_rng(seed).random((30, 30)) > 0.3
        mask[10, 20] = mask[39, 49] = True
        label = NAMES[seed % 3]
        pixels = np.where(mask[..., None], np.asarray(image), 0x99)[10:40, 20:50]
        values = processor(images=Image.fromarray(pixels.astype(np.uint8)), return_tensors="pt")
        with torch.no_grad():
            features = clip.get_image_features(**values).pooler_output[0]
            likeness = []
            for color in GENEVAL_COLORS:
                total = 0
                for text in (f"a {color} {label}", f"a {color}-colored {label}", f"a {color} object"):
                    tokens = processor.tokenizer(f"a photo of {text}", return_tensors="pt")
                    one = clip.get_text_features(**tokens).pooler_output[0]
                    total = total + one / one.norm()
                likeness.append(float(total @ features / total.norm()))
        found = _Found(label, 0.5, Image.fromarray(mask), image, detector)
        assert found.box == (20, 10, 50, 40)
        assert found.color == GENEVAL_COLORS[np.argmax(likeness)]
        seen.add(found.color)
    assert len(seen) > 2


def test_colours_of_the_tiny_world_by_its_clip(detector):
    detector = copy(detector)
    detector.clip, detector._phrases = ClipEncoder(*load_clip()), {}
    right = []
    for seed, color in enumerate(COLORS):
        image = render_scene([{"class": "circle", "count": 1, "color": color}], seed=seed)
        (shape,) = detect_shapes([image])[0]
        mask = Image.new("1", image.size)
        mask.paste(1, tuple(map(int, shape.box)))
        right.append(_Found("circle", 0.9, mask, image, detector).color == color)
    assert np.mean(right) >= 5 / 6


def test_colours_are_asked_for_when_they_are_needed(detector):
    texts = []
    hook = detector.clip.model.text_model.register_forward_hook(lambda module, args, output: texts.append(1))
    detector = copy(detector)
    detector._phrases = {}
    reward, images = SceneReward(detector, strict=True), [noise(64, 64, i) for i in range(3)]
    label = detector(images[:1])[0][0].label
    include = [{"class": label, "count": 1}]
    assert reward(prompts=[""] * 3, images=images, include=[include] * 3)[0] == 1
    assert not texts
    colored = [[{**include[0], "color": color}] for color in GENEVAL_COLORS]
    scores = reward(prompts=[""] * 10, images=images[:1] * 10, include=colored)
    assert sum(scores) == 1 and len(texts) == 1  # one class, whose phrases are embedded together and once
    hook.remove()


def test_objects_must_be_surer_where_they_are_counted():
    found = [Detection("apple", None, (i, 0, i + 1, 1), score) for i, score in enumerate((0.95, 0.91, 0.9, 0.5))]

    class Detector:
        counting_threshold = 0.9

        def __call__(self, images):
            return [found] * len(images)

    include, exclude = [{"class": "apple", "count": 2}], [{"class": "apple", "count": 3}]
    columns = {"images": [noise(8, 8, 0)] * 3, "include": [include] * 3, "exclude": [exclude] * 3}
    reward = SceneReward(Detector(), strict=True)
    assert reward(**columns, tag=["counting", "two_object", None]) == [1, 0, 0]
    assert reward(**columns) == [0, 0, 0]
    assert SceneReward(lambda images: [found] * 3, strict=True)(**columns, tag=["counting"] * 3) == [0, 0, 0]


@pytest.mark.parametrize("model", [MASK2FORMER, "/no/such/folder", LANGUAGE_FOLDER, CLIP_FOLDER])
def test_a_model_that_is_no_detector(model):
    with pytest.raises(ValueError, match=f'(?s)`model` is "{model}", from which no Mask2Former') as info:
        TransformersDetector(model)
    assert MASK2FORMER in str(info.value) and "network" in str(info.value)
    assert "`flow_trl.tiny.scene_reward()`" in str(info.value)


def test_a_loaded_model_goes_to_the_device_of_this_process(folders, monkeypatch):
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    clip = ClipEncoder(folders / "clip", device="cpu")
    assert TransformersDetector(folders / "mask2former", clip).model.device.type == "meta"
    assert TransformersDetector(folders / "mask2former", clip, device="cpu").model.device.type == "cpu"


def test_images_are_looked_at_in_geneval_s_size(folders):
    processor = TransformersDetector(folders / "mask2former", folders / "clip").processor
    for size, expected in [((512, 512), (800, 800)), ((256, 512), (1333, 666))]:
        assert processor(images=[noise(*size, 0)], return_tensors="pt").pixel_values.shape[-2:] == expected


def test_missing_extra(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"Mask2Former needs `scipy`.*flow-trl\[geneval\]"):
        TransformersDetector(folders / "mask2former", folders / "clip")
