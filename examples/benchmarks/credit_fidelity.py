# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Which credit, which stride? The fidelity of each against its cost, on the tiny pipeline or on yours, without training: a
table, a figure, and advice in words.

    python examples/benchmarks/credit_fidelity.py
    python examples/benchmarks/credit_fidelity.py --reward_funcs scene
    python examples/benchmarks/credit_fidelity.py --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --dataset_name prompts.txt --reward_funcs pickscore --pipeline_kwargs '{"height": 512, "width": 512}' --bf16

A LoRA that is half trained is measured with `--lora FOLDER`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from diffusers import DiffusionPipeline
from trl import TrlParser

from flow_trl import TPGRPOConfig, TPGRPOTrainer, tiny
from flow_trl.fidelity import credit_fidelity
from flow_trl.rewards.clip import ClipScore


@dataclass
class ScriptArguments:
    """
    Arguments of the benchmark, beside those of [`TPGRPOConfig`], of which `credit` and `completion_stride` do not matter.

    Args:
        model_name_or_path (`str`, *optional*):
            Pipeline: Hub id or folder. If not set, the tiny world's.
        lora (`str`, *optional*):
            LoRA that the pipeline loads: Hub id or folder.
        dataset_name (`str`, *optional*):
            Prompts: a `.txt` or `.jsonl` file, or a Hub id. If not set, the tiny world's scenes.
        reward_funcs (`list[str]`, *optional*, defaults to `["clip_score"]`):
            Names of reward functions; in the tiny world `clip_score`, `scene` and `scene_strict` are its own.
        num_prompts (`int`, *optional*, defaults to `16`):
            Number of prompts.
        num_continuations (`int`, *optional*, defaults to `16`):
            Continuations of each latent.
        strides (`list[str]`, *optional*, defaults to `["1", "2", "3", "jump"]`):
            Strides of completions.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pipeline; default: the tiny one."})
    lora: str | None = field(default=None, metadata={"help": "LoRA that the pipeline loads."})
    dataset_name: str | None = field(default=None, metadata={"help": "Prompts: .txt or .jsonl file, or Hub id."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["clip_score"], metadata={"help": "Names of reward functions."}
    )
    num_prompts: int = field(default=16, metadata={"help": "Number of prompts."})
    num_continuations: int = field(default=16, metadata={"help": "Continuations of each latent."})
    strides: list[str] = field(
        default_factory=lambda: ["1", "2", "3", "jump"], metadata={"help": "Strides of completions."}
    )


TINY = {
    "pipeline_kwargs": {"max_sequence_length": 0},
    "guidance_scale": 2.0,
    "num_generations": 16,
    "per_device_rollout_batch_size": 64,
    "per_device_decode_batch_size": 32,
    "use_cpu": True,
}
TINY_REWARDS = {
    "clip_score": lambda: ClipScore(*tiny.load_clip()),
    "scene": tiny.scene_reward,
    "scene_strict": lambda: tiny.scene_reward(strict=True),
}


def main() -> None:
    # The model decides the defaults, so it is read first.
    arguments, *_ = TrlParser(ScriptArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    parser = TrlParser((ScriptArguments, TPGRPOConfig))
    parser.set_defaults(output_dir="outputs/credit_fidelity", report_to="none")
    is_tiny = arguments.model_name_or_path is None
    if is_tiny:
        parser.set_defaults(**TINY)
    arguments, args = parser.parse_args_and_config()

    if arguments.dataset_name is None:
        dataset = tiny.load_prompts("scenes", "train")
    elif Path(arguments.dataset_name).suffix == ".txt":
        dataset = load_dataset("text", data_files=arguments.dataset_name, split="train").rename_column(
            "text", "prompt"
        )
    elif Path(arguments.dataset_name).suffix in (".json", ".jsonl"):
        dataset = load_dataset("json", data_files=arguments.dataset_name, split="train")
    else:
        dataset = load_dataset(arguments.dataset_name, split="train")
    if is_tiny:
        pipe = tiny.load_flow_pipeline()
    else:
        pipe = DiffusionPipeline.from_pretrained(arguments.model_name_or_path, **(args.model_init_kwargs or {}))
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora)
    own = TINY_REWARDS if is_tiny else {}
    trainer = TPGRPOTrainer(
        model=pipe,
        reward_funcs=[own[name]() if name in own else name for name in arguments.reward_funcs],
        args=args,
        train_dataset=dataset,
    )
    found = credit_fidelity(
        trainer,
        num_prompts=arguments.num_prompts,
        num_continuations=arguments.num_continuations,
        strides=tuple(stride if stride == "jump" else int(stride) for stride in arguments.strides),
        seed=args.seed,
    )

    print("\n| credit | stride | squared correlation | evaluations | images | seconds | per evaluation | per second |")
    print("| --- " * 8 + "|")
    for row in found.table.to_dict("records"):
        print(
            f"| {row['credit']} | {row['stride']} | {row['fidelity']:.3f} ± {row['fidelity_se']:.3f} | "
            f"{row['evaluations']:.0f} | {row['images']} | {row['seconds']:.3f} | "
            f"{row['per_evaluation']:.2f} ± {row['per_evaluation_se']:.2f} | "
            f"{row['per_second']:.2f} ± {row['per_second_se']:.2f} |"
        )
    print(f"\nCeiling by step: {' '.join(f'{value:.2f}' for value in found.ceiling)}\n\n{found.advice()}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found.table.join(found.steps).to_csv(folder / "credit_fidelity.csv", index=False)
    found.figure().savefig(folder / "credit_fidelity.png", dpi=120)
    print(f"\nIn {folder}: credit_fidelity.csv (with each step), credit_fidelity.png")


if __name__ == "__main__":
    main()
