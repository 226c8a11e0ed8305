# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
How well each baseline stands in for the value of a prefix: the comparison of figure 1 of
https://huggingface.co/papers/2602.10231.

Completions are sampled in groups. From the end of each solution, further confidences are sampled: their mean reward is
the Monte-Carlo value of that prefix, and the completion's reward minus it the Monte-Carlo advantage. A baseline's error
is the root mean square of its advantages minus those. Monte Carlo itself has an error, which is the least that can be
measured; it is in the table.

    python examples/benchmarks/baseline_fidelity.py
    python examples/benchmarks/baseline_fidelity.py --model_name_or_path outputs/blockwise_grpo/blockwise
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from flow_trl import tiny
from flow_trl.blocks import find_blocks
from flow_trl.credit import block_advantages
from flow_trl.evaluation import sample_completions
from flow_trl.rewards.text import brier_reward, correctness_reward, exact_match
from flow_trl.tasks import confidence_task


@dataclass
class Arguments:
    """
    Arguments of the benchmark.

    Args:
        model_name_or_path (`str`, *optional*):
            Folder of a language model of the tiny arithmetic. If not set, the shipped one.
        num_prompts (`int`, *optional*, defaults to `32`):
            Number of problems.
        num_generations (`int`, *optional*, defaults to `32`):
            Completions of each problem: the size of a group.
        num_continuations (`int`, *optional*, defaults to `32`):
            Confidences sampled after each solution.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all that is sampled.
        output_dir (`str`, *optional*, defaults to `"outputs/baseline_fidelity"`):
            Folder of the figure.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of a tiny language model."})
    num_prompts: int = field(default=32, metadata={"help": "Number of problems."})
    num_generations: int = field(default=32, metadata={"help": "Completions of each problem."})
    num_continuations: int = field(default=32, metadata={"help": "Confidences sampled after each solution."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is sampled."})
    output_dir: str = field(default="outputs/baseline_fidelity", metadata={"help": "Folder of the figure."})


ESTIMATORS = {
    "outcome": {"baseline": "outcome"},
    "outcome, shrinkage 2": {"baseline": "outcome", "shrinkage": 2.0},
    "outcome, leave one out": {"baseline": "outcome", "leave_one_out": True},
    "group": {"baseline": "group"},
    "batch": {"baseline": "batch"},
    "none": {"baseline": "none"},
}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folder = () if arguments.model_name_or_path is None else (arguments.model_name_or_path,)
    model, tokenizer = tiny.load_language_model(*folder)
    sample = partial(sample_completions, model, tokenizer, max_new_tokens=64)
    dataset = tiny.load_prompts("arithmetic", "test").select(range(arguments.num_prompts))
    blocks = confidence_task(correct=exact_match).blocks
    score = partial(brier_reward, correct=exact_match)

    completions = sample(dataset["prompt"], num_samples=arguments.num_generations, seed=arguments.seed)
    rows = [
        {"prompt": row["prompt"], "answer": row["answer"], "completion": text, "span": find_blocks(text, blocks)[1]}
        for row, texts in zip(dataset, completions, strict=True)
        for text in texts
    ]
    missing = [row["span"] is None for row in rows]
    prefixes = [row["completion"][: row["span"][0]] if row["span"] else "" for row in rows]
    continued = sample(
        [row["prompt"] + prefix for row, prefix in zip(rows, prefixes, strict=True)],
        num_samples=arguments.num_continuations,
        seed=arguments.seed + 1,
    )
    answers = [row["answer"] for row in rows]
    rewards = torch.tensor(score([row["completion"] for row in rows], answers))
    values = torch.stack(
        [
            torch.tensor(score([prefix + text for text in texts], [answer] * len(texts)))
            for prefix, texts, answer in zip(prefixes, continued, answers, strict=True)
        ]
    )
    outcomes = correctness_reward([row["completion"] for row in rows], answers, correct=exact_match)
    rewards[torch.tensor(missing)] = torch.nan
    exact = rewards - values.mean(dim=1)

    errors = {"Monte Carlo itself": (values.var(dim=1)[~rewards.isnan()].mean() / arguments.num_continuations).sqrt()}
    for name, options in ESTIMATORS.items():
        advantages = block_advantages(
            torch.stack([torch.zeros_like(rewards), rewards], dim=1),
            [None, outcomes],
            arguments.num_generations,
            **options,
        )[:, 1]
        errors[name] = (advantages - exact)[~rewards.isnan()].square().mean().sqrt()

    print(
        f"\n{arguments.num_prompts} prompts x {arguments.num_generations} completions, "
        f"{arguments.num_continuations} continuations each; {sum(outcomes) / len(outcomes):.0%} correct, "
        f"{sum(missing)} without a confidence\n"
    )
    print("| baseline               | RMSE of the advantage |")
    print("| ---------------------- | --------------------- |")
    for name, error in errors.items():
        print(f"| {name:<22} | {error.item():21.4f} |")

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    floor = errors.pop("Monte Carlo itself").item()
    bars = axes.barh(list(errors), [error.item() for error in errors.values()], color="tab:blue")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.axvline(floor, color="black", linestyle="--", label="Monte Carlo itself")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("RMSE of the advantage against Monte Carlo")
    axes.legend(loc="upper right")
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "baseline_fidelity.png", dpi=150)
    print(f"\nThe figure is {output / 'baseline_fidelity.png'}")


if __name__ == "__main__":
    main()
