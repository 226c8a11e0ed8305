# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[ocr,plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Compares a pipeline with and without a LoRA on the same prompts and the same noise: a table with standard errors and paired
differences, a picture, and results for the `model-index` of the LoRA's card.

A LoRA of the tiny world, trained by examples/tp_grpo.py:

    python examples/evaluate_lora.py --lora outputs/control_variate_scenes

Any LoRA that diffusers loads, whatever trained it:

    python examples/evaluate_lora.py --base stabilityai/stable-diffusion-3.5-medium --lora user/lora \
        --prompts geneval --metrics geneval_strict pickscore \
        --pipeline_kwargs '{"num_inference_steps": 28, "guidance_scale": 4.5, "height": 512, "width": 512}'

Images are kept as they are made: started again with the same arguments it goes on, and other metrics cost no new images.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from tqdm.auto import tqdm
from trl import TrlParser

from flow_trl import tiny
from flow_trl.callbacks import save_before_and_after, save_captions, save_image_grid
from flow_trl.cards import Result, Table
from flow_trl.metrics import summarize
from flow_trl.prompts import load_prompts, split_prompts
from flow_trl.scoring import Scorer
from flow_trl.utils import sample_generator


TINY = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 0}


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        lora (`str`):
            Hub id, folder or file of the LoRA.
        base (`str`, *optional*):
            Hub id or folder of the pipeline that it belongs to. Defaults to the tiny world's flow-matching pipeline.
        prompts (`str`, *optional*):
            Held-out prompts, see [`~prompts.load_prompts`]. Defaults to the tiny world's scenes.
        metrics (`list[str]`, *optional*):
            Names or dotted paths of rewards, see [`flow_trl.rewards`]. Defaults to the tiny world's scene scores.
        num_prompts (`int`, *optional*, defaults to `200`):
            How many prompts are used at most.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt, of noise of their own; GenEval makes 4.
        batch_size (`int`, *optional*, defaults to `8`):
            Images made together.
        lora_scale (`float`, *optional*, defaults to `1.0`):
            Strength of the LoRA.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the pipeline's call, as JSON. Defaults to what the tiny world's pipeline was trained with.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the pipeline on a GPU; on the CPU it is float32.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluate_lora"`):
            Where images, picture and results go.
    """

    lora: str = field(metadata={"help": "Hub id, folder or file of the LoRA."})
    base: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the pipeline. Default: the tiny world's."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompt set, .txt or .json file, or Hub data set. Default: the tiny world's scenes."},
    )
    metrics: list[str] | None = field(default=None, metadata={"help": "Names or dotted paths of rewards."})
    num_prompts: int = field(default=200, metadata={"help": "How many prompts are used at most."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt."})
    batch_size: int = field(default=8, metadata={"help": "Images made together."})
    lora_scale: float = field(default=1.0, metadata={"help": "Strength of the LoRA."})
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the pipeline's call, as JSON."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Precision on a GPU; on the CPU it is float32."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    output_dir: str = field(default="outputs/evaluate_lora", metadata={"help": "Where images and results go."})

    def __post_init__(self):
        if isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`pipeline_kwargs={self.pipeline_kwargs!r}` is no JSON such as '{{\"height\": 512}}' ({error})."
                ) from error
        if self.pipeline_kwargs is None:
            self.pipeline_kwargs = TINY if self.base is None else {}
        for name in ("num_prompts", "images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}`: it must be at least 1.")


def load_pipeline(arguments: ScriptArguments) -> DiffusionPipeline:
    if arguments.base is None:
        return tiny.load_flow_pipeline()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, arguments.dtype)
    return DiffusionPipeline.from_pretrained(arguments.base, torch_dtype=dtype).to(device)


def load_data(arguments: ScriptArguments) -> Dataset:
    """One row for each image."""
    if arguments.prompts is not None:
        data = load_prompts(arguments.prompts, arguments.num_prompts)[1]
    else:
        splits = {split: tiny.load_prompts("scenes", split) for split in ("train", "test")}
        data = split_prompts(splits, arguments.num_prompts)[1]
    return data.select([row for row in range(len(data)) for _ in range(arguments.images_per_prompt)])


def add_lora(pipe: DiffusionPipeline, arguments: ScriptArguments) -> None:
    """Puts the LoRA into the pipeline; refuses one that has nothing for it."""
    pipe.load_lora_weights(arguments.lora, adapter_name="lora")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [weight for part in parts for name, weight in part.named_parameters() if ".lora_B." in name]
    if not any(weight.any() for weight in weights):
        found = f"{len(weights)} layers, all of them zero" if weights else "no layer"
        raise ValueError(f"`lora={arguments.lora!r}` changes nothing in {type(pipe).__name__}: it has {found} for it.")
    pipe.set_adapters("lora", arguments.lora_scale)


def keep_settings(arguments: ScriptArguments) -> None:
    """Refuses a folder with images of other settings."""
    settings = {
        name: value for name, value in asdict(arguments).items() if name not in ("metrics", "batch_size", "output_dir")
    }
    path = Path(arguments.output_dir, "settings.json")
    kept = json.loads(path.read_text()) if path.is_file() else settings
    for name, value in settings.items():
        if kept[name] != value:
            raise ValueError(
                f"`{name}={value!r}`, but the images in `output_dir={arguments.output_dir!r}` were made with {kept[name]!r}: "
                "choose another folder, or delete it."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2))


@torch.no_grad()
def sample(pipe: DiffusionPipeline, prompts: list[str], folder: Path, arguments: ScriptArguments) -> list[Image.Image]:
    """One image of each prompt, of noise that depends on its number alone; what is there already is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row:05d}.png" for row in range(len(prompts))]
    missing = [row for row, path in enumerate(paths) if not path.is_file()]
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc=folder.name, unit="image") as progress:
        for start in range(0, len(missing), arguments.batch_size):
            rows = missing[start : start + arguments.batch_size]
            generators = [sample_generator("evaluate_lora", arguments.seed, row) for row in rows]
            images = pipe(
                prompt=[prompts[row] for row in rows], generator=generators, **arguments.pipeline_kwargs
            ).images
            for row, image in zip(rows, images, strict=True):
                partial = paths[row].with_suffix(".part")
                image.save(partial, format="PNG")
                partial.replace(paths[row])
            progress.update(len(rows))
    return [Image.open(path).convert("RGB") for path in paths]


def compare(base: torch.Tensor, lora: torch.Tensor, prompts: list[str]) -> dict[str, float | None]:
    """Means where a metric applies to both, that of the paired difference, and how often either is better."""
    rows = (~(base.isnan() | lora.isnan())).nonzero().flatten().tolist()
    values = {"base": base.double(), "lora": lora.double(), "difference": lora.double() - base.double()}
    result: dict[str, float | None] = {"num_images": len(rows)}
    for name, of_images in values.items():
        result |= summarize(name, of_images[rows].tolist(), [prompts[row] for row in rows])
    difference = values["difference"][rows]
    return result | {
        "better": (difference > 0).double().mean().item(),
        "worse": (difference < 0).double().mean().item(),
    }


def main() -> None:
    (arguments,) = TrlParser(ScriptArguments).parse_args_and_config()
    folder, dataset = Path(arguments.output_dir), load_data(arguments)
    if arguments.metrics is None and arguments.prompts is not None:
        raise ValueError(
            "`--metrics` is missing: name the rewards that suit `--prompts`, such as `--metrics pickscore clip_score`."
        )
    scorer = Scorer(arguments.metrics or [tiny.scene_reward(), tiny.scene_reward(strict=True)])
    scorer.check(arguments.prompts or "scenes", [name for name in dataset.column_names if name != "prompt"])
    keep_settings(arguments)
    pipe, columns = load_pipeline(arguments), dataset.to_dict()
    prompts = columns.pop("prompt")
    images = {"base": sample(pipe, prompts, folder / "base", arguments)}
    add_lora(pipe, arguments)
    images["lora"] = sample(pipe, prompts, folder / "lora", arguments)

    scores = {when: scorer(found, prompts, columns) for when, found in images.items()}
    kinds = {"": range(len(prompts))}
    for tag in dict.fromkeys(columns.get("tag", [])):
        kinds[f" ({tag})"] = [row for row, other in enumerate(columns["tag"]) if other == tag]
    results = {}
    for f, name in enumerate(scorer.names):
        for kind, rows in kinds.items():
            both = [scores[when][rows, f] for when in images]
            if not (both[0].isnan() | both[1].isnan()).all():
                results[name + kind] = compare(*both, [prompts[row] for row in rows])
        if name not in results:
            raise ValueError(
                f"The metric `{name}` applies to none of the images: do the prompts have the columns it needs?"
            )
    title = Path(arguments.lora).stem
    measured = [
        Result(name.split(" (")[0], name, found["lora"], found["lora_se"], found["base"], found["base_se"])
        for name, found in results.items()
    ]
    table = Table("", "", measured, dataset, Path(arguments.prompts or "scenes").stem)
    index = eval_results_to_model_index(title, table.eval_results("text-to-image"))
    (folder / "results.json").write_text(json.dumps({"results": results, "model-index": index}, indent=2))

    shown = min(16, len(prompts))
    for step, (when, found) in enumerate(images.items()):
        path = folder / "images" / f"eval-{step:06d}.png"
        save_image_grid(found[:shown], columns=min(8, shown), path=path)
        rewards = scores[when][:shown, -1].tolist()
        captions = [{"prompt": prompt, "reward": reward} for prompt, reward in zip(prompts, rewards, strict=False)]
        save_captions(path, captions, columns=min(8, shown))
    save_before_and_after(folder, labels=("base", "LoRA"))

    print(
        f"\n{len(set(prompts))} prompts, {len(prompts)} images, the same noise for both; ± standard errors over prompts\n"
    )
    print("| metric | base | LoRA | difference | better | worse |\n| --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        cells = [Result.text(found[key], found[f"{key}_se"]) for key in ("base", "lora", "difference")]
        print(f"| {name} | {' | '.join(cells)} | {found['better']:.0%} | {found['worse']:.0%} |")
    print(f"\nIn {folder}: results.json (with a `model-index` for the card), before_after.png, base/, lora/")


if __name__ == "__main__":
    main()
