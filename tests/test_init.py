import subprocess
import sys

import pytest

import flow_trl


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
