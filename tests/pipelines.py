"""Small random pipelines of six families: seeded, offline, float32, a few milliseconds per evaluation."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


SIZE = 16  # height and width in pixels, the default of every pipeline here but Wan's, which is always told
VOCABULARY = 1000
WORDS = """a an the of and with on in above below left right beside one two three four small large red blue green
yellow black white circle square triangle star cube ball cat dog house photo image blurry"""
# Qwen-Image's own template: its first 34 tokens are dropped, so each of its words has to be one token.
QWEN_TEMPLATE = """system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial
relationships of the objects and background:\nuser\nassistant\n""".replace("spatial\n", "spatial ")


def clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    words = [[*word[:-1], word[-1] + "</w>"] for word in sorted(WORDS.split(), key=len, reverse=True)]
    merges = dict.fromkeys(("".join(word[:i]), word[i]) for word in words for i in range(1, len(word)))
    pieces = [*alphabet, *(f"{character}</w>" for character in alphabet), *map("".join, merges)]
    tokens = dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *pieces])
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, list(merges), model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS.split()] + [
        (character, -9.0) for character in "▁" + string.printable[:94]
    ]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer().train_new_from_iterator(
        [[QWEN_TEMPLATE, " " + WORDS, *WORDS.split()] * 2],
        VOCABULARY,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )


def clip_text_encoder(projection: bool = True) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text_encoder(config=T5Config, model=T5EncoderModel) -> T5EncoderModel | UMT5EncoderModel:
    return model(config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def vae(latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    """Two pixels of the image are one of the latents."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=SIZE,
        **kwargs,
    )


def unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **kwargs,
    )


def ddim_scheduler(**kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **kwargs,
    )


def randomize(*modules: torch.nn.Module) -> None:
    """Gives every matrix unit gain and every vector some noise: diffusers starts many layers, or their gates, at 0."""
    with torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)


def build(pipeline_class: type, **modules):
    """The pipeline of these modules, with random weights; `build` is called inside `seeded`."""
    modules = {name: module.eval() if hasattr(module, "eval") else module for name, module in modules.items()}
    randomize(*(module for module in modules.values() if isinstance(module, torch.nn.Module)))
    pipe = pipeline_class(**modules)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(builder):
    """Builds from the seed 0, and leaves the global generator as it was."""

    def build_seeded(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return builder(*args, **kwargs)

    return build_seeded


@seeded
def stable_diffusion_3(t5: bool = True) -> StableDiffusion3Pipeline:
    return build(
        StableDiffusion3Pipeline,
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


@seeded
def flux(guidance_embeds: bool = True) -> FluxPipeline:
    pipe = build(
        FluxPipeline,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_text_encoder(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.default_sample_size = SIZE // 2
    return pipe


@seeded
def qwen_image() -> QwenImagePipeline:
    pipe = build(
        QwenImagePipeline,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[0.5, 1.0, 1.5, 2.0],
        ),
        text_encoder=qwen_text_encoder(),
        tokenizer=qwen_tokenizer(),
    )
    pipe.default_sample_size = SIZE // 2
    return pipe


@seeded
def stable_diffusion(**scheduler_kwargs) -> StableDiffusionPipeline:
    return build(
        StableDiffusionPipeline,
        unet=unet(cross_attention_dim=16, attention_head_dim=2),
        scheduler=ddim_scheduler(**scheduler_kwargs),
        vae=vae(),
        text_encoder=clip_text_encoder(projection=False),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def stable_diffusion_xl(**scheduler_kwargs) -> StableDiffusionXLPipeline:
    return build(
        StableDiffusionXLPipeline,
        unet=unet(
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=ddim_scheduler(**scheduler_kwargs),
        vae=vae(),
        text_encoder=clip_text_encoder(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


@seeded
def wan() -> WanPipeline:
    """Text to video, four frames and four pixels to one latent; call it with `height=16, width=16, num_frames=...`."""
    return build(
        WanPipeline,
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[0.5, 1.0, 1.5, 2.0],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        text_encoder=t5_text_encoder(UMT5Config, UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
    )
