"""What all metrics have in common: loading, cards, test cases, Spaces and valid JSON."""

import json
import math
import os
import runpy
import subprocess
import sys
from itertools import combinations

import evaluate
import numpy as np
import pytest
from huggingface_hub import DatasetCard

from flow_trl import metrics
from flow_trl.metrics import FOLDER, NAMES
from flow_trl.metrics.__main__ import main
from flow_trl.metrics.spaces import space_files
from flow_trl.rewards.scene import Detection
from flow_trl.tiny import load_prompts
from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.scenes import render_scene


@pytest.fixture(scope="module")
def load():
    loaded = {}
    return lambda name: loaded.setdefault(name, metrics.load(name, keep_in_memory=True))


def as_dict(detection):
    return {name: getattr(detection, name) for name in ("label", "color", "box", "score")}


def test_names_are_the_folders():
    assert NAMES == [
        "aesthetic", "calibration", "clip_score", "confidence_voting", "cross_reward_generalization", "geneval",
        "ocr_accuracy", "pass_at_k", "pickscore",
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match="`name` is 'genneval', which is no metric of flow_trl. There are 'aesthetic'"
    ):
        metrics.load("genneval")


@pytest.mark.parametrize("name", NAMES)
def test_test_cases_come_out_and_are_valid_json(name, load, tmp_path):
    for case in runpy.run_path(str(FOLDER / name / "tests.py"))["test_cases"]:
        case = dict(case)
        expected = case.pop("result")
        results = load(name).compute(**case)
        assert {key: results[key] for key in expected} == pytest.approx(expected)
        path = evaluate.save(tmp_path / "results.json", **results)
        json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_has_a_card_a_citation_and_what_a_space_needs(name, load):
    info = load(name).info
    assert info.citation.startswith("@") and info.description and info.inputs_description
    assert info.reference_urls and info.codebase_urls
    files = {path.name for path in (FOLDER / name).iterdir() if path.is_file()}
    assert files == {"README.md", "app.py", "requirements.txt", "tests.py", f"{name}.py"}
    card = DatasetCard.load(FOLDER / name / "README.md", ignore_metadata_errors=False)
    assert card.data.to_dict()["sdk"] == "gradio" and {"evaluate", "metric"} <= set(card.data.tags)
    for heading in ("Metric Description", "How to Use", "Output Values", "Limitations and Bias", "Citation"):
        assert f"## {heading}" in card.text


def test_loads_by_its_path_where_the_package_is_installed_but_not_cloned(tmp_path):
    code = (
        "import evaluate, sys; from flow_trl import metrics; assert 'evaluate' in sys.modules; "
        "path = metrics.FOLDER / 'pass_at_k'; print(evaluate.load(str(path)).compute(predictions=[[1, 0]])['pass@1'])"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "0.5", run.stderr


# Spaces


def test_a_space_installs_the_requirement_that_is_asked_for():
    assert space_files("ocr_accuracy")["requirements.txt"] == b"datasets\nevaluate\nflow-trl[ocr]\n"
    files = space_files("ocr_accuracy", "flow-trl @ git+https://example.org/flow_trl")
    assert b"flow-trl[ocr] @ git+https://example.org/flow_trl\n" in files["requirements.txt"]
    with pytest.raises(ValueError, match="'genneval', which is no metric"):
        space_files("genneval")


def test_pushed_spaces_are_loaded_from_the_hub_by_a_new_process(hub, capsys, tmp_path):
    main(["push", "--namespace", "me", "--names", "pass_at_k", "ocr_accuracy", "--private"])
    assert capsys.readouterr().out.split() == [
        f"{hub.endpoint}/spaces/me/{name}" for name in ("pass_at_k", "ocr_accuracy")
    ]
    pushed = hub.repos["spaces/me/pass_at_k"].files
    assert {name: pushed[name] for name in space_files("pass_at_k")} == space_files("pass_at_k")
    code = "import evaluate; print(evaluate.load('me/pass_at_k').compute(predictions=[[1, 0]])['pass@1'])"
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "0.5", run.stderr
    with pytest.raises(ValueError, match="`namespace` is 'user/name'"):
        main(["push", "--namespace", "user/name"])


# Values


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1], [0, 0, 1, 0, 0, 0, 1]])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(load, row):
    sizes = list(range(1, len(row) + 1))
    results = load("pass_at_k").compute(predictions=[row], k=sizes)
    for k in sizes:
        assert results[f"pass@{k}"] == pytest.approx(np.mean([any(choice) for choice in combinations(row, k)]))
        assert results[f"pass@{k}_se"] is None


def test_pass_at_k_over_prompts(load):
    results = load("pass_at_k").compute(predictions=[[1, 0], [0, 0], [1, 1]])
    assert results == pytest.approx({"pass@1": 0.5, "pass@1_se": np.std([0.5, 0, 1], ddof=1) / math.sqrt(3)})
    with pytest.raises(ValueError, match=r"`k` holds 3, but `predictions\[1\]` has 2 completions"):
        load("pass_at_k").compute(predictions=[[1, 0, 1], [0, 0]], k=[3])


def test_readings_of_images_and_of_texts_agree(load):
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (200, 64), "white")
    ImageDraw.Draw(image).text((20, 10), "OPEN 24", fill="black", font=ImageFont.load_default(36))
    of_images = load("ocr_accuracy").compute(predictions=[image] * 2, references=["open24", "pen"])
    assert of_images == load("ocr_accuracy").compute(predictions=["OPEN 24"] * 2, references=["open24", "pen"])
    assert of_images["flow_grpo"] == 1 and of_images["edit_distance"] == 0.5 and of_images["exact"] == 0.5


def test_geneval_from_images_and_from_what_was_found_in_them(load):
    rows = load_prompts("scenes", "test").select(range(12)).to_list()
    tags = ["even", "odd", "odd"] * 4
    images = [render_scene(row["include"], seed=i) for i, row in enumerate(rows)]
    images[1], images[5] = images[5], images[1]  # two wrong ones, of both kinds
    include = [row["include"] for row in rows]
    results = load("geneval").compute(predictions=images, include=include, tags=tags, detector=detect_shapes)
    found = [[as_dict(detection) for detection in objects] for objects in detect_shapes(images)]
    assert results == load("geneval").compute(predictions=found, include=include, tags=tags)
    assert results["even"] == 1 and results["odd"] == 6 / 8
    assert results["overall"] == (1 + 6 / 8) / 2
    assert results["odd_se"] == pytest.approx(np.std([0, 0, *[1] * 6], ddof=1) / math.sqrt(8))
    assert results["overall_se"] == pytest.approx(results["odd_se"] / 2)
    with pytest.raises(ValueError, match="`tags` has 1 entries, but there are 12 images"):
        load("geneval").compute(predictions=images, include=include, tags=["odd"], detector=detect_shapes)


def test_only_sure_detections_are_counted(load):
    dog = as_dict(Detection("dog", None, (0.0, 0.0, 10.0, 10.0), 0.8))
    sure = {**dog, "score": 0.95}
    include, exclude = [[{"class": "dog", "count": 1}]], [[{"class": "dog", "count": 2}]]
    for tag, expected in (("counting", 1.0), ("single_object", 0.0)):  # the unsure dog is one too many
        results = load("geneval").compute(predictions=[[sure, dog]], include=include, exclude=exclude, tags=[tag])
        assert results[tag] == expected
