# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[math,plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Teaches a language model to solve problems and to say how likely its solution is right, with one advantage for the
solution and one for the confidence. Ends with a table and a reliability diagram from before and after.

The tiny world, a few minutes on two CPU cores:

    python examples/blockwise_grpo.py
    python examples/blockwise_grpo.py --method rlcr

A real model on GPUs, on problems with a column `problem` and a column `answer` (see examples/README.md for the paper's
setting):

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/blockwise_grpo.py \
        --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dataset_name problems.jsonl --use_vllm
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOTrainer

from flow_trl import BlockwiseGRPOConfig, BlockwiseGRPOTrainer, tiny
from flow_trl.cli import Parser, TextArguments
from flow_trl.cli import load_problems as load_real_problems
from flow_trl.console import use_console
from flow_trl.evaluation import sample_completions, save_results, score_confidence
from flow_trl.prompts import split_prompts
from flow_trl.tasks import CORRECT, Task, confidence_task


METHODS = ("blockwise", "group", "batch", "none", "dcpo", "rlcr", "grpo")


@dataclass
class TaskArguments(TextArguments):
    """
    Arguments of a task's script, beside those of `TextArguments` and [`BlockwiseGRPOConfig`]. Without a model the tiny
    world's is trained, with settings and problems that suit it.

    Args:
        method (`str`, *optional*, defaults to `"blockwise"`):
            `"blockwise"` compares later blocks after beginnings of the same outcome; `"group"`, `"batch"` and `"none"`
            are its other baselines; `"dcpo"` is [DCPO](https://huggingface.co/papers/2603.09117), which has a reward of its
            own for the confidence. `"rlcr"` and `"grpo"` are TRL's GRPO with one reward for the whole completion.
        eval_samples (`int`, *optional*, defaults to `16`):
            Completions sampled for each held-out problem.
        eval_batch_size (`int`, *optional*, defaults to `64`):
            Number of completions sampled together for the evaluation.
    """

    method: str = field(default="blockwise", metadata={"help": "How credit is assigned.", "choices": list(METHODS)})
    eval_samples: int = field(default=16, metadata={"help": "Completions sampled for each held-out problem."})
    eval_batch_size: int = field(default=64, metadata={"help": "Completions sampled together for the evaluation."})


@dataclass
class ScriptArguments(TaskArguments):
    """
    Arguments of this script, beside those of [`BlockwiseGRPOConfig`] and `TaskArguments`.

    `--method rlcr` trains correctness and the score of the confidence together, `--method grpo` correctness alone.

    Args:
        score (`str`, *optional*):
            Score of a confidence, `"bce"` or `"brier"`. By default the method's own, which for `--method rlcr` is `"brier"`
            ([RLCR](https://huggingface.co/papers/2507.16806)), and `"bce"` where it has none.
    """

    score: str | None = field(default=None, metadata={"help": "Score of a confidence.", "choices": ["bce", "brier"]})


# What suits the tiny world on two CPU cores, where it differs from the paper's setting.
TINY = {
    "eval_batch_size": 1024,
    "num_generations": 16,
    "per_device_train_batch_size": 256,
    "activation_checkpointing": False,
    "max_completion_length": 40,
    "max_steps": 200,
    "learning_rate": 1.5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
}
# The paper's, as far as it does not depend on the hardware, and a quicker evaluation.
PAPER = {
    "eval_size": 100,
    "eval_samples": 8,
    "num_generations": 32,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-6,
    "warmup_steps": 64,
    "max_completion_length": 4096,
    "use_adaptive_entropy": True,
    "entropy_target": 0.2,
    "entropy_coef_delta": 5e-4,
}


def parse(arguments_class: type, task: str, **tiny_defaults: Any) -> tuple[Any, BlockwiseGRPOConfig]:
    """Reads the command line. The model decides the defaults, so it is read first."""
    arguments, *_ = Parser(arguments_class, add_help=False).parse_args_and_config(return_remaining_strings=True)
    parser = Parser((arguments_class, BlockwiseGRPOConfig))
    defaults = PAPER if arguments.model_name_or_path else {**TINY, **tiny_defaults}
    parser.set_defaults(output_dir=f"outputs/{task}/{arguments.method}", **defaults)
    return parser.parse_args_and_config()


def load_problems(arguments: TaskArguments, task: Task, tiny_name: str) -> tuple[Dataset, Dataset]:
    """Training and held-out problems."""
    if arguments.dataset_name is not None:
        return load_real_problems(arguments, task)
    return split_prompts(
        {split: tiny.load_prompts(tiny_name, split) for split in ("train", "test")}, arguments.eval_size
    )


def make_trainer(
    arguments: TaskArguments, args: BlockwiseGRPOConfig, task: Task, scalar: list, train_dataset: Dataset
) -> tuple[GRPOTrainer, PreTrainedTokenizerBase]:
    """The trainer of the method, all else equal. TRL's own takes `scalar`, rewards for the whole completion."""
    if arguments.model_name_or_path is None:
        model, tokenizer = tiny.load_language_model()
    else:
        model = arguments.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    shared = {"args": args, "train_dataset": train_dataset, "processing_class": tokenizer}
    shared |= {"peft_config": arguments.peft_config}
    if arguments.method in ("rlcr", "grpo"):
        trainer = GRPOTrainer(model, scalar, **shared)
        use_console(trainer)
        return trainer, tokenizer
    baseline = {"blockwise": "outcome", "dcpo": "group"}.get(arguments.method, arguments.method)
    if args.baseline not in ("outcome", baseline):
        raise ValueError(f"`--baseline {args.baseline}`: it follows from `--method {arguments.method}`, leave it out.")
    args.baseline = baseline
    if arguments.method == "dcpo":
        args.scale_rewards = "group"
    return BlockwiseGRPOTrainer(model, task.blocks, **shared), tokenizer


def sample(
    trainer: GRPOTrainer, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: TaskArguments
) -> list[list[str]]:
    """Completions of the held-out problems; each process samples its share."""
    with trainer.accelerator.split_between_processes(dataset["prompt"][:]) as prompts:
        completions = sample_completions(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            prompts,
            num_samples=arguments.eval_samples,
            max_new_tokens=trainer.args.max_completion_length,
            temperature=trainer.args.temperature,
            batch_size=arguments.eval_batch_size,
            chat_template_kwargs=trainer.args.chat_template_kwargs,
        )
    return gather_object(completions)


def finish(trainer: GRPOTrainer, results: dict[str, dict[str, Any]], measures: dict[str, str]) -> None:
    """Saves results, prints a table of the named measures, saves model and card, and pushes them if asked to."""
    if trainer.is_world_process_zero():
        save_results(results, trainer.args.output_dir)
        width = max(map(len, results))
        print(f"\nHeld out\n\n| {'':{width}} |{'|'.join(f' {name:<14} ' for name in measures.values())}|")
        print(f"| {'-' * width} |{'|'.join(' -------------- ' for _ in measures)}|")
        for when, result in results.items():
            cells = [
                f"{result[key]:.3f}" + (f" ± {result[f'{key}_se']:.3f}" if f"{key}_se" in result else "")
                for key in measures
            ]
            print(f"| {when:<{width}} |{'|'.join(f' {cell:<14} ' for cell in cells)}|")
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).name)
    trainer.save_model()  # and push, with `--push_to_hub`


def make_task(arguments: ScriptArguments, correct: Callable[[str | None, str], bool], score: str = "bce") -> Task:
    """The task; `score` is that of the confidence where neither the command line nor the method says which."""
    if arguments.method == "dcpo" and arguments.score is not None:
        raise ValueError(f"`--score {arguments.score}`: `--method dcpo` has a score of its own, leave it out.")
    own = {"dcpo": "dcpo", "rlcr": "brier"}.get(arguments.method, score)
    return confidence_task(score=arguments.score or own, correct=correct)


def train(
    arguments: ScriptArguments,
    args: BlockwiseGRPOConfig,
    task: Task,
    train_dataset: Dataset,
    held_out: dict[str, Dataset],
    correct: Callable[[str | None, str], bool],
) -> None:
    """Trains between two evaluations on each held-out set, the last one named "", and prints what came of it."""
    scalar = task.scalar_reward_funcs if arguments.method == "rlcr" else task.blocks[0].reward_funcs
    trainer, tokenizer = make_trainer(arguments, args, task, scalar, train_dataset)

    def evaluate(when: str) -> dict[str, dict[str, Any]]:
        return {
            f"{name} {when}".strip(): score_confidence(
                sample(trainer, tokenizer, problems, arguments), problems["answer"][:], correct=correct
            )
            for name, problems in held_out.items()
        }

    results = evaluate("before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    results |= evaluate("after")

    measures = {"accuracy": "accuracy", "auroc": "AUROC", "ece": "ECE", "brier": "Brier score"}
    finish(trainer, results, measures | {"format": "format", "unparsable": "no confidence"})
    if trainer.is_world_process_zero():
        print("\nOne answer chosen from several, after training:\n\n| choice                      | accuracy      |")
        print("| --------------------------- | ------------- |")
        chosen = {f"pass@{arguments.eval_samples} (any is right)": f"pass@{arguments.eval_samples}"}
        chosen |= {name.replace("_", " "): name for name in ("majority", "highest_confidence", "weighted_majority")}
        for name, key in chosen.items():
            print(f"| {name:<27} | {results['after'][key]:.3f} ± {results['after'][f'{key}_se']:.3f} |")
        saved = "the model" if arguments.peft_config is None else "the LoRA"
        print(f"\nIn {args.output_dir}: reliability_diagram.png, results.json, {saved} and its card (README.md)")


def main() -> None:
    tiny_defaults = {"per_device_train_batch_size": 192, "num_generations": 8, "max_steps": 240, "learning_rate": 3e-4}
    arguments, args = parse(ScriptArguments, "blockwise_grpo", **tiny_defaults)
    correct = CORRECT["exact" if arguments.model_name_or_path is None else "math"]
    task = make_task(arguments, correct)
    train_dataset, eval_dataset = load_problems(arguments, task, "arithmetic")
    train(arguments, args, task, train_dataset, {"": eval_dataset}, correct)


if __name__ == "__main__":
    main()
