"""The script that compares a LoRA with its base, on LoRAs of several formats."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard, metadata_update
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from flow_trl.prompts import evaluation_prompts, load_prompts
from flow_trl.tiny import DIFFUSION_FOLDER, load_diffusion_pipeline, load_flow_pipeline
from tests.hub_server import Repo


SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "evaluate_lora.py")))
SMALL = {"num_prompts": 6, "batch_size": 4, "pipeline_kwargs": '{"num_inference_steps": 2, "guidance_scale": 1.0}'}


def lora_of(denoiser, **options):
    torch.manual_seed(0)
    targets = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    denoiser.add_adapter(LoraConfig(**targets | options))
    return get_peft_model_state_dict(denoiser)


@pytest.fixture(scope="module")
def flow_lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a-lora")
    StableDiffusion3Pipeline.save_lora_weights(folder, lora_of(load_flow_pipeline().transformer))
    return folder


def compare(folder, **options):
    SCRIPT.main(SCRIPT.Arguments(output_dir=str(folder), **SMALL | options))
    return json.loads((folder / "results.json").read_text())


def test_a_lora_beside_its_base(flow_lora, tmp_path, capsys, hub):
    kwargs = '{"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 0}'
    results = compare(tmp_path, lora=str(flow_lora), images_per_prompt=2, pipeline_kwargs=kwargs)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}
    assert shown.keys() == results["metrics"].keys() > {"scene", "scene_strict"}
    scene = results["metrics"]["scene"]
    assert scene["num_images"] == 12 and results["num_prompts"] == 6
    assert scene["difference"] == pytest.approx(scene["lora"] - scene["base"]) != 0
    assert shown["scene"][2] == f"{scene['difference']:.4f} ± {scene['difference_se']:.4f}"
    assert 0 < scene["better"] + scene["worse"] <= 1
    kinds = [name for name in results["metrics"] if name.startswith("scene (")]
    assert sum(results["metrics"][name]["num_images"] for name in kinds) == 12
    assert str(flow_lora) not in json.dumps(results) and Image.open(tmp_path / "base_and_lora.png").width > 500

    # Its content goes into a card.
    hub.repos["me/a-lora"] = Repo({"README.md": b"---\ntags:\n- lora\n---\n# A LoRA\n"})
    metadata_update("me/a-lora", {"model-index": results["model-index"]})
    found = {result.metric_name: result for result in ModelCard.load("me/a-lora").data.eval_results}
    assert found["scene"].metric_value == scene["lora"] and found["scene"].dataset_name == "scenes"
    assert found["scene"].metric_args == {"standard_error": scene["lora_se"]}


def test_a_kohya_lora_is_the_diffusers_lora(tmp_path):
    weights = lora_of(load_diffusion_pipeline().unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "diffusers", weights)
    kohya, sides = {}, {"lora_A": "lora_down", "lora_B": "lora_up"}
    for name, weight in weights.items():
        module, kind = name.removesuffix(".weight").rsplit(".", 1)
        module = f"lora_unet_{module.replace('.', '_')}"
        kohya[f"{module}.{sides[kind]}.weight"] = weight.contiguous()
        kohya[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"a photo of {n} circles\n" for n in ("two", "three", "red", "blue"))
    )
    options = {"base": str(DIFFUSION_FOLDER), "metrics": ["flow_trl.rewards.jpeg.jpeg_compressibility"]}
    options["prompts"] = str(tmp_path / "prompts.txt")
    both = [
        compare(tmp_path / f"of {name}", lora=str(tmp_path / name), **options)
        for name in ("diffusers", "kohya.safetensors")
    ]
    first, second = (results["metrics"]["jpeg_compressibility"] for results in both)
    assert first == pytest.approx(second) and first["difference"] != 0 and first["num_images"] == 4
    assert both[1]["lora"] == "kohya.safetensors" and both[1]["prompts"] == "prompts.txt"


def test_it_goes_on_with_the_images_that_are_there(flow_lora, tmp_path):
    options = {"lora": str(flow_lora), "metrics": ["flow_trl.rewards.jpeg.jpeg_compressibility"]}
    first = compare(tmp_path, **options)["metrics"]["jpeg_compressibility"]
    (tmp_path / "images" / "LoRA" / "00003.png").unlink()
    kept = tmp_path / "images" / "base" / "00001.png"
    Image.new("RGB", (32, 32)).save(kept)  # which is not made again
    changed = kept.stat().st_mtime_ns
    options["metrics"] = ["jpeg_incompressibility"]
    again = compare(tmp_path, **options)["metrics"]["jpeg_incompressibility"]
    assert again["lora"] == pytest.approx(-first["lora"]) and again["base"] < -first["base"]
    assert kept.stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="`seed=1`, but the images in .* were made with 0"):
        compare(tmp_path, seed=1, **options)
    other = tmp_path / "prompts.txt"
    other.write_text("a photo of two circles\n")
    with pytest.raises(ValueError, match="`digest of prompts=.*, but the images in"):
        compare(tmp_path, prompts=str(other), **options)
    # Trained on, in the same folder
    weights = load_file(flow_lora / "pytorch_lora_weights.safetensors")
    folder = tmp_path / flow_lora.name
    for factor in (1.0, 2.0):
        folder.mkdir(exist_ok=True)
        save_file(
            {name: factor * weight for name, weight in weights.items()}, folder / "pytorch_lora_weights.safetensors"
        )
        if factor == 1.0:
            compare(tmp_path, **options | {"lora": str(folder)})
    with pytest.raises(ValueError, match="`digest of lora=.*, but the images in"):
        compare(tmp_path, **options | {"lora": str(folder)})


def test_both_are_made_of_the_same_noise(flow_lora, tmp_path):
    weights = load_file(flow_lora / "pytorch_lora_weights.safetensors")
    save_file({name: 1e-6 * weight for name, weight in weights.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    metrics = ["flow_trl.rewards.jpeg.jpeg_compressibility"]
    found = compare(tmp_path / "results", lora=str(tmp_path), metrics=metrics)["metrics"]["jpeg_compressibility"]
    assert found["difference"] == 0 and found["base_se"] > 0
    with pytest.raises(ValueError, match="The metric `ocr` applies to none of the images"):
        compare(tmp_path / "results", lora=str(tmp_path), metrics=["ocr"])


def test_images_to_which_a_metric_does_not_apply_are_left_out():
    nan, prompts = math.nan, ["a", "a", "b", "b", "c"]
    base, lora = [1.0, 2.0, nan, 4.0, 0.0], [2.0, 2.0, 1.0, 3.0, 5.0]
    found = SCRIPT.compare(base, lora, prompts)
    differences = np.array([1.0, 0.0, -1.0, 5.0])
    assert (found["num_images"], found["better"], found["worse"]) == (4, 0.5, 0.25)
    assert found["difference"] == differences.mean()
    by_prompt = np.array([1.0 - 2 * 1.25, -1 - 1.25, 5 - 1.25])  # sums of deviations
    assert found["difference_se"] == pytest.approx(np.sqrt(3 / 2 * (by_prompt**2).sum()) / 4)
    assert SCRIPT.compare([nan], [1.0], ["a"]) == {}


def test_all_rows_of_a_file_are_for_evaluation(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree")
    assert set(evaluation_prompts(str(tmp_path / "prompts.txt"))["prompt"]) == {"one", "two", "three"}
    assert len(evaluation_prompts(str(tmp_path / "prompts.txt"), 2)) == 2
    assert set(evaluation_prompts("ocr", 3).column_names) == {"prompt", "text"}
    trained, held_out = load_prompts("ocr")
    assert set(evaluation_prompts("ocr")["prompt"]) == set(held_out["prompt"]) != set(trained["prompt"])


def test_bad_input(flow_lora, tmp_path):
    for options, message in (
        ({"num_prompts": 0}, "`num_prompts=0`"),
        ({"pipeline_kwargs": "height=512"}, "`pipeline_kwargs='height=512'` is no JSON"),
        ({"metrics": ["fid"]}, "`reward` is 'fid', which is no built-in reward"),
        ({"prompts": "absent.txt"}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path, lora=str(flow_lora), **options)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, lora_of(load_flow_pipeline().transformer, init_lora_weights=True)
    )
    with pytest.raises(ValueError, match="changes nothing in StableDiffusion3Pipeline: it has .* layers, all zero"):
        compare(tmp_path / "zero", lora=str(tmp_path))
    save_file({"nothing.lora_A.weight": torch.ones(1, 1)}, tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="nothing"):
        compare(tmp_path / "nothing", lora=str(tmp_path / "nothing.safetensors"))
