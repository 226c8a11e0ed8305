import json
from collections import Counter
from pathlib import Path

import pytest

from flow_trl.prompts import KINDS, load_prompts
from flow_trl.prompts import describe as describe_scene
from flow_trl.rewards.scene import GENEVAL_COLORS


REAL = Path(__file__).parents[2] / "shared" / "data" / "geneval_test.jsonl"


def content(row):
    return row["tag"], str(sorted((entry["class"], entry["count"], str(entry["color"])) for entry in row["include"]))


def test_scenes():
    train, test = load_prompts("geneval")
    assert len(train) == 5000 and len(test) == 600 and train.features == test.features
    assert not {content(row) for row in train} & {content(row) for row in test}
    shares = Counter(train["tag"])
    assert all(abs(shares[kind] / 5000 - weight / 17) < 0.03 for kind, weight in KINDS.items())
    assert Counter(test["tag"]).keys() == KINDS.keys()
    colors = {entry["color"] for row in train for entry in row["include"]} - {None}
    assert colors == set(GENEVAL_COLORS)  # what the detector can tell
    row = next(row for row in train if row["tag"] == "counting")
    assert row["exclude"] == [{"class": row["include"][0]["class"], "count": row["include"][0]["count"] + 1}]


@pytest.mark.skipif(not REAL.is_file(), reason="the prompts of Flow-GRPO are not here")
def test_scenes_are_described_as_in_flow_grpo():
    for line in REAL.read_text().splitlines():
        row = json.loads(line)
        assert describe_scene(row["tag"], row["include"]) == row["prompt"]


def test_texts_and_animals():
    train, test = load_prompts("ocr", eval_size=100)
    assert load_prompts("ocr", eval_size=2)[0][:5] == train[:5]
    assert len(train) == 5000 and len(test) == 100
    assert all(f'"{row["text"]}"' in row["prompt"] for row in test)
    words = [{" ".join(sorted(text.split())) for text in part["text"]} for part in (train, test)]
    assert not words[0] & words[1]
    train, test = load_prompts("animals", eval_size=8)
    assert len(train) == 45 and len(test) == 8 and set(test["prompt"]) < set(train["prompt"])


def test_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a cat with {number} hats" for number in range(30)))
    train, test = load_prompts(str(path))
    assert (len(train), len(test)) == (27, 3) and not set(train["prompt"]) & set(test["prompt"])
    path.write_text("one prompt")
    with pytest.raises(ValueError, match="at least two"):
        load_prompts(str(path))
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(Exception) as error:
        load_prompts("genevil")
    assert "geneval, ocr, animals" in error.value.__notes__[0]
