"""Runs a list of specs, one after another, in two processes."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch.multiprocessing import start_processes


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
    return _results(folder)


def fork(run, specs, folder):
    """As `launch`, but by a server that has imported everything once, with the variables that `torchrun` sets."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.trainer.runs", "tests.trainer.text_runs"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_rank, (run, specs, folder, port), nprocs=2, start_method="forkserver")
    return _results(folder)


def _rank(rank, run, specs, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _run(run, specs, folder, rank)


def main(run):
    """What the launched script does: each spec of the file by `run`, and then a file of what it returned."""
    path = Path(sys.argv[1])
    _run(run, json.loads(path.read_text()), path.parent, int(os.environ["RANK"]))


def _run(run, specs, folder, rank):
    torch.set_num_threads(1)
    results = [run(spec) for spec in specs]
    torch.save(results, folder / f"results-{rank}.pt")
    # While the interpreter shuts down, gloo's threads abort a finished process now and then (in plain PyTorch too).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _results(folder):
    ranks = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))
