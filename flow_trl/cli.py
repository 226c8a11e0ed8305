"""
The command `flow-trl`, one subcommand per trainer, and what the scripts in `examples` share with it.

```
flow-trl tp_grpo --model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name ocr --reward_funcs ocr
flow-trl tdpo_r --config run.yaml --num_processes 8
flow-trl env
```

Arguments that no trainer knows go to `accelerate launch`; `--accelerate_config` is a file or one of TRL's names.
"""

import argparse
import difflib
import inspect
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from trl import TrlParser

import flow_trl

from .trainer.arguments import described


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FLOW_ATTENTION = [f"attn.{name}" for name in [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]]
TRAINERS = {
    "tp_grpo": ("TPGRPO", "a flow-matching pipeline, with credit for each denoising step"),
    "flow_grpo": ("FlowGRPO", "a flow-matching pipeline, with the final reward for all steps"),
    "tdpo_r": ("TDPOR", "a diffusion pipeline (DDIM), with a temporal critic that is reset"),
    "ddpo": ("DDPO", "a diffusion pipeline (DDIM), with the final reward for all steps"),
    "blockwise_grpo": ("BlockwiseGRPO", "a language model, with credit for each block of a completion"),
}
# Of arguments that transformers and TRL have too, those that most runs set.
USUAL = ("output_dir", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "logging_steps",
         "eval_strategy", "eval_steps", "save_steps", "seed", "use_cpu", "report_to", "push_to_hub", "hub_model_id",
         "resume_from_checkpoint", "num_generations", "max_completion_length", "beta")  # fmt: skip


@described
@dataclass
class ImageArguments:
    """
    What is trained on what, for the trainers of diffusers pipelines.

    Args:
        model_name_or_path (`str`, *optional*):
            Pipeline to train: Hub id or folder.
        dataset_name (`str`, *optional*):
            Prompts, as [`~prompts.load_prompts`] takes them: `"geneval"`, `"ocr"`, `"animals"`, a `.jsonl` or `.txt` file,
            or a Hub id.
        reward_funcs (`list[str]`, *optional*):
            Names of built-in reward functions, or dotted paths such as `my_package.darkness`.
        eval_size (`int`, *optional*, defaults to `1000`):
            Largest number of held-out prompts.
        lora_rank (`int`, *optional*, defaults to `32`):
            Rank of the LoRA; 0 trains all weights.
        lora_alpha (`int`, *optional*, defaults to `64`):
            Scale of the LoRA.
        lora_target_modules (`list[str]`, *optional*):
            Modules with a LoRA. Defaults to all attention projections.
    """

    model_name_or_path: str | None = None
    dataset_name: str | None = None
    reward_funcs: list[str] | None = None
    eval_size: int = 1000
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_target_modules: list[str] = field(default_factory=lambda: list(FLOW_ATTENTION))

    @property
    def peft_config(self) -> Any:
        """The LoRA, or `None` if all weights are trained."""
        from peft import LoraConfig

        if not self.lora_rank:
            return None
        options = {"lora_alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        return LoraConfig(r=self.lora_rank, init_lora_weights="gaussian", **options)


@described
@dataclass
class TextArguments:
    """
    What is trained on what, for [`BlockwiseGRPOTrainer`].

    Args:
        model_name_or_path (`str`, *optional*):
            Language model to train: Hub id or folder.
        dataset_name (`str`, *optional*):
            Problems with their answers: a `.jsonl` file or a Hub id.
        problem_column (`str`, *optional*, defaults to `"problem"`):
            Column of the problem.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the final answer.
        eval_size (`int`, *optional*, defaults to `400`):
            Largest number of held-out problems.
        lora_rank (`int`, *optional*, defaults to `0`):
            Rank of a LoRA on all linear layers; 0 trains all weights.
    """

    model_name_or_path: str | None = None
    dataset_name: str | None = None
    problem_column: str = "problem"
    answer_column: str = "answer"
    eval_size: int = 400
    lora_rank: int = 0

    @property
    def peft_config(self) -> Any:
        """The LoRA, or `None` if all weights are trained."""
        from peft import LoraConfig

        rank = self.lora_rank
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None


@described
@dataclass
class TaskArguments(TextArguments):
    """
    `TextArguments`, and by which task a model is trained.

    Args:
        task (`str`, *optional*, defaults to `"confidence"`):
            `"confidence"` ([`~tasks.confidence_task`]), `"two_attempts"` ([`~tasks.two_attempt_task`]) or the dotted path of
            a function that makes a [`~tasks.Task`].
    """

    task: str = "confidence"


class Parser(TrlParser):
    """
    TRL's parser, with `--config run.yaml`, whose `--help` leaves out what transformers and TRL have too, except for what most
    runs set; `--help-all` shows everything.

    Args:
        dataclass_types (`type` or a list of them):
            Classes of arguments.
        kwargs:
            Go to [`~trl.TrlParser`].

    Example:

    ```python
    >>> arguments, args = Parser((ImageArguments, TPGRPOConfig)).parse_args_and_config()
    ```
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, usage="%(prog)s [--config FILE.yaml] [arguments]", **kwargs)
        self._listed = {"help", "help_all", *USUAL}
        for base in {base for kind in self.dataclass_types for base in kind.__mro__}:
            if base.__module__.split(".")[0] not in ("transformers", "trl"):
                self._listed |= inspect.get_annotations(base).keys()
        if self.add_help:
            self.add_argument("--help-all", action=_HelpAll, help="show those of transformers and TRL too and exit")

    def parse_args_and_config(self, args: list[str] | None = None, *more: Any, **kwargs: Any) -> tuple:
        """As of [`~trl.TrlParser`], which knows `--config FILE` alone; here `--config=FILE` is the same."""
        return super().parse_args_and_config(
            _with_config_apart(sys.argv[1:] if args is None else args), *more, **kwargs
        )

    def format_help(self) -> str:
        changed = [(action, action.help, action.option_strings) for action in self._actions]
        for action in self._actions:
            is_negation = any(name.startswith(("--no_", "--no-")) for name in action.option_strings)
            if action.dest not in self._listed or is_negation:
                action.help = argparse.SUPPRESS
            elif action.dest != "help":
                action.option_strings = action.option_strings[:1]  # --like_this, not --like-this as well
        text = super().format_help()
        for action, shown, names in changed:
            action.help, action.option_strings = shown, names
        return text


def method_parser(method: str, *kinds: type, **kwargs: Any) -> Parser:
    """A parser of classes of arguments and of a method's config, with the defaults of that method."""
    parser = Parser((*kinds, getattr(flow_trl, f"{TRAINERS[method][0]}Config")), allow_abbrev=False, **kwargs)
    if method in ("tdpo_r", "ddpo"):
        parser.set_defaults(lora_rank=4, lora_alpha=4, lora_target_modules=ATTENTION)
    parser.set_defaults(output_dir=f"outputs/{method}")
    return parser


def _with_config_apart(argv: list[str]) -> list[str]:
    return [part for one in argv for part in (one.split("=", 1) if one.startswith("--config=") else [one])]


class _HelpAll(argparse._HelpAction):
    """Prints the help with every argument."""

    def __init__(self, option_strings: list[str], help: str, **kwargs: Any):
        super().__init__(option_strings, dest="help_all", help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser._listed = {action.dest for action in parser._actions}
        parser.print_help()
        parser.exit()


def finish(trainer: Any) -> None:
    """
    Trains, evaluates at the end if that was not due there, and saves.

    Args:
        trainer ([`~trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
    if trainer.eval_dataset is not None and evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()


def report(trainer: Any, files: str) -> None:
    """
    Prints the table of rewards before and after, and where everything is, which is pushed to the Hub if `args.push_to_hub`.

    Args:
        trainer ([`~trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer.
        files (`str`):
            What there is in `output_dir`.
    """
    from .callbacks import reward_table

    if trainer.is_world_process_zero():
        print(f"\nHeld out: {len(trainer.eval_dataset)} prompts, one image each\n")
        print(reward_table(trainer.state.log_history))
        print(f"\nIn {trainer.args.output_dir}: {files}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def load_problems(arguments: TextArguments, task: Any) -> tuple[Any, Any]:
    """Training and held-out problems of a file or a data set of the Hub, made ready for a [`~tasks.Task`]."""
    from .prompts import load_rows, split_prompts

    parts = split_prompts(load_rows(arguments.dataset_name, "dataset_name"), arguments.eval_size)
    return tuple(task.prepare(part, arguments.problem_column, arguments.answer_column) for part in parts)


def _train_images(command: str, arguments: ImageArguments, args: Any) -> None:
    from .callbacks import OverOptimizationCallback
    from .prompts import load_prompts

    train_dataset, eval_dataset = load_prompts(arguments.dataset_name, arguments.eval_size)
    trainer = getattr(flow_trl, f"{TRAINERS[command][0]}Trainer")(
        model=arguments.model_name_or_path,
        reward_funcs=arguments.reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[OverOptimizationCallback()] if args.out_of_domain_rewards else None,
        peft_config=arguments.peft_config,
    )
    finish(trainer)
    report(trainer, f"images/, the {'LoRA' if trainer.is_lora else 'pipeline'} and its card (README.md)")


def _train_text(command: str, arguments: TaskArguments, args: Any) -> None:
    from .rewards import import_dotted
    from .tasks import confidence_task, two_attempt_task

    named = {"confidence": confidence_task, "two_attempts": two_attempt_task}
    if arguments.task not in named and "." not in arguments.task:
        raise ValueError(
            f"`task={arguments.task!r}`: it must be {', '.join(named)}, or the dotted path of a function."
        )
    task = (named.get(arguments.task) or import_dotted(arguments.task, "task"))()
    train_dataset, eval_dataset = load_problems(arguments, task)
    trainer = flow_trl.BlockwiseGRPOTrainer(
        model=arguments.model_name_or_path,
        blocks=task.blocks,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if args.eval_strategy != "no" else None,
        peft_config=arguments.peft_config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()


def _launch(command: str, parser: Parser, argv: list[str], unknown: list[str]) -> None:
    """Runs a command in as many processes as `accelerate launch` makes of the arguments that no trainer knows."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    launcher = launch_command_parser()
    names = ["--accelerate_config", *launcher._option_string_actions]
    for name in (argument.partition("=")[0] for argument in unknown):
        if name.startswith("-") and not name[1:].isdigit() and name not in names:
            near = difflib.get_close_matches(name, [*parser._option_string_actions, *names], n=1)
            remedy = f"did you mean {near[0]}?" if near else "`--help-all` shows every argument."
            parser.error(f"neither the trainer nor `accelerate launch` has an argument {name}; {remedy}")
    known, rest = [], list(unknown)
    for argument in argv:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            known.append(argument)
    launched = [*resolve_accelerate_config_argument(unknown), "--module", "flow_trl.cli", command, *known]
    launch_command(launcher.parse_args(launched))


def environment() -> str:
    """What a bug report should say: versions and devices, a line each."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub",
                "deepspeed", "torchao", "torchvision", "vllm", "rich")  # fmt: skip
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "flow-trl": flow_trl.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "devices": ", ".join(devices) or f"{os.cpu_count()} CPU cores",
        **{name: installed(name) for name in packages},
    }
    return "\n".join(f"- {name}: {value}" for name, value in found.items())


def main(argv: list[str] | None = None) -> None:
    """
    Runs `flow-trl`.

    Args:
        argv (`list[str]`, *optional*):
            Its arguments. If not set, those of the process.
    """
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "env":
        print(f"Copy this into a bug report:\n\n{environment()}")
        return
    if command not in TRAINERS:
        print("usage: flow-trl COMMAND [--config FILE.yaml] [arguments]\n\nCommands (`flow-trl COMMAND --help`):")
        for name, (_, meaning) in TRAINERS.items():
            print(f"  {name:<15} trains {meaning}")
        print(f"  {'env':<15} prints versions and devices, for bug reports")
        if command not in ("--help", "-h"):
            raise SystemExit(f"flow-trl: there is no command {command!r}")
        return
    is_text = command == "blockwise_grpo"
    parser = method_parser(command, TaskArguments if is_text else ImageArguments, prog=f"flow-trl {command}")
    argv = _with_config_apart(argv)
    without_file = list(argv)
    if "--config" in argv:
        del without_file[argv.index("--config") : argv.index("--config") + 2]
    unknown = parser.parse_known_args(without_file)[1]
    is_launched = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if not is_launched and (unknown or torch.cuda.device_count() > 1):
        return _launch(command, parser, argv, unknown)
    arguments, args = parser.parse_args_and_config(argv)
    sys.path.insert(0, os.getcwd())  # for dotted paths
    needed = ["model_name_or_path", "dataset_name", *([] if is_text else ["reward_funcs"])]
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} must be given (the scripts in `examples` have a tiny model of their own)")
    (_train_text if is_text else _train_images)(command, arguments, args)


if __name__ == "__main__":
    main()
