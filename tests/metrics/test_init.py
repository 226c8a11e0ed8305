"""All metrics: they load by name, give what their test cases say, and leave valid JSON."""

import json
import math
import runpy
import subprocess
import sys

import evaluate
import pytest

from flow_trl import metrics


def cases(name):
    return runpy.run_path(str(metrics.FOLDER / name / "tests.py"))["test_cases"]


def close_to(found, expected):
    """Whether what is expected is there; other keys may be there too."""
    if isinstance(expected, dict):
        return all(key in found and close_to(found[key], value) for key, value in expected.items())
    is_number = isinstance(expected, float) or isinstance(expected, list) and isinstance(expected[0], float)
    return found == (pytest.approx(expected, rel=1e-3) if is_number else expected)


@pytest.fixture(scope="module", params=metrics.NAMES)
def name(request):
    return request.param


def test_test_cases_are_reproduced_and_saved_as_strict_json(name, tmp_path):
    if name == "ocr_accuracy":
        pytest.importorskip("rapidocr_onnxruntime")
    metric = metrics.load(name, keep_in_memory=True)
    for case in cases(name):
        results = metric.compute(**{key: value for key, value in case.items() if key != "result"})
        assert close_to(results, case["result"]), results

        def refused(constant):
            raise AssertionError(f"{constant} is no JSON")

        path = evaluate.save(tmp_path / "results.json", **results)
        assert json.loads(path.read_text(), parse_constant=refused).keys() >= results.keys()


def test_a_module_says_what_it_is(name):
    info = metrics.load(name).info
    assert info.description and info.citation.startswith("@") and info.codebase_urls and info.reference_urls
    for heading in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert heading in info.inputs_description


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="`name` is 'fid', which is no metric of flow_trl. There are .*'calibration'"):
        metrics.load("fid")


def test_importing_the_package_imports_no_evaluate():
    code = "import sys, flow_trl.metrics; assert not {'evaluate', 'torch', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mean_and_its_standard_error():
    assert metrics.summarize("x", [0, 1, 1, 1]) == {"x": 0.75, "x_se": 0.25}
    assert metrics.summarize("x", [2]) == {"x": 2, "x_se": None}
    with pytest.raises(ValueError, match="empty"):
        metrics.summarize("x", [])
    # Four equal images of each prompt are worth one, and groups of one are none.
    values, groups = [0.0, 1.0, 1.0, 3.0], ["a", "b", "c", "d"]
    single = metrics.summarize("x", values)
    assert metrics.summarize("x", values, groups) == pytest.approx(single)
    assert metrics.summarize("x", values * 4, groups * 4) == pytest.approx(single)
    assert metrics.summarize("x", values * 4)["x_se"] < single["x_se"] / 2
    assert metrics.summarize("x", values, ["a"] * 4)["x_se"] is None
    with pytest.raises(ValueError, match="`groups` has 1 entries, but there are 4"):
        metrics.summarize("x", values, ["a"])
    assert math.isfinite(single["x_se"])
