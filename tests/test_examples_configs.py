from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


FOLDER = Path(__file__).parents[1] / "examples" / "accelerate_configs"
DISTRIBUTED_TYPES = {"deepspeed_zero2": "DEEPSPEED", "fsdp2": "FSDP", "multi_gpu": "MULTI_GPU", "single_gpu": "NO"}


def test_no_config_is_untested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(DISTRIBUTED_TYPES)


@pytest.mark.parametrize("name", DISTRIBUTED_TYPES)
def test_accelerate_parses_the_config(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == DISTRIBUTED_TYPES[name]
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if name == "single_gpu" else 8)


def test_sharding():
    assert load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config["zero_stage"] == 2
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
