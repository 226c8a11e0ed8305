"""Runs of `runs.py` on FSDP2 or DeepSpeed: accelerate, which has them on GPUs only, takes CPUs for GPUs here."""

import os

import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType

from tests import two_processes
from tests.trainer import runs


CONFIGS = two_processes.ROOT / "examples" / "accelerate_configs"


def use(engine):
    """Sets what `accelerate launch --config_file` sets."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE", "ACCELERATE_DEEPSPEED"))]:
        del os.environ[name]
    config = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text())
    if engine == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(config["deepspeed_config"]["zero_stage"])


def run(spec):
    spec = dict(spec)
    use(spec.pop("engine"))
    os.environ |= spec.pop("environment", {})
    refused = spec.pop("refused", False)
    try:
        return runs.run({**spec, "use_cpu": False})
    except ValueError as error:
        if not refused:
            raise
        return str(error)


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    two_processes.main(run)
