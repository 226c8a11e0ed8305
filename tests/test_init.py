import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import flow_trl


PACKAGE = Path(flow_trl.__file__).parent


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_no_heavy_library():
    modules = run("import sys, flow_trl; print(*sys.modules)").split()
    assert "flow_trl" in modules
    assert not {"torch", "transformers", "diffusers", "trl", "numpy"} & set(modules)


def test_import_is_fast():
    code = "import time; t = time.perf_counter(); import flow_trl; print(time.perf_counter() - t)"
    assert float(run(code)) < 0.5


@pytest.mark.parametrize("name", flow_trl.__all__)
def test_public_name_resolves(name):
    value = getattr(flow_trl, name)
    assert value.__name__ == name
    assert vars(flow_trl)[name] is value  # the second access does not come through `__getattr__`


def test_dir_lists_the_public_names():
    assert {*flow_trl.__all__, "__version__"} <= set(dir(flow_trl))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match=r"^module 'flow_trl' has no attribute 'Trainer'$"):
        _ = flow_trl.Trainer


def import_graph():
    """Each module of the package with those that it imports, at its top or within a function; not for types alone."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    graph = {name: set() for name in names.values()}
    for path, name in names.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body.clear()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package)
                modules = {f"{source}.{alias.name}" for alias in node.names}
                graph[name] |= {module if module in graph else source for module in modules}
    return {name: imported & graph.keys() for name, imported in graph.items()}


def test_nothing_but_the_tiny_world_and_the_cases_of_metrics_imports_it():
    graph = import_graph()
    assert {"flow_trl.tiny", "flow_trl.tiny.scenes", "flow_trl.rewards.scene"} <= graph.keys()
    assert "flow_trl.rewards.scene" in graph["flow_trl.tiny.detector"]
    found = [
        f"{name} imports {module}"
        for name, imported in graph.items()
        for module in imported
        if module.startswith("flow_trl.tiny")
        and not name.startswith("flow_trl.tiny")
        and not re.fullmatch(r"flow_trl\.metrics\.\w+\.tests", name)
    ]
    assert not found


def test_imports_have_no_circle():
    TopologicalSorter(import_graph()).prepare()  # raises with the circle
