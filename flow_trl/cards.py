"""Model cards of all trainers: how to use what was trained, what it reached, what it cost, and where it came from."""

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from peft import PeftModel
from PIL import Image
from trl.trainer.utils import get_callable_name

from . import __version__
from .callbacks import read_grid, save_before_and_after
from .loading import active_adapter
from .publishing import public_name
from .utils import MissingExtraError


logger = logging.getLogger(__name__)

_TASKS = {
    (False, False): "text-to-image",
    (False, True): "text-to-video",
    (True, False): "image-to-image",
    (True, True): "image-to-video",
}
IMAGES_IN_GALLERY = 8
MEASURES = {
    "accuracy": "accuracy", "ece": "ECE", "auroc": "AUROC", "brier": "Brier score", "format": "valid format",
    "majority": "majority vote", "highest_confidence": "highest confidence", "weighted_majority": "weighted majority",
    "first_accuracy": "first attempt right", "second_accuracy": "second attempt right",
}  # fmt: skip
COUNTS = {"unparsable", "num_completions", "num_confidences"}  # said in words


@dataclass
class Result:
    """A measure at the end of a run, and at its beginning if that was measured on the same; each with a standard error."""

    metric: str
    name: str
    after: float
    after_error: float | None = None
    before: float | None = None
    before_error: float | None = None

    @staticmethod
    def text(value: float | None, error: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"


@dataclass
class Table:
    """Results on one data set."""

    title: str
    measure: str
    results: list[Result]
    dataset: datasets.Dataset | None = None
    name: str | None = None  # of the held-out data; `None`: nothing was held out, and it is in no `model-index`

    def shown(self) -> dict[str, Any]:
        rows = [
            {"name": result.name, "before": Result.text(result.before, result.before_error),
             "after": Result.text(result.after, result.after_error)}
            for result in self.results
        ]  # fmt: skip
        has_before = any(result.before is not None for result in self.results)
        return {"title": self.title, "measure": self.measure, "rows": rows, "has_before": has_before}

    def eval_results(self, task: str) -> list[EvalResult]:
        hub_id = _hub_dataset(self.dataset)
        split = getattr(self.dataset, "split", None)
        return [
            EvalResult(
                task_type=task,
                dataset_type=hub_id or "custom",
                dataset_name=hub_id or self.name,
                dataset_split=str(split or "test"),
                metric_type=result.metric,
                metric_name=result.name,
                metric_value=result.after,
                metric_args=None if result.after_error is None else {"standard_error": result.after_error},
            )
            for result in self.results
            if math.isfinite(result.after)
        ]


def _hub_dataset(dataset: datasets.Dataset | None) -> str | None:
    """The Hub id that a data set was loaded from."""
    for url in getattr(getattr(dataset, "info", None), "download_checksums", None) or {}:
        if url.startswith("hf://datasets/"):
            return url.removeprefix("hf://datasets/").split("@")[0]
    return None


@cache  # what it raises is not kept
def _card_data(base: str) -> ModelCardData:
    readme = Path(base, "README.md")
    return ModelCard.load(readme).data if readme.is_file() else HfApi().model_info(base, timeout=5).card_data


def _license(base: str, is_tiny: bool) -> dict[str, str]:
    """The license of a base model, as far as its card can be read."""
    if is_tiny:
        return {"license": "apache-2.0"}
    if "/" not in base and not Path(base, "README.md").is_file():
        return {}
    try:
        data = _card_data(base)
        found = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    except Exception as error:  # no card, or no network: the card says nothing about it then
        logger.debug("The license of `%s` is not known: %s", base, error)
        return {}
    link = found.get("license_link")
    if link is not None and not link.startswith("http"):
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return found


def _versions(*packages: str) -> str:
    versions = {"flow-trl": __version__} | {name: importlib.metadata.version(name) for name in packages}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _hardware(trainer: Any) -> str:
    device, count = trainer.accelerator.device, trainer.accelerator.num_processes
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    return f"{count} x CPU ({os.cpu_count()} cores, {platform.machine()})"


def _hours(trainer: Any) -> dict[str, str]:
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return {"hours": f"{seconds[-1] / 3600:.2g}"} if seconds else {}


def _citation(paper: dict[str, str], method: str) -> str:
    key = method.lower().replace("-", "").replace(" ", "")
    fields = {"title": paper["title"], "eprint": paper["id"], "archivePrefix": "arXiv"}
    fields["url"] = f"https://huggingface.co/papers/{paper['id']}"
    return f"@misc{{{key},\n" + ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items()) + "\n}"


def _card(
    trainer: Any,
    base: str,
    *,
    model_name: str | None,
    dataset_name: str | None,
    tags: str | list[str] | None,
    is_lora: bool,
    is_tiny: bool,
    task: str,
    tables: Sequence[Table],
    data: dict[str, Any],
    **shown: Any,
) -> ModelCard:
    """What the cards of all trainers have in common."""
    base_is_local = os.path.isdir(base)
    public = public_name(base)
    name = model_name or (trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name).split("/")[-1]
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    on_hub = "/" in public and not is_tiny
    results = [result for table in tables if table.name for result in table.eval_results(task)]
    trained_on = dataset_name or _hub_dataset(trainer.train_dataset)
    return ModelCard.from_template(
        ModelCardData(
            base_model=public if on_hub else None,
            base_model_relation=("adapter" if is_lora else "finetune") if on_hub else None,
            pipeline_tag=task,
            datasets=trained_on,
            metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
            model_name=name if results else None,
            eval_results=results or None,
            tags=[*data.pop("tags"), *tags],
            **_license(base, is_tiny),
            **data,
        ),
        template_str=(files("flow_trl") / "templates" / "model_card.md").read_text(encoding="utf-8"),
        model_name=name,
        base_model="flow_trl.tiny" if is_tiny else public,
        base_is_local=base_is_local and not on_hub and not is_tiny,
        widget=data.get("widget"),
        method=trainer._name,
        paper=trainer._paper,
        trainer=type(trainer).__name__,
        tables=[table.shown() for table in tables],
        citation=trainer._paper.get("citation") or _citation(trainer._paper, trainer._name),
        **shown,
    )


# Pipelines


def _tiny_loader(model_name: str) -> str | None:
    """Function of `flow_trl.tiny` that loads the base model, if it is one that ships with the package."""
    folder = Path(model_name)
    return f"load_{folder.name}_pipeline" if folder.parent == Path(__file__).parent / "tiny" else None


def _call(trainer: Any) -> str:
    """The call of the pipeline that gives what is evaluated, as code."""
    policy, prompt = trainer.eval_policy, "your prompt"
    texts = {name: text for name, (text,) in policy.texts([prompt]).items()}
    steps = policy.steps_asked(trainer.args.eval_num_inference_steps)
    arguments = [f'"{texts.pop("prompt")}"', *(f"{name}={name}" for name in trainer._sampler.columns)]
    plain = {name: value for name, value in policy.call_kwargs.items() if not isinstance(value, Image.Image)}
    named = {**texts, "num_inference_steps": steps, **plain}
    if trainer._sampler.columns:
        arguments[0] = f"prompt={arguments[0]}"
    arguments += [f"{name}={value!r}" for name, value in named.items()]
    video = policy.makes_videos
    return f"{'video' if video else 'image'} = pipe({', '.join(arguments)}).{'frames' if video else 'images'}[0]"


def _pipeline_code(trainer: Any, tiny_loader: str | None) -> str:
    """How to load what was trained, and one call."""
    repo, base, denoisers = trainer._public_repo, public_name(trainer.model_name), trainer.policy.denoisers
    kind = type(trainer.pipe)
    known = kind.__name__ if hasattr(diffusers, kind.__name__) else "DiffusionPipeline"
    name, denoiser = next(iter(denoisers.items()))
    is_peft = trainer.is_lora and isinstance(denoiser, PeftModel)
    lines = [f"from diffusers import {known}"]
    if tiny_loader and trainer.is_lora:
        plain = known in ("StableDiffusion3Pipeline", "StableDiffusionPipeline")
        lines = [*([] if plain else lines), f"from flow_trl.tiny import {tiny_loader}"]
        lines += ["", f"pipe = {tiny_loader}()" if plain else f"pipe = {known}(**{tiny_loader}().components)"]
    else:
        lines += ["from peft import PeftModel"] if is_peft else []
        absent = [
            n for n, part in trainer.pipe.components.items() if part is None and n not in kind._optional_components
        ]
        options = "".join(f", {part}=None" for part in absent)
        lines += ["", f'pipe = {known}.from_pretrained("{base if trainer.is_lora else repo}"{options})']
    if is_peft:
        lines.append(f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{repo}")')
    elif trainer.is_lora and not hasattr(trainer.pipe, "load_lora_weights"):
        file = 'weight_name="pytorch_lora_weights.safetensors"'
        lines.append(f'pipe.{name}.load_lora_adapter("{repo}", prefix=None, {file})')
    elif trainer.is_lora and len(denoisers) > 1:
        other = list(denoisers)[1]
        lines.append(f'pipe.load_lora_weights("{repo}", weight_name="pytorch_lora_weights.safetensors")')
        file = f'weight_name="{other}.safetensors", load_into_{other}=True'
        lines.append(f'pipe.load_lora_weights("{repo}", {file})')
    elif trainer.is_lora:
        lines.append(f'pipe.load_lora_weights("{repo}")')
    return "\n".join([*lines, _call(trainer)])


def _rewards(trainer: Any, history: list[dict]) -> list[Table]:
    """Rewards of the last evaluation, and of that before the first update; or of the last generation."""
    names = ["reward", *(f"rewards/{reward}/mean" for reward in trainer.scorer.names)]

    def results(prefix: str) -> list[Result]:
        entries = [entry for entry in history if f"{prefix}reward" in entry]
        found = []
        for name in names:
            values = [entry for entry in entries if prefix + name in entry]
            if values:
                plain = name.removeprefix("rewards/").removesuffix("/mean")
                error = f"{prefix}{name.replace('/mean', '/se')}" if "/" in name else f"{prefix}reward_se"
                result = Result(plain, plain, values[-1][prefix + name], values[-1].get(error))
                if prefix and values[0]["step"] == 0 and values[-1]["step"] > 0:
                    result.before, result.before_error = values[0][prefix + name], values[0].get(error)
                found.append(result)
        return found

    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    tables = []
    for name, dataset in sets.items():
        found = results(f"eval_{name}_" if name else "eval_")
        if found and dataset is not None:
            title = f"Mean over {len(dataset)} held-out prompts{f' ({name})' if name else ''}, ± standard error"
            title += ", before and after, with the same noise." if found[0].before is not None else "."
            tables.append(Table(title, "reward", found, dataset, name or "held-out prompts"))
    if not tables and results(""):
        tables.append(Table("Mean over the last training generation; nothing was held out.", "reward", results("")))
    return tables


def _pictures(output_dir: Path, updates: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Pictures of a run for its card by their titles, and the entries of the gallery."""
    grids = sorted((output_dir / "images").glob("*.png"))
    grids = [path for path in grids if path.stem.split("-")[-1].isdigit() and int(path.stem.split("-")[-1]) <= updates]
    evaluated = [path for path in grids if path.name.startswith("eval-")]
    pictures, widget = {}, []
    if evaluated:
        for number, (image, caption) in enumerate(read_grid(evaluated[-1])[:IMAGES_IN_GALLERY]):
            name = f"images/sample-{number}.png"
            image.save(output_dir / name)
            widget.append({"text": caption["prompt"], "output": {"url": name}})
    comparison = output_dir / "before_after.png"
    comparable = len(evaluated) > 1 and int(evaluated[0].stem.split("-")[-1]) == 0
    if comparable and [c for _, c in read_grid(evaluated[0])] and _same_prompts(evaluated[0], evaluated[-1]):
        if not comparison.is_file() or comparison.stat().st_mtime < evaluated[-1].stat().st_mtime:
            try:
                save_before_and_after(output_dir, until=updates)
            except MissingExtraError as error:
                logger.warning("The card has no picture from before and after: %s", error)
        if comparison.is_file():
            pictures["Before and after, the same prompts and noise"] = "before_after.png"
    if not pictures and grids:
        shown = ([path for path in grids if path.name.startswith("eval")] or grids)[-1]
        pictures["Samples"] = f"images/{shown.name}"
    for title, name in (
        ("Learning curve", "learning_curve.png"),
        ("Rewards that are not trained", "over_optimization.png"),
    ):
        if (output_dir / name).is_file():
            pictures[title] = name
    return pictures, widget


def _same_prompts(first: Path, last: Path) -> bool:
    prompts = [[caption["prompt"] for _, caption in read_grid(path)] for path in (first, last)]
    return prompts[0] == prompts[1]


def diffusion_card(
    trainer: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> ModelCard:
    """
    The card of a pipeline that was trained: how to load it, gallery, rewards before and after, arguments, cost, citation, and the
    same for machines (`model-index`, base model, license).

    Args:
        trainer ([`~trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer.
        model_name (`str`, *optional*):
            Name of the model. Defaults to the name of the repository or of `output_dir`.
        dataset_name (`str`, *optional*):
            Hub id of the data set; by default that which `train_dataset` was loaded from.
        tags (`str` or `list[str]`, *optional*):
            Further tags.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    args, state, output_dir = trainer.args, trainer.state, Path(trainer.args.output_dir)
    updates = state.global_step
    if args.load_best_model_at_end and state.best_global_step and not trainer.is_in_train:
        updates = state.best_global_step
    history = [entry for entry in state.log_history if entry["step"] <= updates]
    pictures, widget = _pictures(output_dir, updates)
    tiny_loader, denoiser = _tiny_loader(trainer.model_name), next(iter(trainer.policy.denoisers.values()))
    hyperparameters = {"updates": updates}
    hyperparameters |= {name: getattr(args, name) for name in ["learning_rate", *trainer._card_arguments]}
    if trainer.is_lora:
        lora = denoiser.peft_config[active_adapter(denoiser)]
        modules = lora.target_modules
        hyperparameters["LoRA rank, alpha"] = f"{lora.r}, {lora.lora_alpha}"
        hyperparameters["LoRA target modules"] = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    weights = zip(trainer.scorer.names, trainer.scorer.weights.tolist(), strict=True)
    cost = {
        "denoiser evaluations": trainer._totals["total_nfe"],
        "scored images": trainer._totals["total_reward_calls"],
    }
    return _card(
        trainer,
        trainer.model_name,
        model_name=model_name,
        dataset_name=dataset_name,
        tags=tags,
        is_lora=trainer.is_lora,
        is_tiny=tiny_loader is not None,
        task=_TASKS[bool(trainer._sampler.columns), trainer.policy.makes_videos],
        tables=_rewards(trainer, history),
        data={
            "library_name": "diffusers",
            "tags": [*(["lora"] if trainer.is_lora else []), "flow-trl", "reinforcement-learning", trainer._name],
            **({"widget": widget} if widget else {}),
        },
        intro="A LoRA for" if trainer.is_lora else "A fine-tuned version of",
        images=True,
        pictures=pictures,
        code=_pipeline_code(trainer, tiny_loader),
        note=trainer._card_note,
        hyperparameters=hyperparameters,
        reward_weights=", ".join(f"`{name}` {weight}" for name, weight in weights),
        cost={**cost, **_hours(trainer), "hardware": _hardware(trainer)},
        versions=_versions("diffusers", "transformers", "peft", "torch"),
    )


# Language models


def _language_code(trainer: Any, prompt: Any) -> str:
    repo, args = trainer._public_repo, trainer.args
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo}")')
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{repo}")')
    lines.append(f"prompt = {prompt!r}")
    if isinstance(prompt, str):
        lines.append('inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)')
    else:
        options = "".join(f", {name}={value!r}" for name, value in (args.chat_template_kwargs or {}).items())
        lines.append("inputs = tokenizer.apply_chat_template(")
        lines.append(f'    prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True{options}')
        lines.append(")")
    lines.append(f"output = model.generate(**inputs, do_sample=True, max_new_tokens={args.max_completion_length})")
    lines.append('print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return "\n".join(lines)


def _measures(folder: Path, trainer: Any) -> list[Table]:
    """What [`~evaluation.save_results`] left in the folder, or the rewards of the trainer's last log."""
    path = folder / "results.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        before, after = saved.get("before", {}), list(saved.values())[-1]
        number = partial(_number, default=None)
        found = [
            Result(key, MEASURES.get(key, key), number(value), number(after.get(f"{key}_se")), number(before.get(key)),
                   number(before.get(f"{key}_se")))
            for key, value in after.items()
            if number(value) is not None and not key.endswith("_se") and key not in COUNTS
        ]  # fmt: skip
        found.sort(key=lambda result: [*MEASURES, result.metric].index(result.metric))
        title = "Held out, ± standard error."
        if "bins" in after:
            stated, total = after["num_confidences"], after["num_completions"]
            title = f"Held out, ± standard error. {stated} of {total} completions had a confidence"
            title += ", without which they do not count for ECE, AUROC and Brier score."
        return [Table(title, "measure", found, trainer.eval_dataset, "held-out problems")]
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = [f"rewards/{name}/mean" for name in trainer.reward_func_names]
    found = [Result(n, n.split("/", 1)[1].removesuffix("/mean"), logs[-1][n]) for n in names if logs and n in logs[-1]]
    return [Table("Mean over the last training completions; nothing was held out.", "reward", found)] if found else []


def _number(value: Any, default: Any) -> Any:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


def language_card(
    trainer: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> ModelCard:
    """
    The card of a language model that was trained in blocks: how to load it, the task and its blocks, what
    [`~evaluation.save_results`] left in `output_dir` (accuracy, calibration, how many completions had a confidence, the reliability
    diagram), arguments, cost, citation, and the same for machines.

    Args:
        trainer ([`BlockwiseGRPOTrainer`]):
            The trainer.
        model_name, dataset_name, tags:
            As in [`diffusion_card`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_lora = isinstance(model, PeftModel)
    base = (model.get_base_model() if is_lora else model).config._name_or_path or type(model).__name__
    if is_lora:
        lora = model.peft_config[model.active_adapter]
    is_tiny = Path(base) == Path(__file__).parent / "tiny" / "language"
    dataset = trainer.train_dataset if isinstance(trainer.train_dataset, datasets.Dataset) else None
    prompt = "your prompt" if dataset is None else dataset[0]["prompt"]
    blocks, first = [], 0
    for block in trainer.blocks:
        names = trainer.reward_func_names[first : first + len(block.reward_funcs)]
        first += len(names)
        tags_found = ", ".join(f"`<{tag}>`" for tag in block.tags or ())
        rewards = ", ".join(f"{name} ({weight:g})" for name, weight in zip(names, block.reward_weights, strict=True))
        outcome = block.outcome and args.baseline == "outcome"
        blocks.append(
            {
                "name": block.name,
                "found": tags_found or f"`{block.pattern}`",
                "rewards": rewards,
                "outcome": get_callable_name(block.outcome) if outcome else "",
                "weight": block.weight,
            }
        )
    names = ["learning_rate", "num_generations", "generation_batch_size", "num_iterations", "temperature", "beta", "epsilon",
             "loss_type", "scale_rewards", "baseline", "charge_missing", "min_stratum_size", "shrinkage", "leave_one_out",
             "max_completion_length", "seed"]  # fmt: skip
    updates = trainer.state.global_step
    hyperparameters = {"updates": updates} | {name: getattr(args, name) for name in names}
    if is_lora:
        hyperparameters["LoRA rank, alpha"] = f"{lora.r}, {lora.lora_alpha}"
    seen = {"tokens": int(trainer.state.num_input_tokens_seen)} if trainer.state.num_input_tokens_seen else {}
    sampled = updates * args.generation_batch_size // max(1, args.steps_per_generation * args.num_iterations)
    pictures = {"Reliability diagram": "reliability_diagram.png"}
    return _card(
        trainer,
        base,
        model_name=model_name,
        dataset_name=dataset_name,
        tags=tags,
        is_lora=is_lora,
        is_tiny=is_tiny,
        task="text-generation",
        tables=_measures(output_dir, trainer),
        data={
            "library_name": "peft" if is_lora else "transformers",
            "tags": [*(["lora"] if is_lora else []), *trainer._tag_names],
        },
        intro="A LoRA for" if is_lora else "A fine-tuned version of",
        images=False,
        pictures={title: name for title, name in pictures.items() if (output_dir / name).is_file()},
        code=_language_code(trainer, prompt),
        example=prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt),
        blocks=blocks,
        hyperparameters=hyperparameters,
        cost={"sampled completions": sampled, **seen, **_hours(trainer), "hardware": _hardware(trainer)},
        versions=_versions("trl", "transformers", "torch"),
    )
