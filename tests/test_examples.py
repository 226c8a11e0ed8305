import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from flow_trl.tiny import load_diffusion_pipeline, load_flow_pipeline, load_language_model
from flow_trl.tiny.edits import load_edits


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as `python` does, but in this process, where everything is imported; returns what it prints."""

    def run_script(script, *arguments):
        path = str(EXAMPLES / script)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [path, *arguments])
            patch.syspath_prepend(Path(path).parent)
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("scenes", "control_variate"),
        pytest.param("scenes", "tp_grpo", marks=pytest.mark.slow),
        ("scenes", "flow_grpo"),
        ("words", "control_variate"),
    ],
)
def test_tp_grpo(run, tmp_path, task, method):
    if task == "words":
        pytest.importorskip("rapidocr_onnxruntime")
    small = ["--max_steps", "2", "--eval_size", "10", "--generation_batch_size", "16", "--num_generations", "8"]
    small += ["--per_device_train_batch_size", "8", "--updates_per_generation", "2", "--eval_num_inference_steps", "2"]
    small += ["--logging_steps", "1"]
    output = run("tp_grpo.py", "--task", task, "--method", method, "--output_dir", str(tmp_path), *small)
    names = {"scenes": ["clip_score", "scene", "scene_strict"], "words": ["ocr"]}[task]
    table = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == names
    assert len(output.splitlines()) < 40 and "{'" not in output
    for _, before, after, change, _ in table[2:]:
        assert float(after) - float(before) == pytest.approx(float(change), abs=2e-3)
    assert Image.open(tmp_path / "images" / "eval-000002.png").size == (8 * 32, 2 * 32)
    for name in ("before_after.png", "learning_curve.png"):
        assert Image.open(tmp_path / name).width > 500
    card = ModelCard.load(tmp_path / "README.md")
    assert "load_flow_pipeline()" in card.text and card.data.base_model is None
    assert card.data.license == "apache-2.0" and {result.metric_type for result in card.data.eval_results} > set(names)
    credit = {"control_variate": "control_variate", "tp_grpo": "consistent"}.get(method)
    assert ("| credit |" in card.text) == (credit is not None)
    assert credit is None or f"| credit | {credit} |" in card.text
    load_flow_pipeline().load_lora_weights(tmp_path)


def test_tdpo_r_and_its_comparison(run, tmp_path):
    small = ["--eval_size", "8", "--generation_batch_size", "16", "--per_device_train_batch_size", "8"]
    small += ["--num_inference_steps", "2", "--eval_num_inference_steps", "2", "--max_steps", "4", "--eval_steps", "2"]
    small += ["--logging_steps", "1"]
    for method in ("tdpo_r", "tdpo", "ddpo"):
        folder = tmp_path / f"{method}-42"
        updates = ["--updates_per_generation", "2" if method == "ddpo" else "1"]
        rows = rows_of(run("tdpo_r.py", "--method", method, "--output_dir", str(folder), *small, *updates))
        names = ["proxy", "gold"]
        assert [name for name in rows if name != "reward" and not name.startswith("-")] == names
        for name in names:
            before, after, change, _ = map(float, rows[name])
            assert after - before == pytest.approx(change, abs=2e-3)
        for name in ("before_after.png", "learning_curve.png", "over_optimization.png"):
            assert Image.open(folder / name).width > 500
        assert (folder / "critic.safetensors").is_file() == (method != "ddpo")
        card = ModelCard.load(folder / "README.md").text
        assert "load_diffusion_pipeline()" in card and ("2305.13301" in card) == (method == "ddpo")
        assert ("| reset_neurons | none |" in card) == (method == "tdpo")
        load_diffusion_pipeline().load_lora_weights(folder)
    folders = [str(tmp_path / f"{method}-42") for method in ("ddpo", "tdpo", "tdpo_r")]
    matched = ["--matched_score", "-99"]  # below all, so that no run may have started there
    for arguments in ([], matched):
        output = run("benchmarks/over_optimization.py", "--runs", *folders, "--output_dir", str(tmp_path), *arguments)
        rows = rows_of(output)
        assert list(rows)[-3:] == ["ddpo", "tdpo", "tdpo_r"]
        assert all(len(rows[method]) == 2 for method in ("ddpo", "tdpo", "tdpo_r"))
    assert "nan" in rows["ddpo"][1]
    assert Image.open(tmp_path / "over_optimization.png").width > 500


@pytest.mark.slow
def test_critic_inputs_benchmark(run):
    output = run("benchmarks/critic_inputs.py", "--num_images", "4", "--num_inference_steps", "2", "--repeats", "1")
    rows = rows_of(output)
    assert rows["paper's order"][1] == "1.00" and float(rows["flow_trl"][1]) > 1
    differences = [float(line.split(": ")[1].split()[0]) for line in output.splitlines() if "difference" in line]
    assert len(differences) == 2 and max(differences) < 3e-4


def rows_of(output):
    """Rows of the tables in an output, without their heads: first cell to the others."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


SMALL = ["--max_steps", "2", "--eval_size", "8", "--eval_samples", "4", "--num_generations", "4"]
SMALL += ["--per_device_train_batch_size", "16", "--warmup_steps", "0", "--learning_rate", "1e-3"]


@pytest.mark.parametrize("method", ["blockwise", "dcpo", "rlcr"])
def test_blockwise_grpo(run, tmp_path, method):
    output = run("blockwise_grpo.py", "--method", method, "--output_dir", str(tmp_path), *SMALL)
    rows = rows_of(output)
    results = json.loads((tmp_path / "results.json").read_text())
    for result in results.values():  # NaN, such as the AUROC of right answers alone, is null in JSON
        result.update({key: math.nan for key, value in result.items() if value is None})
    for when in ("before", "after"):
        expected = [
            f"{results[when][key]:.3f} ± {results[when][f'{key}_se']:.3f}"
            for key in ("accuracy", "auroc", "ece", "brier")
        ]
        assert rows[when] == [*expected, f"{results[when]['format']:.3f}", f"{results[when]['unparsable']:.3f}"]
    assert results["before"]["ece"] != results["after"]["ece"]
    assert rows["majority"] == [f"{results['after']['majority']:.3f} ± {results['after']['majority_se']:.3f}"]
    assert Image.open(tmp_path / "reliability_diagram.png").width > 500
    load_language_model(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert ("2602.10231" in card.text) == (method != "rlcr")
    if method != "rlcr":
        name = {"blockwise": "bce_reward", "dcpo": "dcpo_reward"}[method]
        assert f"| confidence | `<analysis>`, `<confidence>` | {name} (1) |" in card.text
    if method == "blockwise":
        after = results["after"]
        assert "| bce_reward (1) | correctness_reward |" in card.text
        assert f"| accuracy | {results['before']['accuracy']:.4f} ± " in card.text and "## Task" in card.text
        assert f"{sum(after['bins']['count'])} of 32 completions had a confidence" in card.text
        assert "![Reliability diagram](reliability_diagram.png)" in card.text
        measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert measured["ece"] == after["ece"] and {"accuracy", "brier"} <= measured.keys()
        assert (
            not {"num_completions", "num_confidences"} & measured.keys() and "| charge_missing | True |" in card.text
        )


def test_a_method_with_a_score_of_its_own_takes_no_other(run, tmp_path):
    with pytest.raises(ValueError, match="`--score brier`: `--method dcpo` has a score of its own"):
        run("blockwise_grpo.py", "--method", "dcpo", "--score", "brier", "--output_dir", str(tmp_path), *SMALL)


@pytest.mark.parametrize("method", ["group", pytest.param("grpo", marks=pytest.mark.slow)])
def test_blockwise_two_attempts(run, tmp_path, method):
    rows = rows_of(run("blockwise_two_attempts.py", "--method", method, "--output_dir", str(tmp_path), *SMALL))
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        rows["after"][1] == f"{results['after']['second_accuracy']:.3f} ± {results['after']['second_accuracy_se']:.3f}"
    )


@pytest.mark.parametrize(
    "script, names",
    [
        ("tp_grpo.py", ["--model_name_or_path", "--lora_rank", "--credit", "--sde_window_size", "--learning_rate"]),
        (
            "tdpo_r.py",
            ["--method", "--reset_neurons", "--critic_encoder", "--out_of_domain_rewards", "--stop_after_fall"],
        ),
        (
            "blockwise_grpo.py",
            ["--model_name_or_path", "--method", "--baseline", "--num_generations", "--learning_rate"],
        ),
    ],
)
def test_help_lists_the_arguments_of_the_script_and_its_trainer(run, capsys, script, names):
    with pytest.raises(SystemExit, check=lambda ending: ending.code == 0):
        run(script, "--help")
    output = capsys.readouterr().out
    for name in names:
        assert name in output
    assert "--adam_beta1" not in output and "--help-all" in output


def test_quickstart_notebook(tmp_path):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    stored = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    pictures = [
        output for cell in stored.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    book = nbformat.v4.new_notebook(cells=[cell for cell in stored.cells if cell.cell_type == "code"])
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(pictures) == 5
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "update  reward       held out  change" in text and "| scene " in text
    bars = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert not any("Training" in bar or "Sampling" in bar for bar in bars)  # none is left
    assert (tmp_path / "outputs/quickstart/README.md").is_file()


@pytest.mark.slow
def test_blockwise_step_benchmark(run):
    rows = rows_of(run("benchmarks/blockwise_step.py", "--num_completions", "16", "--steps", "2", "--turns", "1"))
    assert rows["GRPOTrainer"][1] == "1.000" and float(rows["BlockwiseGRPOTrainer"][1]) > 0


@pytest.mark.slow
def test_baseline_fidelity_benchmark(run, tmp_path):
    arguments = ["--num_prompts", "4", "--num_generations", "4", "--num_continuations", "4"]
    rows = rows_of(run("benchmarks/baseline_fidelity.py", *arguments, "--output_dir", str(tmp_path)))
    assert {"outcome", "group", "batch", "none"} < set(rows)
    assert float(rows["none"][0]) > float(rows["Monte Carlo itself"][0]) > 0
    assert Image.open(tmp_path / "baseline_fidelity.png").width > 500


@pytest.mark.slow
def test_rollout_benchmark(run):
    output = run("benchmarks/rollout.py", "--num_images", "4", "--num_generations", "2", "--repeats", "1")
    rows = {cells[1].strip(): cells[2:] for line in output.splitlines() if len(cells := line.split("|")) == 9}
    assert [float(rows[name][0]) for name in ("sequential", "wavefront", "wavefront, stride 2")] == [64, 55, 30]
    assert [int(rows[name][1]) for name in ("sequential", "wavefront")] == [64, 10]
    # By rounding alone, with which the size of a batch has to do on some machines
    assert float(re.search("largest difference of a final latent ([^,]+),", output).group(1)) < 1e-5
    assert "| 1 | 100.0% |" in output


@pytest.mark.slow
def test_generation_memory_benchmark(run):
    output = run("benchmarks/generation_memory.py", "--sizes", "16")
    scored, seconds, peak, held, kept = map(float, rows_of(output)["16"])
    assert scored == 16 * 6 and seconds > 0 and peak > held > 0 and kept < 1
    counted = output.split("in GB:\n\n")[1]
    assert counted in (EXAMPLES / "benchmarks/generation_memory.py").read_text()


def test_edit_grpo(run, monkeypatch, tmp_path):
    few = {split: load_edits(split).select(range(16)) for split in ("train", "test")}
    monkeypatch.setattr("flow_trl.tiny.edits.load_edits", few.get)
    small = ["--max_steps", "2", "--eval_steps", "2", "--generation_batch_size", "16", "--num_generations", "8"]
    small += ["--per_device_train_batch_size", "8", "--num_inference_steps", "3", "--eval_num_inference_steps", "1"]
    small += ["--logging_steps", "1"]
    rows = rows_of(run("edit_grpo.py", "--output_dir", str(tmp_path), *small))
    assert {"edit", "edit_strict"} <= rows.keys()
    grid = Image.open(tmp_path / "images" / "eval-000002.png")
    assert grid.size == (8 * 32, 4 * 32)  # 16 pairs of an input and its result
    assert grid.crop((0, 0, 32, 32)).convert("RGB").tobytes() == few["test"][0]["image"].tobytes()
    load_flow_pipeline().load_lora_weights(tmp_path)


@pytest.mark.slow
def test_chaos(run):
    """Signals at random times in one and two processes; the short form of it is in `test_preemption.py`."""
    output = run("benchmarks/chaos.py", "--signals", "2", "--methods", "tp_grpo")
    rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| tp_grpo")]
    assert len(rows) == 6 and all(row[4].strip() == row[5].strip() for row in rows)
