"""Model cards of all trainers: how to use what was trained, what it reached, what it cost, and where it came from."""

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from peft import LoraConfig, PeftModel
from PIL import Image
from trl.trainer.utils import get_callable_name

from . import __version__
from .callbacks import error_name, save_before_and_after
from .loading import active_adapter
from .pictures import read_grid, saved_grids
from .publishing import public_name
from .utils import MissingExtraError


logger = logging.getLogger(__name__)

_TASKS = {
    (False, False): "text-to-image",
    (False, True): "text-to-video",
    (True, False): "image-to-image",
    (True, True): "image-to-video",
}
TINY = Path(__file__).parent / "tiny"
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


def _hours_and_hardware(trainer: Any) -> dict[str, str]:
    device, count = trainer.accelerator.device, trainer.accelerator.num_processes
    cpu = f"CPU ({os.cpu_count()} cores, {platform.machine()})"
    hardware = f"{count} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}"
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return ({"hours": f"{seconds[-1] / 3600:.2g}"} if seconds else {}) | {"hardware": hardware}


def _hyperparameters(trainer: Any, updates: int, names: list[str], lora: LoraConfig | None) -> dict[str, Any]:
    shown = {"updates": updates} | {name: getattr(trainer.args, name) for name in ["learning_rate", *names]}
    return shown | ({} if lora is None else {"LoRA rank, alpha": f"{lora.r}, {lora.lora_alpha}"})


def _citation(paper: dict[str, str], method: str) -> str:
    key = method.lower().replace("-", "").replace(" ", "")
    fields = {"title": paper["title"], "eprint": paper["id"], "archivePrefix": "arXiv"}
    fields["url"] = f"https://huggingface.co/papers/{paper['id']}"
    return f"@misc{{{key},\n" + ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items()) + "\n}"


def _card(
    trainer: Any,
    base: str,
    *,
    lora: LoraConfig | None,
    is_tiny: bool,
    task: str,
    library: str,
    own_tags: Sequence[str],
    tables: Sequence[Table],
    cost: dict[str, Any],
    shown: dict[str, Any],
    widget: list[dict[str, Any]] | None = None,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """What the cards of all trainers have in common; the template is given `shown` as well."""
    args, public = trainer.args, public_name(base)
    on_hub = "/" in public and not is_tiny
    name = model_name or (args.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
    tags = [tags] if isinstance(tags, str) else tags or []
    results = [result for table in tables if table.name for result in table.eval_results(task)]
    return ModelCard.from_template(
        ModelCardData(
            base_model=public if on_hub else None,
            base_model_relation=("adapter" if lora else "finetune") if on_hub else None,
            pipeline_tag=task,
            library_name=library,
            datasets=dataset_name or _hub_dataset(trainer.train_dataset),
            metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
            model_name=name if results else None,
            eval_results=results or None,
            tags=[*(["lora"] if lora else []), *own_tags, *tags],
            widget=widget,
            **_license(base, is_tiny),
        ),
        template_str=(files("flow_trl") / "templates" / "model_card.md").read_text(encoding="utf-8"),
        model_name=name,
        intro="A LoRA for" if lora else "A fine-tuned version of",
        base_model="flow_trl.tiny" if is_tiny else public,
        base_is_local=os.path.isdir(base) and not on_hub and not is_tiny,
        widget=widget,
        method=trainer._name,
        paper=trainer._paper,
        trainer=type(trainer).__name__,
        tables=[table.shown() for table in tables],
        cost=cost | _hours_and_hardware(trainer),
        citation=trainer._paper.get("citation") or _citation(trainer._paper, trainer._name),
        **shown,
    )


# Pipelines


def _tiny_loader(model_name: str) -> str | None:
    """Function of `flow_trl.tiny` that loads the base model, if it is one that ships with the package."""
    folder = Path(model_name)
    return f"load_{folder.name}_pipeline" if folder.parent == TINY else None


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
    kind = type(trainer.pipe)
    known = kind.__name__ if hasattr(diffusers, kind.__name__) else "DiffusionPipeline"
    imports = [f"from diffusers import {known}"]
    if tiny_loader and trainer.is_lora:
        is_as_loaded = known in ("StableDiffusion3Pipeline", "StableDiffusionPipeline")
        imports = [*([] if is_as_loaded else imports), f"from flow_trl.tiny import {tiny_loader}"]
        loaded = f"{tiny_loader}()" if is_as_loaded else f"{known}(**{tiny_loader}().components)"
    else:
        parts = trainer.pipe.components.items()
        absent = [name for name, part in parts if part is None and name not in kind._optional_components]
        source = public_name(trainer.model_name) if trainer.is_lora else trainer._public_repo
        loaded = f'{known}.from_pretrained("{source}"{"".join(f", {name}=None" for name in absent)})'
    lora = _lora_code(trainer) if trainer.is_lora else []
    if any("PeftModel" in line for line in lora):
        imports.append("from peft import PeftModel")
    return "\n".join([*imports, "", f"pipe = {loaded}", *lora, _call(trainer)])


def _lora_code(trainer: Any) -> list[str]:
    """How to load the LoRA of each denoiser."""
    repo, file = trainer._public_repo, 'weight_name="pytorch_lora_weights.safetensors"'
    (name, denoiser), *others = trainer.policy.denoisers.items()
    if isinstance(denoiser, PeftModel):
        return [f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{repo}")']
    if not hasattr(trainer.pipe, "load_lora_weights"):
        return [f'pipe.{name}.load_lora_adapter("{repo}", prefix=None, {file})']
    if not others:
        return [f'pipe.load_lora_weights("{repo}")']
    other = others[0][0]
    other_file = f'weight_name="{other}.safetensors", load_into_{other}=True'
    return [f'pipe.load_lora_weights("{repo}", {options})' for options in (file, other_file)]


def _rewards(trainer: Any, history: list[dict]) -> list[Table]:
    """Rewards of the last evaluation, and of that before the first update; or of the last generation."""
    names = ["reward", *(f"rewards/{reward}/mean" for reward in trainer.scorer.names)]

    def results(prefix: str) -> list[Result]:
        entries = [entry for entry in history if f"{prefix}reward" in entry]
        found = []
        for name in names:
            key, error = prefix + name, error_name(prefix + name)
            values = [entry for entry in entries if key in entry]
            if values:
                plain = name.removeprefix("rewards/").removesuffix("/mean")
                result = Result(plain, plain, values[-1][key], values[-1].get(error))
                if prefix and values[0]["step"] == 0 and values[-1]["step"] > 0:
                    result.before, result.before_error = values[0][key], values[0].get(error)
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


def _gallery(output_dir: Path, updates: int) -> list[dict[str, Any]]:
    """The entries of the gallery: images of the last evaluation, each as a file."""
    widget = []
    for grid in saved_grids(output_dir, "eval-", updates)[-1:]:
        for number, (image, caption) in enumerate(read_grid(grid)[:IMAGES_IN_GALLERY]):
            name = f"images/sample-{number}.png"
            image.save(output_dir / name)
            widget.append({"text": caption["prompt"], "output": {"url": name}})
    return widget


def _pictures(output_dir: Path, updates: int) -> dict[str, str]:
    """Pictures of a run for its card, by their titles."""
    pictures = {}
    grids = saved_grids(output_dir, "eval", updates) or saved_grids(output_dir, "train", updates)
    if _compares(output_dir, updates):
        pictures["Before and after, the same prompts and noise"] = "before_after.png"
    elif grids:
        pictures["Samples"] = f"images/{grids[-1].name}"
    curves = {"Learning curve": "learning_curve.png", "Rewards that are not trained": "over_optimization.png"}
    return pictures | {title: name for title, name in curves.items() if (output_dir / name).is_file()}


def _compares(output_dir: Path, updates: int) -> bool:
    """Whether there is a picture from before and after, which is drawn if the evaluations allow it."""
    evaluated = saved_grids(output_dir, "eval-", updates)
    if len(evaluated) < 2 or evaluated[0].name != "eval-000000.png":
        return False
    before, after = ([caption["prompt"] for _, caption in read_grid(path)] for path in (evaluated[0], evaluated[-1]))
    if not before or before != after:
        return False
    comparison = output_dir / "before_after.png"
    if not comparison.is_file() or comparison.stat().st_mtime < evaluated[-1].stat().st_mtime:
        try:
            save_before_and_after(output_dir, until=updates)
        except MissingExtraError as error:
            logger.warning("The card has no picture from before and after: %s", error)
    return comparison.is_file()


def diffusion_card(trainer: Any, **given: Any) -> ModelCard:
    """
    The card of a pipeline that was trained: how to load it, gallery, rewards before and after, arguments, cost, citation, and the
    same for machines (`model-index`, base model, license).

    Args:
        trainer ([`~trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer.
        given:
            As in [`~publishing.Publishing.create_model_card`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    args, state, output_dir = trainer.args, trainer.state, Path(trainer.args.output_dir)
    updates = state.global_step
    if args.load_best_model_at_end and state.best_global_step and not trainer.is_in_train:
        updates = state.best_global_step
    lora = None
    if trainer.is_lora:
        denoiser = next(iter(trainer.policy.denoisers.values()))
        lora = denoiser.peft_config[active_adapter(denoiser)]
    hyperparameters = _hyperparameters(trainer, updates, trainer._card_arguments, lora)
    if lora:
        modules = lora.target_modules
        hyperparameters["LoRA target modules"] = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    weights = zip(trainer.scorer.names, trainer.scorer.weights.tolist(), strict=True)
    totals, tiny_loader = trainer._totals, _tiny_loader(trainer.model_name)
    return _card(
        trainer,
        trainer.model_name,
        lora=lora,
        is_tiny=tiny_loader is not None,
        task=_TASKS[bool(trainer._sampler.columns), trainer.policy.makes_videos],
        library="diffusers",
        own_tags=["flow-trl", "reinforcement-learning", trainer._name],
        tables=_rewards(trainer, [entry for entry in state.log_history if entry["step"] <= updates]),
        cost={"denoiser evaluations": totals["total_nfe"], "scored images": totals["total_reward_calls"]},
        widget=_gallery(output_dir, updates) or None,
        shown={
            "pictures": _pictures(output_dir, updates),
            "code": _pipeline_code(trainer, tiny_loader),
            "note": trainer._card_note,
            "hyperparameters": hyperparameters,
            "reward_weights": ", ".join(f"`{name}` {weight}" for name, weight in weights),
            "versions": _versions("diffusers", "transformers", "peft", "torch"),
        },
        **given,
    )


# Language models


def _language_code(trainer: Any, prompt: str | list[dict[str, str]]) -> str:
    """How to load what was trained, and one completion."""
    repo, args = trainer._public_repo, trainer.args
    inputs = 'tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)'
    if not isinstance(prompt, str):
        options = "".join(f", {name}={value!r}" for name, value in (args.chat_template_kwargs or {}).items())
        inputs = f"""tokenizer.apply_chat_template(
    prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True{options}
)"""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
prompt = {prompt!r}
inputs = {inputs}
output = model.generate(**inputs, do_sample=True, max_new_tokens={args.max_completion_length})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _measures(folder: Path, trainer: Any) -> list[Table]:
    """What [`~evaluation.save_results`] left in the folder, or the rewards of the trainer's last log."""
    path = folder / "results.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        before, after = saved.get("before", {}), list(saved.values())[-1]
        found = [
            Result(key, MEASURES.get(key, key), _finite(value), _finite(after.get(f"{key}_se")),
                   _finite(before.get(key)), _finite(before.get(f"{key}_se")))
            for key, value in after.items()
            if _finite(value) is not None and not key.endswith("_se") and key not in COUNTS
        ]  # fmt: skip
        found.sort(key=lambda result: [*MEASURES, result.metric].index(result.metric))
        title = "Held out, ± standard error."
        if "bins" in after:
            title += f" {after['num_confidences']} of {after['num_completions']} completions had a confidence"
            title += ", without which they do not count for ECE, AUROC and Brier score."
        return [Table(title, "measure", found, trainer.eval_dataset, "held-out problems")]
    last = next((entry for entry in reversed(trainer.state.log_history) if "reward" in entry), {})
    names = {f"rewards/{name}/mean": name for name in trainer.reward_func_names}
    found = [Result(key, name, last[key]) for key, name in names.items() if key in last]
    return [Table("Mean over the last training completions; nothing was held out.", "reward", found)] if found else []


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _blocks(trainer: Any) -> list[dict[str, Any]]:
    """Rows of the table of blocks."""
    rows, names = [], iter(trainer.reward_func_names)
    for block in trainer.blocks:
        rewards = zip(islice(names, len(block.reward_funcs)), block.reward_weights, strict=True)
        has_outcome = block.outcome and trainer.args.baseline == "outcome"
        rows.append(
            {
                "name": block.name,
                "found": ", ".join(f"`<{tag}>`" for tag in block.tags or ()) or f"`{block.pattern}`",
                "rewards": ", ".join(f"{name} ({weight:g})" for name, weight in rewards),
                "outcome": get_callable_name(block.outcome) if has_outcome else "",
                "weight": block.weight,
            }
        )
    return rows


def language_card(trainer: Any, **given: Any) -> ModelCard:
    """
    The card of a language model that was trained in blocks: how to load it, the task and its blocks, what
    [`~evaluation.save_results`] left in `output_dir` (accuracy, calibration, how many completions had a confidence, the reliability
    diagram), arguments, cost, citation, and the same for machines.

    Args:
        trainer ([`BlockwiseGRPOTrainer`]):
            The trainer.
        given:
            As in [`~publishing.Publishing.create_model_card`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    args, state, output_dir = trainer.args, trainer.state, Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    base = (model.get_base_model() if lora else model).config._name_or_path or type(model).__name__
    dataset = trainer.train_dataset
    prompt = dataset[0]["prompt"] if isinstance(dataset, datasets.Dataset) else "your prompt"
    names = ["num_generations", "generation_batch_size", "num_iterations", "temperature", "beta", "epsilon",
             "loss_type", "scale_rewards", "baseline", "charge_missing", "min_stratum_size", "shrinkage", "leave_one_out",
             "max_completion_length", "seed"]  # fmt: skip
    sampled = state.global_step * args.generation_batch_size // max(1, args.steps_per_generation * args.num_iterations)
    tokens = {"tokens": int(state.num_input_tokens_seen)} if state.num_input_tokens_seen else {}
    diagram = {"Reliability diagram": "reliability_diagram.png"}
    return _card(
        trainer,
        base,
        lora=lora,
        is_tiny=Path(base) == TINY / "language",
        task="text-generation",
        library="peft" if lora else "transformers",
        own_tags=trainer._tag_names,
        tables=_measures(output_dir, trainer),
        cost={"sampled completions": sampled} | tokens,
        shown={
            "pictures": diagram if (output_dir / "reliability_diagram.png").is_file() else {},
            "code": _language_code(trainer, prompt),
            "example": prompt
            if isinstance(prompt, str)
            else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt),
            "blocks": _blocks(trainer),
            "hyperparameters": _hyperparameters(trainer, state.global_step, names, lora),
            "versions": _versions("trl", "transformers", "torch"),
        },
        **given,
    )
