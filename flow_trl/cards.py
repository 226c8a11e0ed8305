"""Model cards of trained pipelines."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from PIL import Image

from . import __version__
from .loading import active_adapter


_TASKS = {
    (False, False): "text-to-image",
    (False, True): "text-to-video",
    (True, False): "image-to-image",
    (True, True): "image-to-video",
}


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
    return f"pipe({', '.join(arguments)}).{'frames' if policy.makes_videos else 'images'}[0]"


def diffusion_card(
    trainer: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> ModelCard:
    """
    The card of a pipeline that was trained: base model, method, hyperparameters, rewards before and after, sample grid,
    citation.

    Args:
        trainer ([`~trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer.
        model_name (`str`, *optional*):
            Name of the model. Defaults to the name of the repository or of `output_dir`.
        dataset_name (`str`, *optional*):
            Hub id of the data set.
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
    prefix = "eval_" if any("eval_reward" in entry for entry in history) else ""
    scored = [entry for entry in history if f"{prefix}reward" in entry]
    rewards = []
    for name in ["reward", *(f"rewards/{reward}/mean" for reward in trainer.scorer.names)]:
        values = [entry[prefix + name] for entry in scored if prefix + name in entry]
        if values:
            rewards.append({"name": name, "before": values[0], "after": values[-1]})
    grids = [path for path in (output_dir / "images").glob("*.png") if int(path.stem.split("-")[-1]) <= updates]
    grids = sorted(path for path in grids if path.name.startswith("eval")) or sorted(grids)
    tags = [tags] if isinstance(tags, str) else tags or []
    base, tiny_loader = trainer.model_name, _tiny_loader(trainer.model_name)
    denoiser = next(iter(trainer.policy.denoisers.values()))
    has_loader, pipeline_class = hasattr(trainer.pipe, "load_lora_weights"), type(trainer.pipe).__name__
    return ModelCard.from_template(
        ModelCardData(
            base_model=base if "/" in base and not Path(base).is_dir() else None,
            library_name="diffusers",
            pipeline_tag=_TASKS[bool(trainer._sampler.columns), trainer.policy.makes_videos],
            datasets=dataset_name,
            tags=[*(["lora"] if trainer.is_lora else []), "flow-trl", "reinforcement-learning", trainer._name, *tags],
        ),
        template_str=(files("flow_trl") / "templates" / "diffusion_model_card.md").read_text(),
        model_name=model_name or (args.hub_model_id or output_dir.resolve().name).split("/")[-1],
        repo=args.hub_model_id or str(output_dir),
        base_model="flow_trl.tiny" if tiny_loader else base,
        tiny_loader=tiny_loader,
        tiny_class=None if pipeline_class in ("StableDiffusion3Pipeline", "StableDiffusionPipeline") else pipeline_class,
        note=trainer._card_note,
        is_lora=trainer.is_lora,
        pipeline_class=pipeline_class if hasattr(diffusers, pipeline_class) else "DiffusionPipeline",
        call=_call(trainer),
        trainer=type(trainer).__name__,
        method=trainer._name,
        paper=trainer._paper,
        lora=denoiser.peft_config[active_adapter(denoiser)] if trainer.is_lora else None,
        denoisers=list(trainer.policy.denoisers),
        lora_loader="peft" if isinstance(denoiser, PeftModel) else "pipeline" if has_loader else "denoiser",
        hyperparameters={name: getattr(args, name) for name in ["learning_rate", *trainer._card_arguments]},
        updates=updates,
        held_out=bool(prefix),
        rewards=rewards,
        reward_weights=dict(zip(trainer.scorer.names, trainer.scorer.weights.tolist(), strict=True)),
        grid=str(grids[-1].relative_to(output_dir)) if grids else None,
        versions={"flow_trl": __version__, "diffusers": diffusers.__version__,
                  "transformers": transformers.__version__, "torch": torch.__version__},
    )  # fmt: skip
