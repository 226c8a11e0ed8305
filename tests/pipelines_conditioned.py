"""Small random pipelines: conditioned."""

from functools import partial
from inspect import signature

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import ProcessorMixin, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.pipeline_case import Case
from tests.pipelines import (
    SIZE,
    flux,
    qwen_image,
    randomize,
    seeded,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unet,
)


# Qwen-Image's editing scales every image to an area of 1024 x 1024 or 384 x 384 pixels.
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (SIZE, SIZE, None)
pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: (SIZE, SIZE)


class QwenProcessor(Qwen2VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def image(seed: int, size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(seed: int) -> Image.Image:
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pixels[4 * seed :, 4:] = 255
    return Image.fromarray(pixels)


def images(first: int = 0) -> list[Image.Image]:
    return [image(first), image(first + 1)]


def rebuilt(pipeline_class: type, pipe, **modules):
    """Another class of pipeline with the modules of this one, and with others, which get random weights."""
    randomize(*(module.eval() for module in modules.values() if isinstance(module, torch.nn.Module)))
    parts = {**pipe.components, "requires_safety_checker": False, **modules}
    made = pipeline_class(**{name: parts[name] for name in signature(pipeline_class).parameters if name in parts})
    made.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):
        made.default_sample_size = pipe.default_sample_size
    return made


@seeded
def stable_diffusion_3_img2img() -> StableDiffusion3Img2ImgPipeline:
    return rebuilt(StableDiffusion3Img2ImgPipeline, stable_diffusion_3())


@seeded
def flux_img2img() -> FluxImg2ImgPipeline:
    return rebuilt(FluxImg2ImgPipeline, flux())


@seeded
def flux_kontext() -> FluxKontextPipeline:
    return rebuilt(FluxKontextPipeline, flux())


@seeded
def flux_fill() -> FluxFillPipeline:
    pipe = flux()
    config = {**pipe.transformer.config, "in_channels": 16 + 16 + 16, "out_channels": 16}
    return rebuilt(FluxFillPipeline, pipe, transformer=FluxTransformer2DModel(**config))


def controlnet(unet, **kwargs) -> ControlNetModel:
    return ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False, **kwargs
    )


@seeded
def stable_diffusion_controlnet() -> StableDiffusionControlNetPipeline:
    pipe = stable_diffusion()
    return rebuilt(StableDiffusionControlNetPipeline, pipe, controlnet=controlnet(pipe.unet))


@seeded
def stable_diffusion_xl_controlnet() -> StableDiffusionXLControlNetPipeline:
    pipe = stable_diffusion_xl()
    return rebuilt(StableDiffusionXLControlNetPipeline, pipe, controlnet=controlnet(pipe.unet))


@seeded
def flux_controlnet() -> FluxControlNetPipeline:
    pipe = flux()
    net = FluxControlNetModel.from_transformer(pipe.transformer, 1, 1, 8, 2, load_weights_from_transformer=False)
    return rebuilt(FluxControlNetPipeline, pipe, controlnet=net)


@seeded
def stable_diffusion_3_controlnet() -> StableDiffusion3ControlNetPipeline:
    pipe = stable_diffusion_3()
    net = SD3ControlNetModel.from_transformer(
        pipe.transformer, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    return rebuilt(StableDiffusion3ControlNetPipeline, pipe, controlnet=net)


@seeded
def stable_diffusion_inpaint(in_channels: int = 9) -> StableDiffusionInpaintPipeline:
    """With 9 channels, its denoiser is given the mask and the masked image; with 4, its loop puts the image in."""
    return rebuilt(
        StableDiffusionInpaintPipeline,
        stable_diffusion(),
        unet=unet(in_channels=in_channels, cross_attention_dim=16, attention_head_dim=2),
    )


@seeded
def qwen_image_edit(pipeline_class=QwenImageEditPipeline) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    pipe = qwen_image()
    tokens = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    pipe.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    processor = QwenProcessor(Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2), pipe.tokenizer)
    config = pipe.text_encoder.config
    config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, config.video_token_id = (
        pipe.tokenizer.convert_tokens_to_ids(tokens)
    )
    return rebuilt(pipeline_class, pipe, processor=processor)


CASES: dict[str, Case] = {
    "StableDiffusion3Img2ImgPipeline": Case(
        stable_diffusion_3_img2img, {"strength": 0.6}, columns={"image": images()}
    ),
    "FluxImg2ImgPipeline": Case(flux_img2img, {"strength": 0.6}, columns={"image": images()}),
    "FluxKontextPipeline": Case(
        flux_kontext, {"max_area": SIZE**2, "_auto_resize": False}, columns={"image": images()}
    ),
    "FluxFillPipeline": Case(flux_fill, {}, columns={"image": images(), "mask_image": [mask(0), mask(1)]}),
    "StableDiffusionControlNetPipeline": Case(stable_diffusion_controlnet, {}, columns={"image": images()}),
    "StableDiffusionXLControlNetPipeline": Case(stable_diffusion_xl_controlnet, {}, columns={"image": images()}),
    "FluxControlNetPipeline": Case(flux_controlnet, {}, columns={"control_image": images()}),
    "StableDiffusion3ControlNetPipeline": Case(stable_diffusion_3_controlnet, {}, columns={"control_image": images()}),
    "StableDiffusionInpaintPipeline": Case(
        stable_diffusion_inpaint,
        {"strength": 1.0},
        columns={"image": images(), "mask_image": [mask(0), mask(1)]},
    ),
    "QwenImageEditPipeline": Case(qwen_image_edit, {"height": SIZE, "width": SIZE}, columns={"image": images()}),
    "QwenImageEditPlusPipeline": Case(
        partial(qwen_image_edit, QwenImageEditPlusPipeline),
        {"height": SIZE, "width": SIZE},
        columns={"image": [images(), [image(2)]]},
    ),
}
