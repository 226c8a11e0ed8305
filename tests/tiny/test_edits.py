import numpy as np
import pytest

from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.edits import EditReward, load_edits, overlap
from flow_trl.tiny.scenes import render_scene


@pytest.fixture(scope="module")
def edits():
    return {split: load_edits(split) for split in ("train", "test")}


def score(row, image, strict):
    return EditReward(strict)(images=[image], include=[row["include"]], places=[row["places"]])[0]


def test_what_is_held_out_is_in_no_train_row(edits):
    seen = [{frozenset((e["class"], e["color"]) for e in row["include"]) for row in data} for data in edits.values()]
    assert len(edits["train"]) > 900 and len(edits["test"]) > 600 and not seen[0] & seen[1]


def test_each_picture_differs_from_what_is_asked_for_in_one_colour(edits):
    for row in edits["test"].select(range(100)):
        shown = {d.label: d for d in detect_shapes([row["image"]])[0]}
        wrong = [e for e in row["include"] if shown[e["class"]].color != e["color"]]
        assert len(shown) == 2 and len(wrong) == 1
        assert [list(shown[e["class"]].box) for e in row["include"]] == row["places"]
        assert score(row, row["image"], strict=True) == 0 and score(row, row["image"], strict=False) == 0.75


def test_the_right_edit_and_wrong_ones(edits):
    row = edits["test"][0]
    for seed in range(200):  # a picture of what is asked for, and where its shapes are
        image = render_scene(row["include"], seed)
        shown = {d.label: d for d in detect_shapes([image])[0]}
        at_home = row | {"places": [shown[e["class"]].box for e in row["include"]]}
        assert score(at_home, image, strict=True) == score(at_home, image, strict=False) == 1
        overlaps = [overlap(box, place) for box, place in zip(at_home["places"], row["places"], strict=True)]
        assert score(row, image, strict=False) == pytest.approx(np.mean(overlaps))
        assert score(row, image, strict=True) == float(min(overlaps) >= 0.5)


def test_the_same_every_time(edits):
    assert load_edits("test")[:5]["prompt"] == edits["test"][:5]["prompt"]


@pytest.mark.parametrize(
    ("other", "expected"), [((0, 0, 2, 2), 1), ((2, 0, 4, 2), 0), ((3, 3, 4, 4), 0), ((0, 1, 2, 3), 1 / 3)]
)
def test_overlap(other, expected):
    assert overlap((0, 0, 2, 2), other) == pytest.approx(expected)
