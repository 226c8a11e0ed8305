"""Runs a list of specs, one after another, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState


ROOT = Path(__file__).parents[1]


def launch(script, specs, folder):
    """For each spec what both processes returned of it. `script` calls `main`, `folder` is empty."""
    (folder / "spec.json").write_text(json.dumps(specs))
    # With `--cpu`, accelerate would start one process only; `use_cpu=True` of the trainer is what counts.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "tests" / "trainer" / script), str(folder / "spec.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-60000:]
    ranks = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


def main(run):
    """What the launched script does: each spec of the file by `run`, and then a file of what it returned."""
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    results = [run(spec) for spec in json.loads(path.read_text())]
    torch.save(results, path.with_name(f"results-{PartialState().process_index}.pt"))
    # While the interpreter shuts down, gloo's threads abort a finished process now and then (in plain PyTorch too).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
