import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from flow_trl.tiny import load_flow_pipeline


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("task", ["scenes", "words"])
def test_tp_grpo(tmp_path, task):
    if task == "words":
        pytest.importorskip("rapidocr_onnxruntime")
    small = ["--max_steps", "2", "--eval_size", "10", "--generation_batch_size", "16", "--num_generations", "8"]
    small += ["--per_device_train_batch_size", "8", "--updates_per_generation", "2", "--eval_num_inference_steps", "2"]
    output = run("tp_grpo.py", "--task", task, "--output_dir", str(tmp_path), *small)
    names = {"scenes": ["scene", "scene_strict"], "words": ["ocr"]}[task]
    table = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == names
    for _, before, after, change, _ in table[2:]:
        assert float(after) - float(before) == pytest.approx(float(change), abs=2e-3)
    assert Image.open(tmp_path / "images" / "eval-000002.png").size == (8 * 32, 2 * 32)
    for name in ("before_after.png", "learning_curve.png"):
        assert Image.open(tmp_path / name).width > 500
    card = ModelCard.load(tmp_path / "README.md")
    assert "load_flow_pipeline()" in card.text and card.data.base_model is None
    load_flow_pipeline().load_lora_weights(tmp_path)


def test_help_lists_every_argument():
    output = run("tp_grpo.py", "--help")
    for name in ("--model_name_or_path", "--lora_rank", "--credit", "--sde_window_size", "--learning_rate"):
        assert name in output


def test_rollout_benchmark():
    output = run("benchmarks/rollout.py", "--num_images", "4", "--num_generations", "2", "--repeats", "1")
    rows = {cells[1].strip(): cells[2:] for line in output.splitlines() if len(cells := line.split("|")) == 9}
    assert [float(rows[name][0]) for name in ("sequential", "wavefront", "wavefront, stride 2")] == [64, 55, 30]
    assert [int(rows[name][1]) for name in ("sequential", "wavefront")] == [64, 10]
    assert "0 images differ" in output and "| 1 | 100.0% |" in output
