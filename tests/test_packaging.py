"""What packages and scripts say of themselves."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import flow_trl


ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/benchmarks/*.py")]
    if path.read_text().startswith("# /// script")
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_of_a_clone_takes_the_package_from_it(script):
    header = script.read_text().split("# /// script\n")[1].split("\n# ///")[0]
    inline = tomllib.loads("\n".join(line[2:] for line in header.splitlines()))
    assert any(requirement.startswith("flow-trl") for requirement in inline["dependencies"])
    source = inline["tool"]["uv"]["sources"]["flow-trl"]
    assert (script.parent / source["path"]).resolve() == ROOT and source["editable"]


def test_the_package_is_typed_and_has_addresses():
    assert (Path(flow_trl.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"] and "Typing :: Typed" in project["classifiers"]


def test_the_changelog_knows_this_version():
    assert re.search(rf"^## {re.escape(flow_trl.__version__)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_tests_install_the_trackers():
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert "trackers" in tests[0]
    for name in ("tensorboard", "trackio", "wandb", "mlflow-skinny"):
        assert importlib.metadata.version(name)
