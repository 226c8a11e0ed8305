import numpy as np
import pytest

from flow_trl.rewards.scene import relations, score_scene
from flow_trl.tiny import load_prompts, scene_reward
from flow_trl.tiny.detector import detect_shapes
from flow_trl.tiny.scenes import COLORS, RELATIONS, SHAPES, render_scene, render_word, to_array


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def content(row):
    """What a scene shows, whatever the order in which the prompt mentions it."""
    include = row["include"]
    things = [(e["class"], e["count"], e["color"]) for e in include]
    relation = include[-1]["position"] and include[-1]["position"][0]
    return frozenset(
        {(row["tag"], tuple(things), relation), (row["tag"], tuple(things[::-1]), OPPOSITE.get(relation))}
    )


@pytest.mark.parametrize("name", ["scenes", "words"])
def test_splits_are_large_distinct_and_the_same_every_time(name):
    train, test = load_prompts(name, "train"), load_prompts(name, "test")
    assert len(test) >= 1000
    assert len(set(train["prompt"]) | set(test["prompt"])) == len(train) + len(test)
    assert load_prompts(name, "test").to_list() == test.to_list()


def test_contents_of_the_test_split_are_not_in_train():
    train, test = load_prompts("scenes", "train"), load_prompts("scenes", "test")
    assert not {content(row) for row in train} & {content(row) for row in test}
    assert set(train["tag"]) == set(test["tag"])
    entries = [entry for include in train["include"] for entry in include]
    assert {e["class"] for e in entries} == set(SHAPES)
    assert {e["color"] for e in entries} == {None, *COLORS}
    assert {e["position"][0] for e in entries if e["position"]} == set(RELATIONS)
    assert {letter for text in load_prompts("words")["text"] for letter in text} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_prompts_and_metadata_say_the_same():
    rows = {row["prompt"]: row for split in ("train", "test") for row in load_prompts("scenes", split)}
    row = rows["a photo of a red circle left of a blue square"]
    assert row["tag"] == "position" and row["exclude"] is None
    assert row["include"] == [
        {"class": "square", "count": 1, "color": "blue", "position": None},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", "0"]},
    ]
    row = rows["a photo of three triangles"]
    assert row["include"] == [{"class": "triangle", "count": 3, "color": None, "position": None}]
    assert row["exclude"] == [{"class": "triangle", "count": 4}]


def test_words_are_two_to_five_capitals():
    for row in load_prompts("words", "test"):
        assert row["prompt"] == f'the word "{row["text"]}"'
        assert 2 <= len(row["text"]) <= 5 and row["text"].isalpha() and row["text"].isupper()


def test_pictures_depend_on_the_seed_alone():
    include = load_prompts("scenes", "test")[0]["include"]
    assert render_scene(include, 1) == render_scene(include, 1) != render_scene(include, 2)
    assert render_word("CAT", 1) == render_word("CAT", 1) != render_word("CAT", 2)
    array = to_array([render_scene(include, 1), render_word("CAT", 1)])
    assert array.shape == (2, 32, 32, 3) and array.dtype == np.uint8
    assert array[:, 0].min() > 220  # both keep to the middle, on a light background


def test_detector_is_right_on_ground_truth():
    rows = load_prompts("scenes", "test").select(range(1000)).to_list()
    found = detect_shapes([render_scene(row["include"], seed) for seed, row in enumerate(rows)])
    scores = [score_scene(f, row["include"], row["exclude"], strict=True) for f, row in zip(found, rows, strict=True)]
    exact = [len(f) == sum(e["count"] for e in row["include"]) for f, row in zip(found, rows, strict=True)]
    assert np.mean(scores) >= 0.98 and np.mean(exact) >= 0.98


def test_scene_rewards_have_the_names_of_those_for_photos_and_this_world_s_detector():
    rewards = [scene_reward(), scene_reward(strict=True)]
    assert [(reward.__name__, reward.strict) for reward in rewards] == [("scene", False), ("scene_strict", True)]
    assert all(reward.detector is detect_shapes for reward in rewards)


def test_detector_tells_where_and_what_colour_an_object_is():
    include = [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
    ]
    nothing, found = detect_shapes([render_scene([], seed=0), render_scene(include, seed=0)])
    objects = {d.label: d for d in found}
    assert nothing == [] and len(found) == 2
    assert objects["square"].color == "blue" and objects["circle"].color == "red"
    assert "above" in relations(objects["circle"].box, objects["square"].box)
    assert detect_shapes([]) == []


def test_unknown_task_and_split_are_named():
    with pytest.raises(ValueError, match="`name` is 'digits'"):
        load_prompts("digits")
    with pytest.raises(ValueError, match="`split` is 'validation'"):
        load_prompts("scenes", "validation")
