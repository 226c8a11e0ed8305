# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
What a generation and an update cost beside the denoiser itself: the same calls of the same module in the same batches,
forward alone and forward and backward, in one run.

    OMP_NUM_THREADS=1 python examples/benchmarks/step_time.py

Decoding and rewards are left out, and so is the optimizer. With `--base FOLDER`, a checkout of another version, both are
measured in turns, in processes of their own.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser


METHODS = ("Flow-GRPO", "TP-GRPO")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass
class Arguments:
    """
    Args:
        batch_sizes (`list[int]`, *optional*, defaults to `[4, 8, 32]`):
            Images per call of the denoiser.
        num_images (`int`, *optional*, defaults to `32`):
            Images in a generation.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps; all but the last are trained.
        repeats (`int`, *optional*, defaults to `5`):
            Generations and updates in a turn.
        turns (`int`, *optional*, defaults to `3`):
            Turns, of which the medians are shown.
        base (`str`, *optional*):
            Checkout of another version of flow_trl.
        measure (`bool`, *optional*, defaults to `False`):
            Measures one turn and prints it as JSON; what the script calls itself with.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 32], metadata={"help": "Images per call."})
    num_images: int = field(default=32, metadata={"help": "Images in a generation."})
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps."})
    repeats: int = field(default=5, metadata={"help": "Generations and updates in a turn."})
    turns: int = field(default=3, metadata={"help": "Turns, of which the medians are shown."})
    base: str | None = field(default=None, metadata={"help": "Checkout of another version of flow_trl."})
    measure: bool = field(default=False, metadata={"help": "Measures one turn and prints it as JSON."})


class Clock:
    """Seconds inside a function."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, function):
        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return timed


def measure(arguments: Arguments, method: str, batch_size: int) -> dict[str, float]:
    """Seconds of a generation and an update, and of the bare denoiser in the same batches: medians over the repeats."""
    import torch
    from peft import LoraConfig

    from flow_trl import FlowGRPOConfig, FlowGRPOTrainer, TPGRPOConfig, TPGRPOTrainer, tiny

    config, trainer_class = {
        "Flow-GRPO": (FlowGRPOConfig, FlowGRPOTrainer),
        "TP-GRPO": (TPGRPOConfig, TPGRPOTrainer),
    }[method]
    outside = Clock()

    def reward(prompts, images, **columns):
        return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]

    reward.__name__ = "reward"
    timed_reward = outside(reward)
    timed_reward.__name__ = "reward"
    options = {"overlap_rewards": False} if hasattr(config, "overlap_rewards") else {}
    trainer = trainer_class(
        tiny.load_flow_pipeline(),
        timed_reward,
        config(
            "outputs/step_time", num_inference_steps=arguments.num_inference_steps, guidance_scale=1.0, num_generations=4,
            pipeline_kwargs={"max_sequence_length": 0}, generation_batch_size=arguments.num_images, updates_per_generation=1,
            per_device_train_batch_size=batch_size, per_device_rollout_batch_size=batch_size, beta=0.0, ema_decay=0.0,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1, **options,
        ),
        train_dataset=tiny.load_prompts("scenes", "train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"]),
    )  # fmt: skip
    trainer.train()  # optimizer, data loader and caches
    trainer.policy.decode = outside(trainer.policy.decode)
    model, policy = trainer.model_wrapped, trainer.policy
    prompts = ["a photo of a red circle"] * batch_size
    latents, schedule, _ = policy.start(prompts, arguments.num_inference_steps)
    embeds, _, pooled, _ = policy.pipe.encode_prompt(prompts, None, None, max_sequence_length=0)
    inputs = {
        "hidden_states": latents,
        "timestep": schedule.timesteps[1].expand(batch_size),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
    }
    seconds = {name: [] for name in ("generation", "denoiser forward", "update", "denoiser forward and backward")}

    def timed(name, function):
        outside.seconds, started = 0.0, time.perf_counter()
        function()
        seconds[name].append(time.perf_counter() - started - outside.seconds)

    def forward(count):
        with torch.no_grad():
            for _ in range(count):
                model(**inputs, return_dict=False)

    def forward_and_backward(count):
        for _ in range(count):
            model(**inputs, return_dict=False)[0].square().mean().backward()

    def update():
        for batch in trainer._micro_batches(0):
            trainer.training_step(model, batch)

    for _ in range(arguments.repeats):
        before = policy.evaluations
        timed("generation", lambda: trainer._generate(0))
        calls = (policy.evaluations - before) // batch_size
        timed("denoiser forward", lambda: forward(calls))  # noqa: B023
        timed("update", update)
        micro_batches = len(trainer._micro_batches(0))
        timed("denoiser forward and backward", lambda: forward_and_backward(micro_batches))  # noqa: B023
        model.zero_grad()
    return {name: statistics.median(values) for name, values in seconds.items()}


def turn(arguments: Arguments, folder: str) -> dict[str, dict[str, float]]:
    """One turn in a process of its own, with the package that is in `folder`."""
    command = [sys.executable, os.path.abspath(__file__), "--measure", "--repeats", str(arguments.repeats)]
    command += ["--num_images", str(arguments.num_images), "--num_inference_steps", str(arguments.num_inference_steps)]
    command += ["--batch_sizes", *map(str, arguments.batch_sizes)]
    environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.measure:
        keys = [(method, size) for method in METHODS for size in arguments.batch_sizes]
        print(json.dumps({f"{method}, {size}": measure(arguments, method, size) for method, size in keys}))
        return
    versions = {"now": ROOT} | ({"base": arguments.base} if arguments.base else {})
    turns = {name: [] for name in versions}
    for _ in range(arguments.turns):
        for name, folder in versions.items():
            turns[name].append(turn(arguments, folder))
    columns = [f"{part}{'' if name == 'now' else ', base'}" for part in ("generation", "update") for name in versions]
    print(f"| method, images per call | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for key in turns["now"][0]:
        cells = []
        for part, bare in (("generation", "denoiser forward"), ("update", "denoiser forward and backward")):
            for name in versions:
                ratio = statistics.median(t[key][part] / t[key][bare] for t in turns[name])
                cells.append(f"{ratio:.2f} ({statistics.median(t[key][part] for t in turns[name]):.3f} s)")
        print(f"| {key} | {' | '.join(cells)} |")
    print("\nTimes the bare denoiser in the same batches (and seconds); decoding, rewards and the optimizer left out.")


if __name__ == "__main__":
    main()
