import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


FOLDER = Path(__file__).parents[1] / "examples" / "accelerate_configs"
DISTRIBUTED_TYPES = {
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
    "fsdp2": "FSDP",
    "multi_gpu": "MULTI_GPU",
    "multi_node": "MULTI_GPU",
    "single_gpu": "NO",
}


def test_no_config_is_untested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(DISTRIBUTED_TYPES)


@pytest.mark.parametrize("name", DISTRIBUTED_TYPES)
def test_accelerate_parses_the_config(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == DISTRIBUTED_TYPES[name]
    assert config.mixed_precision == "bf16"
    assert config.num_processes == {"single_gpu": 1, "multi_node": 16}.get(name, 8)


def test_the_slurm_script_starts_a_launcher_per_node(tmp_path):
    """Run as two nodes without Slurm: `srun` and `scontrol` are stand-ins, and what the launcher is given is written down."""
    stand_ins = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": "printf '%s|' \"$@\"; echo",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    command = ["bash", str(FOLDER / "multi_node.slurm"), "train.py", "--prompt", "a red circle"]
    environment["SLURM_JOB_NODELIST"] = "nodes"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    config = "launch|--config_file|examples/accelerate_configs/multi_node.yaml|--num_machines|2|--num_processes|16|"
    given = "--main_process_ip|first|--main_process_port|20007|train.py|--prompt|a red circle|"
    assert done.stdout.splitlines() == [f"{config}--machine_rank|{rank}|{given}" for rank in (0, 1)]


def test_sharding():
    for stage in (2, 3):
        assert (
            load_config_from_file(str(FOLDER / f"deepspeed_zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage
        )
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
