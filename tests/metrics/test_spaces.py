"""Metrics as Spaces: what is pushed, to a Hub on this machine, and loaded from there by `evaluate` in a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flow_trl
from flow_trl import metrics
from flow_trl.metrics.__main__ import main
from flow_trl.metrics.spaces import app, push, space_files


LOAD = """
import json
import evaluate

geneval = evaluate.load("user/geneval").compute(predictions=[True, False], references=["colors", "counting"])
found = evaluate.load("user/pass_at_k").compute(predictions=[[1, 0, 0, 0], [1, 1, 0, 0]], k=[2])
json.dump(found | geneval, open("found.json", "w"))
"""


def test_a_metric_is_loaded_from_its_space_in_a_new_process(hub, tmp_path, capsys):
    main(["push", "--namespace", "user"])
    addresses = capsys.readouterr().out.split()
    assert [address.rsplit("/", 2)[-2:] for address in addresses] == [["user", name] for name in metrics.NAMES]
    for name in metrics.NAMES:
        files = hub.files(f"spaces/user/{name}")
        assert {*files} == {".gitattributes", "README.md", "app.py", f"{name}.py", "requirements.txt", "tests.py"}
    # evaluate alone, in another folder
    (tmp_path / "load.py").write_text(LOAD)
    environment = {**os.environ, "PYTHONPATH": str(Path(flow_trl.__file__).parents[1])}
    subprocess.run([sys.executable, "load.py"], check=True, cwd=tmp_path, env=environment, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["pass@2"], found["pass@2_se"]) == pytest.approx((2 / 3, 1 / 6))
    assert (found["colors"], found["counting"], found["overall"], found["overall_se"]) == (1, 0, 0.5, None)
    assert any(method == "GET" and path.endswith("/geneval.py") for method, path in hub.requests)
    # Again, some of them: nothing is in the way
    assert [url.rsplit("/", 1)[-1] for url in push("user", ["geneval"], private=True)] == ["geneval"]


@pytest.mark.parametrize("name", metrics.NAMES)
def test_what_is_pushed_makes_a_space(name):
    files = space_files(name, "flow-trl @ git+https://example.org/flow-trl")
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and int(card["sdk_version"].split(".")[0]) >= 6 and card["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(card["tags"])
    required = files["requirements.txt"].decode().splitlines()
    (package,) = (line for line in required if line.startswith("flow-trl"))
    assert package.endswith(" @ git+https://example.org/flow-trl")
    extra = {
        "ocr_accuracy": "[ocr]",
        "clip_score": "[clip]",
        "pickscore": "[clip]",
        "aesthetic": "[clip]",
        "geneval": "[clip,geneval]",
    }.get(name, "")
    assert package.startswith(f"flow-trl{extra} ") and {"datasets", "evaluate"} < set(required)
    text = files["README.md"].decode()
    for heading in ("Metric Description", "How to Use", "Inputs", "Output Values", "Limitations and Bias", "Citation"):
        assert heading in text


def test_bad_arguments(hub):
    with pytest.raises(ValueError, match="`names` holds 'fid', which is no metric. There are .*'geneval'"):
        push("user", ["geneval", "fid"])
    for namespace in ("", "user/name"):
        with pytest.raises(ValueError, match="`namespace` is"):
            push(namespace)
    assert not hub.repos


def test_every_app_is_made():
    for name in metrics.NAMES:
        assert app(metrics.FOLDER / name).title == name
