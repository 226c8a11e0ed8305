import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from flow_trl.tiny import load_flow_pipeline
from tests import two_processes
from tests.trainer.runs import make_trainer, relative, run


ENGINES = ["fsdp2", *(pytest.param(f"deepspeed_zero{stage}", marks=pytest.mark.deepspeed) for stage in (2, 3))]
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
# In the first generation of two updates, all groups of the first process are skipped
LORA = {"max_steps": 4, "easy": [0, 1, 4], **SAVING}
BEST = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
BEST |= {"metric_for_best_model": "eval_reward"}
FULL = {"full": True, "max_steps": 3, "learning_rate": 1e-3, **SAVING | {"save_steps": 3}}
CRITIC = {"method": "tdpo_r", "max_steps": 3, "critic_learning_rate": 1e-2, **SAVING}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What one process makes of the runs."""
    folder = tmp_path_factory.mktemp("ddp")
    specs = {"lora": LORA | BEST, "full": FULL, "critic": CRITIC}
    return folder, {name: run(spec | {"output_dir": str(folder / name)}) for name, spec in specs.items()}


@pytest.fixture(scope="module", params=ENGINES)
def sharded(request, ddp, tmp_path_factory):
    """The same runs in two processes that share weights out, and what goes on from their checkpoints; what each returned."""
    folder, (one_process, _) = tmp_path_factory.mktemp(request.param), ddp
    specs = {
        "lora": LORA | BEST,
        "within": LORA | {"resume": str(folder / "lora" / "checkpoint-3")},
        "from_one_process": LORA | {"resume": str(one_process / "lora" / "checkpoint-2")},
        "full": FULL,
        "critic": CRITIC,
        "critic_within": CRITIC | {"resume": str(folder / "critic" / "checkpoint-1")},
    }
    specs = {name: {"engine": request.param, "output_dir": str(folder / name), **spec} for name, spec in specs.items()}
    results = two_processes.launch("engine_runs.py", list(specs.values()), folder)
    return folder, dict(zip(specs, results, strict=True))


def test_timing(sharded, ddp):
    folder, results = sharded
    one, expected = ddp
    for name, (a, b) in results.items():
        e = expected[name.split("_")[0] if name not in ("within", "from_one_process") else "lora"]
        print(name, relative(a["weights"], e["weights"]), relative(a["change"], e["change"]), relative(a["averages"], e["averages"]),
              a.get("critic") is not None and relative(a["critic"], e["critic"]), a["held"], torch.equal(a["weights"], b["weights"]))
        print(a["history"][-1]); print(e["history"][-1])
        print(sorted((f.name, f.stat().st_size) for f in folder.rglob(f"{name}/checkpoint-3/*")))
        print(sorted((f.name, f.stat().st_size) for f in one.rglob(f"{name}/checkpoint-3/*")))
    assert 0
