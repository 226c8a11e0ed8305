# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Does better credit train better? Flow-GRPO, TP-GRPO and the control variates on the tiny pipeline, at equal updates, equal
denoiser evaluations and equal time, with several seeds: all steps but the last trained, the same prompts and groups, and for
each method the learning rate that was best in the same small search.

Each finished run is a JSON file in `--results`; what is there is not run again, so the study can be stopped at any time. One
process per core:

    for worker in 0 1; do
        OMP_NUM_THREADS=1 python examples/benchmarks/credit_study.py --worker $worker --num_workers 2 &
    done; wait
    python examples/benchmarks/credit_study.py --table

The search is on training prompts that no run trains on, the result on test prompts. Seconds are CPU seconds of one core,
evaluation left out; those per update are medians over all runs of a method.
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import HfArgumentParser, TrainerCallback

from flow_trl import FlowGRPOConfig, FlowGRPOTrainer, TPGRPOConfig, TPGRPOTrainer, tiny
from flow_trl.rewards.clip import ClipScore


@dataclass
class Arguments:
    """
    Arguments of the study.

    Args:
        results (`str`, *optional*, defaults to `"examples/benchmarks/credit_study"`):
            Folder of the results of single runs.
        worker, num_workers (`int`, *optional*):
            This process takes every `num_workers`-th run, from `worker` on.
        table (`bool`, *optional*, defaults to `False`):
            Whether to tabulate and draw what is there, and run nothing.
        output_dir (`str`, *optional*, defaults to `"outputs/credit_study"`):
            Folder of the figures.
    """

    results: str = field(default="examples/benchmarks/credit_study", metadata={"help": "Folder of the results."})
    worker: int = field(default=0, metadata={"help": "Number of this process."})
    num_workers: int = field(default=1, metadata={"help": "Number of processes."})
    table: bool = field(default=False, metadata={"help": "Whether to tabulate what is there, and run nothing."})
    output_dir: str = field(default="outputs/credit_study", metadata={"help": "Folder of the figures."})


WEIGHTED = {"scale_rewards": "trajectory", "step_weights": "noise"}
METHODS = {
    "Flow-GRPO": {},
    "TP-GRPO": {"credit": "consistent"},
    "control variate, stride 2": {"credit": "control_variate", "completion_stride": 2, **WEIGHTED},
    "control variate, jump": {"credit": "control_variate", "completion_stride": "jump", **WEIGHTED},
    "Flow-GRPO, weighted": WEIGHTED,
    "TP-GRPO, weighted": {"credit": "consistent", **WEIGHTED},
}
MAIN = list(METHODS)[:4]
# Updates that take about the same time; a third of them in the search.
UPDATES = dict(zip(METHODS, (60, 20, 28, 36, 60, 20), strict=True))
SEEDS = {"clip_score": [42, 43, 44, 45, 46], "scene": [42, 43, 44]}
LEARNING_RATES = [1e-3, 2e-3, 4e-3, 8e-3]
NUM_EVALUATIONS = 4
COMMON = {
    "pipeline_kwargs": {"max_sequence_length": 0},
    "num_inference_steps": 10,
    "eval_num_inference_steps": 10,
    "guidance_scale": 1.0,
    "num_generations": 16,
    "generation_batch_size": 128,
    "updates_per_generation": 1,
    "per_device_train_batch_size": 64,
    "per_device_rollout_batch_size": 64,
    "per_device_decode_batch_size": 32,
    "per_device_eval_batch_size": 250,
    "beta": 0.0,
    "ema_decay": 0.0,
    "overlap_rewards": False,  # so that a run is one thread
    "num_images_to_save": 0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


class CpuTime(TrainerCallback):
    """CPU seconds of each update, evaluation left out."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.process_time()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.seconds.append(now - self.mark)
        self.mark = now


def run(method: str, reward: str, learning_rate: float, seed: int, search: bool) -> dict:
    """Trains once; returns the learning curve."""
    updates = UPDATES[method] // 3 if search else UPDATES[method]
    train = tiny.load_prompts("scenes", "train")
    rest = len(train) - 500
    held_out = (
        train.select(range(rest, len(train))) if search else tiny.load_prompts("scenes", "test").select(range(500))
    )
    functions = {
        "clip_score": ClipScore(*tiny.load_clip()),
        "scene": tiny.scene_reward(),
        "scene_strict": tiny.scene_reward(strict=True),
    }
    is_flow = "credit" not in METHODS[method]
    clock = CpuTime()
    with tempfile.TemporaryDirectory() as folder:
        args = (FlowGRPOConfig if is_flow else TPGRPOConfig)(
            folder,
            **COMMON,
            **METHODS[method],
            seed=seed,
            learning_rate=learning_rate,
            max_steps=updates,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=updates if search else updates // NUM_EVALUATIONS,
            reward_weights=[float(name == reward) for name in functions],
        )
        pipe = tiny.load_flow_pipeline()
        pipe.vae.to(memory_format=torch.channels_last)  # decodes faster on CPUs
        trainer = (FlowGRPOTrainer if is_flow else TPGRPOTrainer)(
            model=pipe,
            reward_funcs=list(functions.values()),
            args=args,
            train_dataset=train.select(range(rest)),
            eval_dataset=held_out,
            callbacks=[clock],
            peft_config=LoraConfig(
                r=16, lora_alpha=32, init_lora_weights="gaussian",
                target_modules=[
                    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
                ],
            ),
        )  # fmt: skip
        trainer.train()
    history = trainer.state.log_history
    evaluations = {entry["step"]: entry for entry in history if "eval_reward" in entry}
    trained = [entry for entry in history if "total_nfe" in entry]
    return {
        "method": method,
        "reward": reward,
        "learning_rate": learning_rate,
        "seed": seed,
        "updates": list(evaluations),
        **{name: [entry[f"eval_rewards/{name}/mean"] for entry in evaluations.values()] for name in functions},
        "evaluations_per_update": trained[0]["total_nfe"],
        "reward_calls_per_update": trained[0]["total_reward_calls"],
        "seconds_per_update": statistics.median(clock.seconds),
    }


def path_of(folder: str, method: str, reward: str, learning_rate: float, seed: int, search: bool) -> Path:
    name = method.lower().replace(",", "").replace(" ", "_")
    return Path(folder) / f"{'search' if search else 'run'}-{reward}-{name}-{learning_rate:g}-{seed}.json"


def best_learning_rate(folder: str, method: str, reward: str) -> float | None:
    """The best of the search, or `None` if that is not finished."""
    final = {}
    for learning_rate in LEARNING_RATES:
        path = path_of(folder, method, reward, learning_rate, 0, True)
        if not path.exists():
            return None
        final[learning_rate] = json.loads(path.read_text())[reward][-1]
    return max(final, key=final.get)


def jobs() -> list[tuple]:
    """Method, reward, learning rate (`None`: the best), seed, of all runs in the order of their importance."""
    found = []
    for reward, seeds in SEEDS.items():
        found += [(method, reward, rate, 0) for method in MAIN for rate in LEARNING_RATES]
        found += [(method, reward, None, seed) for seed in seeds for method in MAIN]
        if reward == "clip_score":
            weighted = [method for method in METHODS if method not in MAIN]
            found += [(method, reward, rate, 0) for method in weighted for rate in LEARNING_RATES]
            found += [(method, reward, None, seed) for seed in seeds[:2] for method in weighted]
    return found


def work(arguments: Arguments) -> None:
    folder = arguments.results
    Path(folder).mkdir(parents=True, exist_ok=True)
    for method, reward, rate, seed in jobs()[arguments.worker :: arguments.num_workers]:
        search = rate is not None
        while rate is None:  # another process may be searching still
            rate = best_learning_rate(folder, method, reward)
            time.sleep(0 if rate else 10)
        path = path_of(folder, method, reward, rate, seed, search)
        if path.exists():
            continue
        started = time.perf_counter()
        result = run(method, reward, rate, seed, search)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".part"), path)
        values = " ".join(f"{value:.3f}" for value in result[reward])
        print(f"{path.stem}: {values} ({time.perf_counter() - started:.0f} s)", flush=True)


# What came of it


def at(run: dict, name: str, axis: str, position: float, per_update: dict[str, float]) -> float:
    """A held-out score of a run at a position on an axis, between two evaluations by a line."""
    return float(np.interp(position, np.array(run["updates"]) * per_update[axis], run[name]))


def mean_and_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def tabulate(arguments: Arguments) -> None:
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(arguments.results).glob("run-*.json")):
        result = json.loads(path.read_text())
        runs[result["reward"]][result["method"]].append(result)
    for reward, of_method in runs.items():
        methods = [method for method in METHODS if method in of_method]
        per_update = {
            method: {
                "updates": 1,
                "evaluations": statistics.median(run["evaluations_per_update"] for run in of_method[method]),
                "seconds": statistics.median(run["seconds_per_update"] for run in of_method[method]),
            }
            for method in methods
        }
        axes = ("updates", "evaluations", "seconds")
        end = {
            axis: min(of_method[method][0]["updates"][-1] * per_update[method][axis] for method in methods)
            for axis in axes
        }
        shown = [reward, "scene_strict"]
        seeds = {method: len(of_method[method]) for method in methods}
        print(f"\nTrained: {reward}; held out, mean ± standard error over seeds\n")
        columns = [f"{name} after {end[axis]:.0f} {axis}" for axis in axes for name in shown]
        print("| method | seeds | learning rate | evaluations, seconds per update | " + " | ".join(columns) + " |")
        print("| --- " * (4 + len(columns)) + "|")
        start = [f"{of_method[methods[0]][0][name][0]:.3f}" for name in shown] * len(axes)
        print("| before | | | | " + " | ".join(start) + " |")
        for method in methods:
            cells = [
                mean_and_error([at(run, name, axis, end[axis], per_update[method]) for run in of_method[method]])
                for axis in axes
                for name in shown
            ]
            cost = f"{per_update[method]['evaluations']:.0f}, {per_update[method]['seconds']:.2f}"
            rate = f"{of_method[method][0]['learning_rate']:g}"
            print(f"| {method} | {seeds[method]} | {rate} | {cost} | " + " | ".join(cells) + " |")
        paired(reward, of_method, per_update, end["seconds"])
        draw(reward, shown, of_method, methods, per_update, Path(arguments.output_dir))


def paired(reward: str, of_method: dict, per_update: dict, seconds: float) -> None:
    """Differences to Flow-GRPO at equal time, seed by seed."""
    base = {run["seed"]: run for run in of_method.get("Flow-GRPO", [])}
    for method, runs in of_method.items():
        differences = [
            at(run, reward, "seconds", seconds, per_update[method])
            - at(base[run["seed"]], reward, "seconds", seconds, per_update["Flow-GRPO"])
            for run in runs
            if run["seed"] in base
        ]
        if method != "Flow-GRPO" and len(differences) > 1:
            error = statistics.stdev(differences) / len(differences) ** 0.5
            ratio = statistics.mean(differences) / error
            print(f"\n{method} - Flow-GRPO after {seconds:.0f} s: {mean_and_error(differences)} ({ratio:+.1f} errors)")


def draw(reward: str, names: list[str], of_method: dict, methods: list[str], per_update: dict, folder: Path) -> None:
    axes = ("updates", "evaluations", "seconds")
    labels = {"updates": "updates", "evaluations": "denoiser evaluations in sampling", "seconds": "CPU seconds"}
    figure = Figure(figsize=(12, 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(axes), sharey="row", squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            for number, method in enumerate(methods):
                runs = of_method[method]
                x = np.array(runs[0]["updates"]) * per_update[method][axis]
                y = np.array([run[name] for run in runs])
                panel.plot(x, y.mean(0), color=f"C{number}", label=f"{method} ({len(runs)})")
                if len(runs) > 1:
                    error = y.std(0, ddof=1) / len(runs) ** 0.5
                    panel.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=f"C{number}", alpha=0.2, lw=0)
            panel.locator_params(axis="x", nbins=5)
            panel.set_xlabel(labels[axis])
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"held out: {name}" + ("" if name == reward else "\n(not trained)"))
    panels[0, 0].legend(title="method (seeds)", fontsize=8)
    figure.suptitle(f"Trained: {reward}. Means and standard errors over seeds")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{reward}.png", dpi=120)
    print(f"\n{folder / f'{reward}.png'}")


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tabulate(parsed) if parsed.table else work(parsed)
