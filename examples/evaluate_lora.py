# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[ocr,plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Compares a LoRA with its base on the same prompts and noise: a table with standard errors and paired differences, pictures
side by side, and the entry for the model card.

    python examples/evaluate_lora.py --base stabilityai/stable-diffusion-3.5-medium --lora you/your-lora \
        --metrics geneval_strict pickscore --prompts geneval \
        --pipeline_kwargs '{"num_inference_steps": 28, "guidance_scale": 4.5, "height": 512, "width": 512}'

The LoRA may come from any library whose format diffusers' `load_lora_weights` reads. Without a base the tiny world's is taken,
for a LoRA that `tp_grpo.py` has trained:

    python examples/evaluate_lora.py --lora outputs/control_variate_scenes

Images are kept as they are made: started again with the same arguments it goes on, and other metrics cost no new ones. What is in
`results.json` under `model-index` goes into the LoRA's card by `huggingface_hub.metadata_update("you/your-lora",
{"model-index": ...})`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from flow_trl import tiny
from flow_trl.callbacks import save_comparison
from flow_trl.cards import Result, Table
from flow_trl.loading import load_pipeline
from flow_trl.metrics import summarize
from flow_trl.prompts import evaluation_prompts
from flow_trl.publishing import public_name
from flow_trl.resuming import dataset_digest, sampled_digest
from flow_trl.scoring import Scorer
from flow_trl.utils import check_prompts, sample_generator


IMAGES_SHOWN = 16
TINY_KWARGS = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 0}


@dataclass
class Arguments:
    """
    Arguments of the comparison.

    Args:
        lora (`str`):
            Hub id, folder or `.safetensors` file of the LoRA.
        base (`str`, *optional*):
            Hub id or folder of the pipeline that it belongs to. By default the tiny world's flow-matching model.
        metrics (`list[str]`, *optional*):
            Names of built-in reward functions, or dotted paths of others. By default the tiny world's scene rewards, or
            `geneval_strict` and `pickscore` for another base.
        prompts (`str`, *optional*):
            Prompts, as [`~prompts.evaluation_prompts`] takes them: `geneval`, `ocr`, `animals`, a file or a Hub id. By default
            the tiny world's scenes, or `geneval` for another base.
        num_prompts (`int`, *optional*, defaults to `200`):
            Largest number of prompts.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt; GenEval makes 4.
        pipeline_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for each call of the pipeline.
        dtype (`str`, *optional*):
            Type of the weights. Defaults to `bfloat16` on a GPU and `float32` on a CPU.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that are made together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise, which is the same for both.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluate_lora"`):
            Where images, `results.json` and `base_and_lora.png` are written.
    """

    lora: str = field(metadata={"help": "Hub id, folder or .safetensors file of the LoRA."})
    base: str | None = field(default=None, metadata={"help": "Pipeline that it belongs to: Hub id or folder."})
    metrics: list[str] | None = field(
        default=None, metadata={"help": "Names of reward functions, or dotted paths such as my_package.darkness."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Prompts: geneval, ocr, animals, a .jsonl or .txt file, or a Hub id."}
    )
    num_prompts: int = field(default=200, metadata={"help": "Largest number of prompts."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt."})
    pipeline_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for each call of the pipeline, as JSON."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Type of the weights, such as bfloat16."})
    batch_size: int = field(default=8, metadata={"help": "Images that are made together."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    output_dir: str = field(default="outputs/evaluate_lora", metadata={"help": "Where the results are written."})

    def __post_init__(self):
        for name in ("num_prompts", "images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}`: it must be at least 1.")
        if self.pipeline_kwargs is None:
            self.pipeline_kwargs = TINY_KWARGS if self.base is None else {}
        elif isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`pipeline_kwargs={self.pipeline_kwargs!r}` is no JSON such as '{{\"height\": 512}}' ({error})."
                ) from error


def load_data(arguments: Arguments) -> Dataset:
    """One row for each image."""
    if arguments.prompts is None and arguments.base is None:
        prompts = tiny.load_prompts("scenes", "test")
        prompts = prompts.select(range(min(arguments.num_prompts, len(prompts))))
    else:
        prompts = evaluation_prompts(arguments.prompts or "geneval", arguments.num_prompts)
    check_prompts("prompts", prompts)
    rows = [row for row in range(len(prompts)) for _ in range(arguments.images_per_prompt)]
    return prompts.select(rows)


def load_both(arguments: Arguments) -> tuple[DiffusionPipeline, dict[str, str]]:
    """The pipeline with the LoRA, which can be switched on and off, and digests of both."""
    device = PartialState().device
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    pipe = load_pipeline(arguments.base or str(tiny.FLOW_FOLDER), torch.float32, {"dtype": dtype}).to(device)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"`base` is a {type(pipe).__name__}, which loads no LoRA.")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    digests = {"base": sampled_digest(weight for part in parts for weight in part.parameters())}
    pipe.load_lora_weights(arguments.lora)
    named = [pair for part in parts for pair in part.named_parameters() if ".lora_" in pair[0]]
    weights = [weight for name, weight in named if ".lora_B." in name]
    if not any(weight.any() for weight in weights):
        found = f"{len(weights)} layers, all zero" if weights else "no layer"
        raise ValueError(f"`lora={arguments.lora!r}` changes nothing in {type(pipe).__name__}: it has {found} for it.")
    pipe.set_progress_bar_config(disable=True)
    return pipe, digests | {"lora": sampled_digest(weight for _, weight in named)}


def keep_settings(arguments: Arguments, digests: dict[str, str]) -> None:
    """Refuses a folder with images of other settings, weights or prompts."""
    others = ("metrics", "batch_size", "output_dir", *digests)
    settings = {name: value for name, value in asdict(arguments).items() if name not in others}
    settings |= {f"digest of {name}": digest for name, digest in digests.items()}
    path = Path(arguments.output_dir, "settings.json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for name, value in settings.items():
        if kept[name] != value:
            raise ValueError(
                f"`{name}={value!r}`, but the images in `output_dir={arguments.output_dir!r}` were made with {kept[name]!r}: "
                "choose another folder, or delete it."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def sample(pipe: DiffusionPipeline, prompts: list[str], name: str, arguments: Arguments) -> list[Image.Image]:
    """One image of each row, of noise that depends on the seed and the row alone; what is there is not made again."""
    folder = Path(arguments.output_dir, "images", name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row:05d}.png" for row in range(len(prompts))]
    missing = [row for row, path in enumerate(paths) if not path.is_file()]
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc=name, unit="image") as progress:
        for start in range(0, len(missing), arguments.batch_size):
            rows = missing[start : start + arguments.batch_size]
            generators = [sample_generator("evaluate_lora", arguments.seed, row) for row in rows]
            images = pipe([prompts[row] for row in rows], generator=generators, **arguments.pipeline_kwargs).images
            for row, image in zip(rows, images, strict=True):
                unfinished = paths[row].with_suffix(".unfinished")
                image.save(unfinished, format="PNG")
                unfinished.replace(paths[row])
            progress.update(len(rows))
    return [Image.open(path).convert("RGB") for path in paths]


def captioned(images: list[Image.Image], prompts: list[str], scores: list[float]) -> list[tuple[Image.Image, dict]]:
    """The first images, with their prompts and scores."""
    shown = list(zip(images, prompts, scores, strict=True))[:IMAGES_SHOWN]
    return [(image, {"prompt": p, "reward": None if math.isnan(score) else score}) for image, p, score in shown]


def compare(base: list[float], lora: list[float], groups: list[str]) -> dict[str, float | None]:
    """Means of both and of the paired difference, over images to which the metric applies, and how often either is better."""
    rows = [i for i, pair in enumerate(zip(base, lora, strict=True)) if not any(map(math.isnan, pair))]
    if not rows:
        return {}
    groups = [groups[i] for i in rows]
    values = {"base": [base[i] for i in rows], "lora": [lora[i] for i in rows]}
    values["difference"] = [lora[i] - base[i] for i in rows]
    result: dict[str, float | None] = {"num_images": len(rows)}
    for name, of_images in values.items():
        result |= summarize(name, of_images, groups)
    better, worse = (sum(sign * d > 0 for d in values["difference"]) / len(rows) for sign in (1, -1))
    return result | {"better": better, "worse": worse}


def main(arguments: Arguments) -> None:
    is_tiny = arguments.base is None
    names = ["flow_trl.tiny.scene", "flow_trl.tiny.scene_strict"] if is_tiny else ["geneval_strict", "pickscore"]
    data, scorer = load_data(arguments), Scorer(arguments.metrics or names)
    scorer.check("prompts", [name for name in data.column_names if name != "prompt"])
    (pipe, digests), columns = load_both(arguments), data.to_dict()
    keep_settings(arguments, digests | {"prompts": dataset_digest(data)})
    prompts, tags = columns.pop("prompt"), columns.get("tag", [])
    pipe.disable_lora()
    images = {"base": sample(pipe, prompts, "base", arguments)}
    pipe.enable_lora()
    images["LoRA"] = sample(pipe, prompts, "LoRA", arguments)
    base, lora = (scorer(found, prompts, columns).double() for found in images.values())

    subsets = {"": range(len(prompts))}
    subsets |= {f" ({tag})": [i for i, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)}
    results = {
        name + tag: compare(base[rows, f].tolist(), lora[rows, f].tolist(), [prompts[i] for i in rows])
        for f, name in enumerate(scorer.names)
        for tag, rows in subsets.items()
    }
    results = {name: result for name, result in results.items() if result}
    for name in scorer.names:
        if name not in results:
            raise ValueError(
                f"The metric `{name}` applies to none of the images: do the prompts have the columns that it needs?"
            )
    found = [
        Result(name.split(" (")[0], name, result["lora"], result["lora_se"], result["base"], result["base_se"])
        for name, result in results.items()
    ]
    source = arguments.prompts or ("scenes" if is_tiny else "geneval")
    table = Table("", "metric", found, data, Path(source).name if Path(source).exists() else source)
    print(
        f"\n{len(set(prompts))} prompts, {len(prompts)} images, the same noise for both; ± standard error over prompts\n"
    )
    print("| metric | base | LoRA | difference | better | worse |\n| --- | --- | --- | --- | --- | --- |")
    for row in table.shown()["rows"]:
        result = results[row["name"]]
        difference = Result.text(result["difference"], result["difference_se"])
        shares = f"{result['better']:.0%} | {result['worse']:.0%}"
        print(f"| {row['name']} | {row['before']} | {row['after']} | {difference} | {shares} |")

    folder = Path(arguments.output_dir)
    lora_name = Path(arguments.lora).name if Path(arguments.lora).exists() else public_name(arguments.lora)
    index = eval_results_to_model_index(lora_name.split("/")[-1], table.eval_results("text-to-image"))
    saved = {
        "base": public_name(arguments.base or "flow_trl.tiny"),
        "lora": lora_name,
        "prompts": table.name,
        "num_prompts": len(set(prompts)),
        "pipeline_kwargs": arguments.pipeline_kwargs,
        "seed": arguments.seed,
        "metrics": results,
        "model-index": index,
    }
    (folder / "results.json").write_text(json.dumps(saved, indent=2, allow_nan=False), encoding="utf-8")
    shown = {"base": base[:, 0].tolist(), "LoRA": lora[:, 0].tolist()}
    shown = {name: captioned(images[name], prompts, scores) for name, scores in shown.items()}
    save_comparison(shown, folder / "base_and_lora.png")
    print(f"\nIn {folder}: results.json (its `model-index` is for the card), base_and_lora.png, images/")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
