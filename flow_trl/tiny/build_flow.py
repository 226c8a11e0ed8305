"""
Builds the tiny world's `StableDiffusion3Pipeline` from nothing and prints its figures.

```sh
python -m flow_trl.tiny.build_flow --output_dir flow
python -m flow_trl.tiny.build_flow --evaluate_only flow
```

It takes about 40 minutes on two CPU cores; a GPU is used where there is one.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm.auto import trange
from transformers import CLIPTextModelWithProjection, HfArgumentParser

from ..rewards.ocr import OCRReward
from . import FLOW_FOLDER, load_flow_pipeline, load_prompts, scene_reward
from .building import (
    WIDTH,
    PipelineArguments,
    encode,
    evaluate,
    make_data,
    make_text_config,
    make_tokenizer,
    print_figures,
    to_tensor,
    train_denoiser,
)
from .scenes import render_scene, render_word


@dataclass
class BuildArguments(PipelineArguments):
    """Arguments of this script."""

    output_dir: str = field(default=str(FLOW_FOLDER), metadata={"help": "Where to write the pipeline."})
    vae_steps: int = field(default=2000, metadata={"help": "Steps of 64 pictures of the autoencoder."})
    flow_steps: int = field(
        default=6000,
        metadata={"help": "Steps of 128 latents of the transformer: 2000 with many words, then mostly scenes."},
    )


def train_vae(images: torch.Tensor, steps: int, device: str) -> AutoencoderKL:
    """An autoencoder with 4 x 4 x 8 latents, trained on pictures, with its scaling and shift factors; without gradients."""
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
    vae.eval().requires_grad_(False)
    latents = encode(vae, images[:4096])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


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


@torch.no_grad()
def _evaluate_parts(pipe: StableDiffusion3Pipeline) -> dict[str, float]:
    """Figures of the autoencoder and the detector on ground-truth pictures of test prompts, and the sizes of models."""
    rows, words = load_prompts("scenes", "test").to_dict(), load_prompts("words", "test")["text"][:200]
    include, exclude = ((rows[column] * 2)[:1000] for column in ("include", "exclude"))
    scenes = [render_scene(row, seed=10**6 + i) for i, row in enumerate(include)]
    strict, ocr, decoded = scene_reward(strict=True), OCRReward(), {}
    figures = {"detector accuracy on ground truth": np.mean(strict(images=scenes, include=include, exclude=exclude))}
    texts = [render_word(word, seed=10**6 + i) for i, word in enumerate(words)]
    for name, images in (("scenes", scenes[:200]), ("words", texts)):
        x = to_tensor(images).to(pipe.device)
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
        figures[f"squared error of the autoencoder, {name} in [-1, 1]"] = F.mse_loss(y, x).item()
        decoded[name] = pipe.image_processor.postprocess(y)
    right = strict(images=decoded["scenes"], include=include[:200], exclude=exclude[:200])
    figures["strict accuracy after the autoencoder"] = np.mean(right)
    figures["OCR score of ground truth"] = np.mean(ocr(images=texts, text=words, prompts=words))
    figures["OCR score after the autoencoder"] = np.mean(ocr(images=decoded["words"], text=words, prompts=words))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        figures[f"parameters of {name}"] = getattr(pipe, name).num_parameters()
    return figures


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
