"""
Builds the tiny world's `StableDiffusion3Pipeline` from nothing and prints its figures.

```sh
python -m flow_trl.tiny.build_flow --output_dir flow
python -m flow_trl.tiny.build_flow --evaluate_only flow
```

It takes about 40 minutes on two CPU cores; a GPU is used where there is one.
"""

import copy
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tqdm.auto import tqdm, trange
from transformers import AddedToken, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, HfArgumentParser

from . import FLOW_FOLDER, load_flow_pipeline, scene_reward
from .scenes import COLORS, NUMBERS, SHAPES, load_prompts, render_scene, render_word, to_array


TAG_WEIGHTS = {"single_object": 1, "two_object": 2, "colors": 2, "counting": 6, "position": 6, "color_attr": 4}
WIDTH = 96  # of the transformer; the two text encoders have half of it each
NUM_TOKENS = 14  # per prompt: the longest one of the tiny world, its start and its end


@dataclass
class BuildArguments:
    """Arguments of the build script."""

    output_dir: str = field(default=str(FLOW_FOLDER), metadata={"help": "Where to write the pipeline."})
    evaluate_only: str | None = field(
        default=None, metadata={"help": "Folder of a pipeline whose figures to print, instead of building one."}
    )
    num_images: int = field(default=32000, metadata={"help": "Training pictures; 3 of 8 are words."})
    vae_steps: int = field(default=2000, metadata={"help": "Steps of 64 pictures of the autoencoder."})
    flow_steps: int = field(
        default=6000,
        metadata={"help": "Steps of 128 latents of the transformer: 2000 with many words, then mostly scenes."},
    )
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of the evaluation."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of the evaluation."})
    seed: int = field(default=0, metadata={"help": "Seed of pictures, weights and training."})


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


def train_vae(
    images: torch.Tensor, steps: int, device: str, report: Callable[[int, AutoencoderKL], None] | None = None
) -> AutoencoderKL:
    """
    Trains an autoencoder with 4 x 4 x 8 latents on pictures; sets its scaling and shift factors.

    Args:
        images (`torch.Tensor` of shape `(N, 3, 32, 32)`):
            Pictures in [-1, 1].
        steps (`int`):
            Steps of 64 pictures.
        device (`str`):
            Where to train.
        report (`Callable`, *optional*):
            Called with the step and the autoencoder every 250 steps.

    Returns:
        [`~diffusers.AutoencoderKL`]: in evaluation mode, without gradients.

    Example:

    ```python
    >>> vae = train_vae(torch.rand(64, 3, 32, 32) * 2 - 1, steps=2, device="cpu")
    ```
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    progress = trange(steps, desc="autoencoder")
    for step in progress:
        x = images[torch.randint(len(images), (64,))].to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = F.mse_loss(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + 0.1 * F.l1_loss(y, x) + 2e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(squared_error=error.item(), kl=kl.item())
        if report and (step + 1) % 250 == 0:
            report(step + 1, vae)
    vae.eval().requires_grad_(False)
    latents = encode(vae, images[:4096])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


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


def _make_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A pipeline with an untrained transformer and text encoders around a trained autoencoder."""
    tokenizer = make_tokenizer()
    config = make_text_config(tokenizer, hidden_size=WIDTH // 2)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():  # each block starts as the identity, as in DiT
        if name.split(".")[-2] == "linear" or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flow_loss(trained: torch.nn.ModuleList, data: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rectified flow of a transformer and two text encoders, on latents `(B, 8, 4, 4)` and tokens `(B, 14)`."""
    noise, sigma = torch.randn_like(data), torch.randn(len(data), device=data.device).sigmoid()
    encoded = [encoder(tokens, output_hidden_states=True) for encoder in trained[1:]]
    velocity = trained[0](
        hidden_states=torch.lerp(data, noise, sigma[:, None, None, None]),
        timestep=sigma * 1000,
        encoder_hidden_states=torch.cat([e.hidden_states[-2] for e in encoded], -1),
        pooled_projections=torch.cat([e.text_embeds for e in encoded], -1),
    ).sample
    return F.mse_loss(velocity, noise - data)


def train_denoiser(
    pipe: DiffusionPipeline,
    names: list[str],
    loss_function: Callable[[torch.nn.ModuleList, torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: list[str],
    latents: torch.Tensor,
    steps: int,
    word_share: float,
    learning_rate: float,
    report: Callable[[int, DiffusionPipeline], None] | None = None,
) -> None:
    """
    Trains denoiser and text encoders of a pipeline; leaves the moving average of the weights.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            Trained in place.
        names (`list[str]`):
            The components that are trained.
        loss_function (`Callable`):
            Called with these components, latents `(128, 8, 4, 4)` and tokens `(128, 14)`, such as `flow_loss`.
        prompts (`list[str]`):
            One per latent; one in ten is replaced by the empty prompt, for classifier-free guidance.
        latents (`torch.Tensor` of shape `(N, 8, 4, 4)`):
            Scaled latents of pictures.
        steps (`int`):
            Steps of 128 latents.
        word_share (`float`):
            Share of words among them.
        learning_rate (`float`):
            Of AdamW, after 100 steps of warm-up.
        report (`Callable`, *optional*):
            Called with the step and the pipeline with averaged weights every 500 steps.

    Example:

    ```python
    >>> pipe, names = load_flow_pipeline(), ["transformer", "text_encoder", "text_encoder_2"]
    >>> latents = torch.randn(1, 8, 4, 4)
    >>> train_denoiser(pipe, names, flow_loss, ["a photo of a circle"], latents, 2, word_share=0, learning_rate=1e-4)
    ```
    """
    trained = torch.nn.ModuleList([getattr(pipe, name) for name in names]).train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    averaged = pipe.__class__(**{**pipe.components, **dict(zip(names, average, strict=True))})
    averaged.set_progress_bar_config(disable=True)
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
        if report and (step + 1) % 500 == 0:
            report(step + 1, averaged)
    trained.load_state_dict(average.state_dict())
    trained.eval()


def generate(
    pipe: DiffusionPipeline, prompts: list[str], num_inference_steps: int, guidance_scale: float, seed: int = 0
) -> list[Image.Image]:
    """
    Draws images for prompts, 256 at a time.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            A pipeline of the tiny world.
        prompts (`list[str]`):
            One per image.
        num_inference_steps (`int`):
            Denoising steps.
        guidance_scale (`float`):
            Classifier-free guidance; 1 is none.
        seed (`int`, *optional*, defaults to `0`):
            Of the initial latents.

    Returns:
        `list[PIL.Image.Image]`: 32 x 32, as many as prompts.

    Example:

    ```python
    >>> generate(load_flow_pipeline(), ["a photo of a red circle"], num_inference_steps=10, guidance_scale=2.0)
    [<PIL.Image.Image image mode=RGB size=32x32>]
    ```
    """
    generator, images = torch.Generator().manual_seed(seed), []
    options = {"max_sequence_length": 0} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    for start in range(0, len(prompts), 256):
        images += pipe(
            prompts[start : start + 256],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            **options,
        ).images
    return images


def evaluate(
    pipe: DiffusionPipeline,
    num_inference_steps: int = 10,
    guidance_scale: float = 2.0,
    num_scenes: int = 1000,
    num_words: int = 200,
) -> dict[str, float]:
    """
    Measures a pipeline on test prompts.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            A pipeline of the tiny world.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps.
        guidance_scale (`float`, *optional*, defaults to `2.0`):
            Classifier-free guidance; 1 is none.
        num_scenes (`int`, *optional*, defaults to `1000`):
            Prompts of scenes, at most 1087.
        num_words (`int`, *optional*, defaults to `200`):
            Prompts of words, at most 1000; 0 leaves out OCR.

    Returns:
        `dict[str, float]`: strict accuracy (of all and by tag), mean graded score, mean OCR score and share of words
        that are exactly right; all in [0, 1].

    Example:

    ```python
    >>> evaluate(load_flow_pipeline(), num_scenes=100)["strict scene accuracy"]
    0.5
    ```
    """
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    scenes = load_prompts("scenes", "test").select(range(num_scenes)).to_dict()
    images = generate(pipe, scenes["prompt"], **settings)
    strict = np.array(scene_reward(strict=True)(images=images, include=scenes["include"], exclude=scenes["exclude"]))
    figures = {"strict scene accuracy": strict.mean()}
    for tag in TAG_WEIGHTS:
        chosen = np.array(scenes["tag"]) == tag
        if chosen.any():
            figures[f"strict scene accuracy, {tag} (n = {chosen.sum()})"] = strict[chosen].mean()
    figures["graded scene score"] = float(np.mean(scene_reward()(images=images, include=scenes["include"])))
    if num_words:
        from ..rewards.ocr import OCRReward

        words = load_prompts("words", "test").select(range(num_words)).to_dict()
        images = generate(pipe, words["prompt"], **settings)
        scores = np.array(OCRReward()(prompts=words["prompt"], images=images, text=words["text"]))
        figures["OCR score"], figures["words exactly right"] = scores.mean(), (scores == 1).mean()
    return {name: float(figure) for name, figure in figures.items()}


@torch.no_grad()
def _evaluate_parts(pipe: StableDiffusion3Pipeline) -> dict[str, float]:
    """Figures of the autoencoder and the detector on ground-truth pictures of test prompts, and the sizes of models."""
    from ..rewards.ocr import OCRReward

    rows, words = load_prompts("scenes", "test").to_dict(), load_prompts("words", "test")["text"][:200]
    include, exclude = ((rows[column] * 2)[:1000] for column in ("include", "exclude"))
    scenes = [render_scene(row, seed=10**6 + i) for i, row in enumerate(include)]
    right = scene_reward(strict=True)(images=scenes, include=include, exclude=exclude)
    figures = {"detector accuracy on ground truth": float(np.mean(right))}
    texts = [render_word(word, seed=10**6 + i) for i, word in enumerate(words)]
    for name, images in (("scenes", scenes[:200]), ("words", texts)):
        x = to_tensor(images).to(pipe.device)
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
        figures[f"squared error of the autoencoder, {name} in [-1, 1]"] = F.mse_loss(y, x).item()
        decoded = pipe.image_processor.postprocess(y)
        if name == "words":
            ocr = OCRReward()
            figures["OCR score of ground truth"] = float(np.mean(ocr(images=texts, text=words, prompts=words)))
            figures["OCR score after the autoencoder"] = float(np.mean(ocr(images=decoded, text=words, prompts=words)))
        else:
            figures["strict accuracy after the autoencoder"] = float(
                np.mean(scene_reward(strict=True)(images=decoded, include=include[:200], exclude=exclude[:200]))
            )
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        figures[f"parameters of {name}"] = sum(p.numel() for p in getattr(pipe, name).parameters())
    return figures


def print_figures(figures: dict[str, float], folder: str) -> None:
    """Prints a table of figures, and the size of the folder."""
    figures = {**figures, "bytes on disk": sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())}
    print("| figure | value |\n| --- | --- |")
    for name, figure in figures.items():
        print(f"| {name} | {figure:.4g} |" if isinstance(figure, float) else f"| {name} | {figure:,} |")


def main(args: BuildArguments) -> None:
    """Builds a pipeline, unless there is one to evaluate, and prints a table of its figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.evaluate_only or args.output_dir
    if args.evaluate_only is None:
        torch.manual_seed(args.seed)
        prompts, images = make_data(args.num_images, args.seed)
        pipe = _make_pipeline(train_vae(images, args.vae_steps, device)).to(device)
        latents = (encode(pipe.vae, images) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        first = min(args.flow_steps, 2000)
        train = partial(
            train_denoiser, pipe, ["transformer", "text_encoder", "text_encoder_2"], flow_loss, prompts, latents
        )
        train(first, word_share=0.375, learning_rate=1e-3)
        train(args.flow_steps - first, word_share=0.1, learning_rate=2e-3)
        pipe.to(dtype=torch.float16).save_pretrained(folder)
    pipe = load_flow_pipeline(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    figures = {**evaluate(pipe, args.num_inference_steps, args.guidance_scale), **_evaluate_parts(pipe)}
    print_figures(figures, folder)


if __name__ == "__main__":
    main(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])
