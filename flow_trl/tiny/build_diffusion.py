"""
Builds the tiny world's `StableDiffusionPipeline` around the flow model's autoencoder, and prints its figures.

```sh
python -m flow_trl.tiny.build_diffusion --output_dir diffusion
python -m flow_trl.tiny.build_diffusion --evaluate_only diffusion
```

It takes about 40 minutes on one CPU core; a GPU is used where there is one.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, HfArgumentParser

from . import DIFFUSION_FOLDER, FLOW_FOLDER, load_diffusion_pipeline
from .building import (
    WIDTH,
    PipelineArguments,
    encode,
    evaluate,
    make_data,
    make_text_config,
    make_tokenizer,
    print_figures,
    train_denoiser,
)


@dataclass
class BuildArguments(PipelineArguments):
    """Arguments of this script."""

    output_dir: str = field(default=str(DIFFUSION_FOLDER), metadata={"help": "Where to write the pipeline."})
    flow_folder: str = field(
        default=str(FLOW_FOLDER), metadata={"help": "Pipeline of `build_flow`, whose autoencoder is taken."}
    )
    steps: int = field(
        default=6000,
        metadata={"help": "Steps of 128 latents of the UNet: a quarter with many words, the last sixth to settle."},
    )


def make_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """A pipeline with an untrained UNet and text encoder, and the noise schedule of Stable Diffusion 1.x with DDIM."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(make_text_config(tokenizer, hidden_size=WIDTH))
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=3,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def noise_loss(
    scheduler: DDIMScheduler, trained: torch.nn.ModuleList, data: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Squared error of the predicted noise of a UNet with a text encoder, on latents and tokens."""
    noise, timesteps = torch.randn_like(data), torch.randint(1000, (len(data),), device=data.device)
    noisy = scheduler.add_noise(data, noise, timesteps)
    return F.mse_loss(trained[0](noisy, timesteps, trained[1](tokens)[0]).sample, noise)


def main(args: BuildArguments) -> None:
    """Builds a pipeline, unless there is one to evaluate, and prints a table of its figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.evaluate_only or args.output_dir
    if args.evaluate_only is None:
        torch.manual_seed(args.seed)
        prompts, images = make_data(args.num_images, args.seed)
        vae = AutoencoderKL.from_pretrained(args.flow_folder, subfolder="vae", dtype=torch.float32)
        pipe = make_pipeline(vae.eval().requires_grad_(False)).to(device)
        latents = encode(vae, images) * vae.config.scaling_factor
        loss_function = partial(noise_loss, pipe.scheduler)
        train = partial(train_denoiser, pipe, ["unet", "text_encoder"], loss_function, prompts, latents)
        train(args.steps // 4, word_share=0.375, learning_rate=1e-3)
        train(args.steps - args.steps // 4 - args.steps // 6, word_share=0.1, learning_rate=2e-3)
        train(args.steps // 6, word_share=0.2, learning_rate=5e-4)
        pipe.to(dtype=torch.float16).save_pretrained(folder)
    pipe = load_diffusion_pipeline(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    figures = evaluate(pipe, args.num_inference_steps, args.guidance_scale)
    figures |= {f"parameters of {name}": getattr(pipe, name).num_parameters() for name in ("unet", "text_encoder")}
    print_figures(figures, folder)


if __name__ == "__main__":
    main(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])
