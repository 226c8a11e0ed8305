# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Over-optimisation, studied as in https://huggingface.co/papers/2210.10760: the *gold* reward is exact, the *proxy* is learnt
from few noisy labels of it, and training on the proxy makes gold rise, then fall. DDPO, TDPO and TDPO-R with each kind of
reset, in the tiny world.

The rewards are those of `flow_trl.tiny.proxy`. Each seed has labels, and so a proxy, of its own; all methods share them.

Settings are those of `examples/tdpo_r.py`. All were chosen with DDPO (seed 1) alone; the other methods take them over. The critic is
reset every 5 generations, not 10, for gold turns after about 10.

Each finished run is a JSON file in `--results`; what is there is not run again, so the study can be stopped at any time. One
process per core:

    OMP_NUM_THREADS=1 python examples/benchmarks/gold_and_proxy.py --worker 0 --num_workers 1
    python examples/benchmarks/gold_and_proxy.py --table
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
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import HfArgumentParser

from flow_trl import DDPOConfig, DDPOTrainer, TDPORConfig, TDPORTrainer, tiny
from flow_trl.tiny.proxy import Proxy, gold


@dataclass
class Arguments:
    """
    Arguments of the study.

    Args:
        results (`str`, *optional*, defaults to `"examples/benchmarks/gold_and_proxy"`):
            Folder of the results of single runs.
        worker, num_workers (`int`, *optional*):
            This process takes every `num_workers`-th run, from `worker` on.
        table (`bool`, *optional*, defaults to `False`):
            Whether to tabulate and draw what is there, and run nothing.
        output_dir (`str`, *optional*, defaults to `"outputs/gold_and_proxy"`):
            Folder of the figure.
    """

    results: str = field(default="examples/benchmarks/gold_and_proxy", metadata={"help": "Folder of the results."})
    worker: int = field(default=0, metadata={"help": "Number of this process."})
    num_workers: int = field(default=1, metadata={"help": "Number of processes."})
    table: bool = field(default=False, metadata={"help": "Whether to tabulate what is there, and run nothing."})
    output_dir: str = field(default="outputs/gold_and_proxy", metadata={"help": "Folder of the figure."})


METHODS = {
    "DDPO": {},
    "TDPO": {"reset_neurons": "none"},
    "TDPO-R, active": {"reset_neurons": "active"},
    "TDPO-R, dormant": {"reset_neurons": "dormant"},
    "TDPO-R, all": {"reset_neurons": "all"},
}
SEEDS = [42, 43, 44, 45, 46]
NUM_PROMPTS, STEPS = 16, 5
GENERATIONS, EVAL_EVERY = 24, 2
COMMON = {
    "num_inference_steps": STEPS,
    "eval_num_inference_steps": STEPS,
    "guidance_scale": 1.0,
    "num_generations": 8,
    "generation_batch_size": 128,
    "per_device_rollout_batch_size": 128,
    "per_device_eval_batch_size": 200,
    "learning_rate": 8e-3,
    "epsilon": 5e-3,
    "per_prompt_stat_tracking_min_count": 8,
    "out_of_domain_rewards": ["gold"],
    "overlap_rewards": False,  # so that a run is one thread
    "num_images_to_save": 0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
DDPO = {"per_device_train_batch_size": 16, "updates_per_generation": 8}
TDPO = {"per_device_train_batch_size": 32, "updates_per_generation": 2, "critic_learning_rate": 3e-3, "reset_every": 5}


def run(method: str, seed: int) -> dict:
    """Trains once; returns the learning curve."""
    started = time.process_time()
    proxy, is_ddpo = Proxy(seed, num_inference_steps=STEPS), method.startswith("DDPO")
    updates_per_generation = DDPO["updates_per_generation"] if is_ddpo else TDPO["updates_per_generation"] * STEPS
    with tempfile.TemporaryDirectory() as folder:
        args = (DDPOConfig if is_ddpo else TDPORConfig)(
            folder,
            **COMMON,
            **(DDPO if is_ddpo else TDPO),
            **METHODS[method],
            seed=seed,
            max_steps=GENERATIONS * updates_per_generation,
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=EVAL_EVERY * updates_per_generation,
        )
        trainer = (DDPOTrainer if is_ddpo else TDPORTrainer)(
            model=tiny.load_diffusion_pipeline(),
            reward_funcs=[proxy, gold],
            args=args,
            train_dataset=tiny.load_prompts("scenes", "train").select(range(NUM_PROMPTS)),
            eval_dataset=tiny.load_prompts("scenes", "test").select(range(200)),
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            ),
        )
        trainer.train()
    history = trainer.state.log_history
    evaluations = {entry["step"]: entry for entry in history if "eval_reward" in entry}
    of_critic = ("explained_variance", "reset_share")
    return {
        "method": method,
        "seed": seed,
        "correlation": proxy.correlation,
        "generations": [step / updates_per_generation for step in evaluations],
        **{name: [entry[f"eval_rewards/{name}/mean"] for entry in evaluations.values()] for name in ("proxy", "gold")},
        **{name: [entry[f"critic/{name}"] for entry in history if f"critic/{name}" in entry] for name in of_critic},
        "seconds": time.process_time() - started,
    }


def path_of(folder: str, method: str, seed: int) -> Path:
    return Path(folder) / f"{method.lower().replace(', ', '_').replace(' ', '_')}-{seed}.json"


def work(arguments: Arguments) -> None:
    Path(arguments.results).mkdir(parents=True, exist_ok=True)
    jobs = [(method, seed) for seed in SEEDS for method in METHODS]
    for method, seed in jobs[arguments.worker :: arguments.num_workers]:
        path = path_of(arguments.results, method, seed)
        if path.exists():
            continue
        result = run(method, seed)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".part"), path)
        for name in ("proxy", "gold"):
            print(f"{path.stem}: {name} {' '.join(f'{value:.3f}' for value in result[name])}", flush=True)


# What came of it


def summary(run: dict, matched: float) -> dict[str, float]:
    """What is tabulated of a run."""
    proxy, exact = np.array(run["proxy"]), np.array(run["gold"])
    after = max(int(np.argmax(proxy >= matched)), 1)  # the first evaluation that is there
    peak = int(exact.argmax())
    return {
        "gold at the matched proxy": float(
            np.interp(matched, proxy[after - 1 : after + 1], exact[after - 1 : after + 1])
        ),
        "peak of gold": float(exact[peak]),
        "its generation": float(run["generations"][peak]),
        "its proxy": float(proxy[peak]),
        "gold at the end": float(exact[-1]),
        "proxy at the end": float(proxy[-1]),
    }


def mean_and_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def tabulate(arguments: Arguments) -> None:
    of_seed = defaultdict(dict)
    for path in sorted(Path(arguments.results).glob("*.json")):
        result = json.loads(path.read_text())
        of_seed[result["seed"]][result["method"]] = result
    # Proxies of two seeds are two rewards, so that a match is of the runs of one seed.
    complete = {seed: runs for seed, runs in of_seed.items() if len(runs) == len(METHODS)}
    if not complete:
        raise SystemExit(f"No seed has all methods in {arguments.results} yet.")
    rows = {}
    for seed, runs in complete.items():
        matched = min(max(run["proxy"]) for run in runs.values())
        rows[seed] = {method: summary(runs[method], matched) for method in METHODS}
        start = runs["DDPO"]
        print(
            f"Seed {seed}: correlation of proxy and gold before training {start['correlation']:.2f}, gold before "
            f"{start['gold'][0]:.2f}, matched proxy {matched:.2f}"
        )
    columns = list(rows[min(rows)]["DDPO"])
    print(f"\nHeld out, mean ± standard error over the seeds {', '.join(map(str, rows))}\n")
    print("| method | seconds | " + " | ".join(columns) + " |\n" + "| --- " * (2 + len(columns)) + "|")
    for method in METHODS:
        seconds = statistics.median(runs[method]["seconds"] for runs in complete.values())
        cells = [mean_and_error([row[method][column] for row in rows.values()]) for column in columns]
        print(f"| {method} | {seconds:.0f} | " + " | ".join(cells) + " |")
    for base in ("DDPO", "TDPO"):
        print(f"\nMinus {base}, seed by seed\n")
        print("| method | " + " | ".join(columns) + " |\n" + "| --- " * (1 + len(columns)) + "|")
        for method in METHODS:
            if method not in ("DDPO", base):
                cells = [
                    mean_and_error([row[method][column] - row[base][column] for row in rows.values()])
                    for column in columns
                ]
                print(f"| {method} | " + " | ".join(cells) + " |")
    draw(complete, Path(arguments.output_dir))


def draw(of_seed: dict[int, dict[str, dict]], folder: Path) -> None:
    """Gold against proxy, and both against generations: thin lines are seeds, thick ones means at equal generations."""
    questions = {
        "Does gold fall as the proxy rises?": ("proxy", "gold"),
        "How fast does the proxy rise?": ("generations", "proxy"),
        "When does gold turn?": ("generations", "gold"),
    }
    labels = {
        "proxy": "proxy (standard deviations)",
        "gold": "gold (minus percentage points)",
        "generations": "generations",
    }
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for panel, (question, (x, y)) in zip(figure.subplots(1, len(questions)), questions.items(), strict=True):
        for number, method in enumerate(METHODS):
            curves = [(runs[method][x], runs[method][y]) for runs in of_seed.values()]
            for curve in curves:
                panel.plot(*curve, color=f"C{number}", lw=0.7, alpha=0.35)
            panel.plot(
                *np.mean(curves, 0), color=f"C{number}", lw=2, marker="o", ms=3, label=f"{method} ({len(curves)})"
            )
        panel.set_title(question, fontsize=10)
        panel.set_xlabel(labels[x])
        panel.set_ylabel(f"held out: {labels[y]}")
        panel.grid(alpha=0.3)
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(METHODS), title="method (seeds)", fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gold_and_proxy.png", dpi=120)
    print(f"\n{folder / 'gold_and_proxy.png'}")


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tabulate(parsed) if parsed.table else work(parsed)
