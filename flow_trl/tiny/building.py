"""What the build scripts of the tiny world share: arguments, pictures, text, the training of pipelines, and figures."""

import copy
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from tqdm.auto import tqdm, trange
from transformers import AddedToken, CLIPTextConfig, CLIPTokenizer

from ..rewards.ocr import OCRReward
from . import load_prompts, scene_reward
from .scenes import COLORS, NUMBERS, SHAPES, render_scene, render_word, to_array


TAG_WEIGHTS = {"single_object": 1, "two_object": 2, "colors": 2, "counting": 6, "position": 6, "color_attr": 4}
WIDTH = 96  # of the transformer; the two text encoders have half of it each
NUM_TOKENS = 14  # per prompt: the longest one of the tiny world, its start and its end


@dataclass
class CommonArguments:
    """Arguments of every build script."""

    output_dir: str = field(metadata={"help": "Where to write what is built."})
    evaluate_only: str | None = field(
        default=None, metadata={"help": "Folder whose figures to print, instead of building anything."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data, weights, training and evaluation."})


@dataclass
class PipelineArguments(CommonArguments):
    """Arguments of the build scripts of pipelines."""

    num_images: int = field(default=32000, metadata={"help": "Training pictures; 3 of 8 are words."})
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of the evaluation."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of the evaluation."})


def make_data(num_images: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Draws pictures of train prompts in random order: prompts, images `(N, 3, 32, 32)` in [-1, 1]."""
    rng = np.random.default_rng(seed)
    scenes, words = load_prompts("scenes", "train").to_list(), load_prompts("words", "train").to_list()
    counts = {tag: sum(row["tag"] == tag for row in scenes) for tag in TAG_WEIGHTS}
    weights = np.array([TAG_WEIGHTS[row["tag"]] / counts[row["tag"]] for row in scenes])
    num_scenes = num_images * 5 // 8
    rows = [scenes[i] for i in rng.choice(len(scenes), num_scenes, p=weights / weights.sum())]
    rows += [words[i] for i in rng.integers(len(words), size=num_images - num_scenes)]
    rows = [rows[i] for i in rng.permutation(num_images)]
    images = [
        render_word(row["text"], seed=seed + i) if "text" in row else render_scene(row["include"], seed=seed + i)
        for i, row in enumerate(tqdm(rows, desc="pictures"))
    ]
    return [row["prompt"] for row in rows], to_tensor(images)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images as `(N, 3, 32, 32)` in [-1, 1]."""
    return torch.from_numpy(to_array(images)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the latents of images, on the CPU, before scaling."""
    return torch.cat([vae.encode(x.to(vae.device)).latent_dist.mean.cpu() for x in images.split(256)])


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer: the (lower-case) words of the scene prompts are one token each, all else is spelt by letter."""
    symbols = [*string.ascii_lowercase, *string.digits, *'",.']
    tokens = ["<|startoftext|>", "<|endoftext|>", *(s + end for s in symbols for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=NUM_TOKENS
    )
    words = ["photo", "of", "and", "left", "right", "above", "below", "the", "word", *COLORS, *SHAPES]
    words += [n for n in NUMBERS.values() if n != "a"] + [shape + "s" for shape in SHAPES]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    return tokenizer


def make_text_config(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextConfig:
    """A text encoder of two layers for the tiny world's prompts."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=WIDTH * 2,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_denoiser(
    pipe: DiffusionPipeline,
    names: list[str],
    loss_function: Callable[[torch.nn.ModuleList, torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: list[str],
    latents: torch.Tensor,
    steps: int,
    word_share: float,
    learning_rate: float,
) -> None:
    """
    Trains components of a pipeline, its denoiser first, in place; leaves the moving average of the weights.

    `loss_function` is called with them, 128 of the scaled latents `(N, 8, 4, 4)` and tokens `(128, 14)` of their prompts,
    of which one in ten is replaced by the empty prompt, for classifier-free guidance. A share of them are words.
    """
    trained = torch.nn.ModuleList([getattr(pipe, name) for name in names]).train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    ids = pipe.tokenizer([*prompts, ""], padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids
    is_word = torch.tensor([prompt.startswith("the word") for prompt in prompts])
    weights = torch.where(is_word, word_share / is_word.sum(), (1 - word_share) / (~is_word).sum())
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100))
    progress = trange(steps, desc="denoiser")
    for step in progress:
        index = weights.multinomial(128, replacement=True)
        tokens = ids[torch.where(torch.rand(128) < 0.1, len(prompts), index)]
        loss = loss_function(trained, latents[index].to(pipe.device), tokens.to(pipe.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        if step % 20 == 0:
            progress.set_postfix(loss=loss.item())
    trained.load_state_dict(average.state_dict())
    trained.eval()


def _generate(pipe: DiffusionPipeline, prompts: list[str], **settings: float) -> list[Image.Image]:
    """Images of prompts, 256 at a time."""
    generator, images = torch.Generator().manual_seed(0), []
    if isinstance(pipe, StableDiffusion3Pipeline):
        settings["max_sequence_length"] = 0
    for start in range(0, len(prompts), 256):
        images += pipe(prompts[start : start + 256], generator=generator, **settings).images
    return images


def evaluate(pipe: DiffusionPipeline, num_inference_steps: int, guidance_scale: float) -> dict[str, float]:
    """
    Figures of a pipeline on 1000 scenes and 200 words of the test split: strict accuracy (of all and by tag), mean graded
    score, mean OCR score and share of words that are exactly right; all in [0, 1].
    """
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    scenes = load_prompts("scenes", "test").select(range(1000)).to_dict()
    images = _generate(pipe, scenes["prompt"], **settings)
    strict = np.array(scene_reward(strict=True)(images=images, include=scenes["include"], exclude=scenes["exclude"]))
    figures = {"strict scene accuracy": strict.mean()}
    for tag in TAG_WEIGHTS:
        chosen = np.array(scenes["tag"]) == tag
        figures[f"strict scene accuracy, {tag} (n = {chosen.sum()})"] = strict[chosen].mean()
    figures["graded scene score"] = np.mean(scene_reward()(images=images, include=scenes["include"]))
    words = load_prompts("words", "test").select(range(200)).to_dict()
    images = _generate(pipe, words["prompt"], **settings)
    scores = np.array(OCRReward()(prompts=words["prompt"], images=images, text=words["text"]))
    figures["OCR score"], figures["words exactly right"] = scores.mean(), (scores == 1).mean()
    return {name: float(figure) for name, figure in figures.items()}


def print_figures(figures: dict[str, float], folder: str | Path) -> None:
    """Prints a table of figures, and the size of the folder."""
    figures = {**figures, "bytes on disk": sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())}
    print("| figure | value |\n| --- | --- |")
    for name, figure in figures.items():
        print(f"| {name} | {figure:.4g} |" if isinstance(figure, float) else f"| {name} | {figure:,} |")
