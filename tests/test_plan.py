"""What `plan` says, against what was measured and counted otherwise."""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from flow_trl.plan import evaluations_per_image, main, plan
from flow_trl.tiny import FLOW_FOLDER
from tests import pipelines
from tests.trainer.runs import TARGETS, make_config, make_trainer


ACCEPTANCE = Path(__file__).parents[1] / "examples" / "benchmarks" / "gpu_acceptance.py"
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


@pytest.fixture(scope="module")
def acceptance():
    return runpy.run_path(str(ACCEPTANCE))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "unet", "transformer"])
def test_within_15_percent_of_what_was_measured(tmp_path, acceptance, name):
    measured = acceptance["measure"](acceptance["make_trainer"](name, str(tmp_path)))
    planned = acceptance["planned"](name, str(tmp_path))
    for key, said in planned.items():
        assert said == pytest.approx(measured[key], rel=0.15), key
    assert measured["ratio"] < 1e-5
    table = acceptance["tables"]({"plain": measured | {f"plan/{key}": said for key, said in planned.items()}})
    ratios = [float(line.split("|")[4]) for line in table.splitlines() if "TFLOP, " in line or "peak MB" in line]
    assert len(ratios) == 5 and ratios == pytest.approx([1] * 5, abs=0.15)


@pytest.fixture(scope="module")
def small():
    args = make_config("unused", updates_per_generation=2, ema_decay=0.9)
    return plan(pipelines.stable_diffusion_3(t5=False), args, LORA)


def test_counts_are_those_of_a_run(tmp_path, small):
    trainer = make_trainer(
        tmp_path, max_steps=1, updates_per_generation=2, ema_decay=0.9, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert small.method == "tp_grpo" and small.model == "StableDiffusion3Pipeline"
    assert trainer._totals == {"total_nfe": small.evaluations, "total_reward_calls": small.reward_calls}
    assert small.trained_parameters == sum(weight.numel() for weight in trainer._trained.values())
    everything = [
        module.parameters() for module in trainer.policy.pipe.components.values() if hasattr(module, "parameters")
    ]
    assert small.trained_parameters + small.frozen_parameters == sum(p.numel() for own in everything for p in own)
    moments = trainer.optimizer.state.values()
    assert small.moments == sum(state[name].nbytes for state in moments for name in ("exp_avg", "exp_avg_sq"))
    assert small.updates_per_generation == 2
    folder = tmp_path / "checkpoint-1"
    tensors = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")]
    size = sum(path.stat().st_size for path in tensors)
    assert size == pytest.approx(small.checkpoint + small.trajectories, rel=0.5)  # heads of small files count


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({}, 55),
        ({"completion_stride": 2}, 30),
        ({"completion_stride": "jump", "credit": "control_variate"}, 10),
        ({"credit": "outcome"}, 10),
        ({"sde_window_size": 2, "sde_window_range": [0, 2]}, 27),
    ],
)
def test_evaluations_of_an_image(options, evaluations):
    """T (T + 1) / 2 with all completions (see `examples/benchmarks/rollout.py`); with those of two steps 10 + 9 + 8."""
    assert evaluations_per_image(make_config("unused", **{"num_inference_steps": 10, **options})) == evaluations


def test_engines_share_what_they_share(small):
    plans = {
        engine: dataclasses.replace(small, num_gpus=4, engine=engine) for engine in ("ddp", "fsdp2", "zero2", "zero3")
    }
    weights = {engine: found.held["weights of transformer"] for engine, found in plans.items()}
    assert weights["ddp"] == weights["zero2"] > weights["fsdp2"] == weights["zero3"] > weights["ddp"] / 4
    assert plans["ddp"].held == small.held
    for engine in ("fsdp2", "zero2", "zero3"):
        assert plans[engine].held["optimizer"] == small.held["optimizer"] // 4
        assert plans[engine].held["weights of vae"] == small.held["weights of vae"]
    difference = plans["ddp"].peaks["updating"] - small.peaks["updating"]
    assert difference == small.gradients == 4 * small.trained_parameters  # DDP's buckets
    assert plans["ddp"].hours == pytest.approx(small.hours / 4)
    assert small.cpu - plans["ddp"].cpu == pytest.approx(small.trajectories * 3 / 4, abs=1)


def test_bad_input():
    pipe, args = pipelines.stable_diffusion_3(t5=False), make_config("unused")
    with pytest.raises(ValueError, match=r"`engine='zero1'` is not known: choose one of \('ddp'"):
        plan(pipe, args, LORA, engine="zero1")
    with pytest.raises(ValueError, match=r"`gpu='H1'` is not known"):
        plan(pipe, args, LORA, gpu="H1")
    with pytest.raises(ValueError, match=r"`efficiency=1.2` is a share"):
        plan(pipe, args, LORA, efficiency=1.2)
    with pytest.raises(
        ValueError, match=r"`num_gpus=3` does not fit: `generation_batch_size=16` must be a multiple of"
    ):
        plan(pipe, args, LORA, num_gpus=3)


def test_command_line_reads_no_weights(tmp_path, monkeypatch, capsys):
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
        os.symlink(FLOW_FOLDER / name / "config.json", tmp_path / name / "config.json")
    for path in FLOW_FOLDER.iterdir():
        if not (tmp_path / path.name).exists():
            os.symlink(path, tmp_path / path.name)
    assert not list(tmp_path.rglob("*.safetensors"))
    (tmp_path / "run.yaml").write_text(
        json.dumps({"reward_funcs": ["ocr"], "num_inference_steps": 3, "pipeline_kwargs": {"max_sequence_length": 0}})
    )
    options = ["--model_name_or_path", str(tmp_path), f"--config={tmp_path / 'run.yaml'}", "--engine", "fsdp2"]
    options += ["--num_gpus", "8", "--gpu", "A100", "--max_steps", "100", "--guidance_scale", "1"]
    options += ["--generation_batch_size", "1152", "--per_device_train_batch_size", "8", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["plan", *options])
    main()
    output = capsys.readouterr().out
    assert output.startswith(f"| tp_grpo of {tmp_path}, 8 x A100, fsdp2, fp32 | |")
    assert "| a generation | 6,912 evaluations, 3,456 images decoded" in output
    assert "| 100 updates |" in output and "at 40% of the 312 TFLOP/s of a A100" in output
    assert "| 64 x A100 |" in output
