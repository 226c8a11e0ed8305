# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Time of a training step of BlockwiseGRPOTrainer against TRL's GRPOTrainer, on the same completions.

The completions are sampled once, and then given to both trainers by a `rollout_func`, so that a step is: rewards,
advantages, forward, backward, update. Both take turns in one process; the medians count.

    python examples/benchmarks/blockwise_step.py
"""

import os
import statistics
import tempfile
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from flow_trl import BlockwiseGRPOConfig, BlockwiseGRPOTrainer, tiny
from flow_trl.evaluation import sample_completions
from flow_trl.rewards.text import exact_match
from flow_trl.tasks import confidence_task


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        num_completions (`int`, *optional*, defaults to `128`):
            Number of completions of a step, in groups of 16.
        steps (`int`, *optional*, defaults to `8`):
            Number of steps in a turn; the first is not counted.
        turns (`int`, *optional*, defaults to `6`):
            Number of turns of each trainer.
    """

    num_completions: int = field(default=128, metadata={"help": "Completions of a step, in groups of 16."})
    steps: int = field(default=8, metadata={"help": "Steps in a turn; the first is not counted."})
    turns: int = field(default=6, metadata={"help": "Turns of each trainer."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    count, group = arguments.num_completions, 16
    dataset = tiny.load_prompts("arithmetic", "train").select(range(count // group))
    model, tokenizer = tiny.load_language_model()
    sampled = dict(
        zip(
            dataset["prompt"],
            sample_completions(model, tokenizer, dataset["prompt"], num_samples=group, max_new_tokens=60),
            strict=True,
        )
    )
    ids = {
        prompt: [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in texts]
        for prompt, texts in sampled.items()
    }

    def rollout(prompts, trainer):
        taken = dict.fromkeys(ids, 0)
        completions = []
        for prompt in prompts:
            completions.append(ids[prompt][taken[prompt]])
            taken[prompt] += 1
        return {"prompt_ids": tokenizer(prompts).input_ids, "completion_ids": completions, "logprobs": None}

    def step_times(method: str, folder: str) -> list[float]:
        settings = {
            "per_device_train_batch_size": count,
            "num_generations": group,
            "max_steps": arguments.steps,
            "max_completion_length": 64,
            "activation_checkpointing": False,
            "loss_type": "grpo",
            "scale_rewards": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
        }
        shared = {
            "train_dataset": dataset,
            "processing_class": tokenizer,
            "rollout_func": rollout,
        }
        policy, _ = tiny.load_language_model()
        task = confidence_task(correct=exact_match)
        if method == "blockwise":
            trainer = BlockwiseGRPOTrainer(policy, task.blocks, BlockwiseGRPOConfig(folder, **settings), **shared)
        else:
            trainer = GRPOTrainer(policy, task.scalar_reward_funcs, GRPOConfig(folder, **settings), **shared)
        trainer.train()
        return [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry][1:]

    times: dict[str, list[float]] = {"trl": [], "blockwise": []}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.turns):
            turn = {method: step_times(method, folder) for method in times}
            ratios.append(statistics.median(turn["blockwise"]) / statistics.median(turn["trl"]))
            for method, values in turn.items():
                times[method] += values

    print(f"\n{count} completions a step, medians of {len(times['trl'])} steps\n")
    print("| trainer              | seconds a step | ratio |")
    print("| -------------------- | -------------- | ----- |")
    base = statistics.median(times["trl"])
    for method, name in (("trl", "GRPOTrainer"), ("blockwise", "BlockwiseGRPOTrainer")):
        seconds = statistics.median(times[method])
        print(f"| {name:<20} | {seconds:14.4f} | {seconds / base:5.3f} |")
    print(f"\nRatio of each turn: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
