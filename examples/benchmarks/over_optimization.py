# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "../..", editable = true }
# ///
"""
Compares finished runs of `tdpo_r.py`: how rewards that were not trained moved while the trained one rose. Prints, for each
of them, its value at the highest trained reward that all runs reached, and draws all curves.

    for method in ddpo tdpo tdpo_r; do for seed in 42 43 44; do
        python examples/tdpo_r.py --method $method --seed $seed --output_dir outputs/$method-$seed
    done; done
    python examples/benchmarks/over_optimization.py --runs outputs/*-4?
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from flow_trl import metrics
from flow_trl.callbacks import cross_reward_figure


@dataclass
class Arguments:
    """
    Arguments of the comparison.

    Args:
        runs (`list[str]`):
            Output folders, named `<method>-<seed>`.
        output_dir (`str`, *optional*, defaults to `"outputs"`):
            Where the figure is written.
        matched_score (`float`, *optional*):
            Trained reward at which runs are compared. If not set, the highest that all runs reached.
    """

    runs: list[str] = field(metadata={"help": "Output folders, named <method>-<seed>."})
    output_dir: str = field(default="outputs", metadata={"help": "Where the figure is written."})
    matched_score: float | None = field(default=None, metadata={"help": "Trained reward at which runs are compared."})


def main(arguments: Arguments) -> None:
    histories = {
        Path(run).name: json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
        for run in arguments.runs
    }
    evaluations = {run: [entry for entry in history if "eval_reward" in entry] for run, history in histories.items()}
    first = next(iter(evaluations.values()))[0]
    prefix = "eval_over_optimization/"
    names = [key.removeprefix(prefix) for key in first if key.startswith(prefix)]
    rows = [(run, entry) for run, entries in evaluations.items() for entry in entries]
    metric = metrics.load("cross_reward_generalization")
    results = metric.compute(
        methods=[run.rpartition("-")[0] for run, _ in rows],
        runs=[run for run, _ in rows],
        in_domain=[entry["eval_reward"] for _, entry in rows],
        out_of_domain=[[entry[f"eval_rewards/{name}/mean"] for name in names] for _, entry in rows],
        reward_names=names,
        matched_score=arguments.matched_score,
    )
    print(f"Trained reward at which runs are compared: {results['matched_score']:.4f}\n")
    print(
        "| method | trained reward at the end | "
        + " | ".join(f"{name}, change, rank correlation" for name in names)
        + " |"
    )
    print("| --- " * (2 + len(names)) + "|")
    for method in dict.fromkeys(run.rpartition("-")[0] for run in evaluations):
        last = [entries[-1]["eval_reward"] for run, entries in evaluations.items() if run.rpartition("-")[0] == method]
        cells = [method, ", ".join(f"{value:.3f}" for value in last)]
        for name in names:
            value = {key: math.nan if found is None else found for key, found in results[name][method].items()}
            cells.append(
                f"{value['value_at_matched']:.3f} ± {value['value_at_matched_se']:.3f}, "
                f"{value['change_from_start']:+.3f} ± {value['change_from_start_se']:.3f}, "
                f"{value['rank_correlation']:+.2f}"
            )
        print("| " + " | ".join(cells) + " |")
    path = Path(arguments.output_dir) / "over_optimization.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list] = {}
    for run, history in histories.items():
        curves.setdefault(run.rpartition("-")[0], []).append(history)
    cross_reward_figure(curves, names).savefig(path, dpi=120)
    print(f"\n{path}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
