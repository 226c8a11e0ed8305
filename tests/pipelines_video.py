"""Small random pipelines: video."""

from types import SimpleNamespace

import numpy as np
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import is_ftfy_available
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.pipeline_case import Case
from tests.pipelines import (
    SIZE,
    VOCABULARY,
    build,
    clip_text_encoder,
    clip_tokenizer,
    qwen_text_encoder,
    qwen_tokenizer,
    seeded,
    t5_text_encoder,
    t5_tokenizer,
    wan,
)


if not is_ftfy_available():  # the class does not look, and calls it for every prompt
    pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)

IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for seed in (0, 1)
]


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[0.5, 1.0, 1.5, 2.0],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


@seeded
def wan_experts() -> WanPipeline:
    """Wan 2.2 A14B, one denoiser for the first steps and one for the others."""
    modules = wan().components
    transformers = {name: WanTransformer3DModel.from_config(modules["transformer"].config) for name in EXPERTS}
    return build(WanPipeline, **{**modules, **transformers}, boundary_ratio=0.875)


@seeded
def wan_image_to_video(expand_timesteps: bool = False) -> WanImageToVideoPipeline:
    """Wan 2.1, which is given the image as channels and as CLIP's features; or 2.2 TI2V 5B, whose first frame it is."""
    of_image = {} if expand_timesteps else {"image_dim": 16, "added_kv_proj_dim": 24}
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        )
    )
    return build(
        WanImageToVideoPipeline,
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4 if expand_timesteps else 12,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            **of_image,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(),
        text_encoder=t5_text_encoder(UMT5Config, UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
        image_encoder=None if expand_timesteps else image_encoder,
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        expand_timesteps=expand_timesteps,
    )


@seeded
def ltx(timestep_conditioning: bool = False) -> LTXPipeline:
    """Two frames and eight pixels to one latent; call it with `height=32, width=32`, of which it wants multiples."""
    return build(
        LTXPipeline,
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            num_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False),
            downsample_type=("conv", "conv"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            timestep_conditioning=timestep_conditioning,
        ),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )


@seeded
def mochi() -> MochiPipeline:
    """Six frames and eight pixels to one latent; call it with `height=32, width=32, num_frames=7`."""
    return build(
        MochiPipeline,
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=8,
            max_sequence_length=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )


@seeded
def cogvideox() -> CogVideoXPipeline:
    """Four frames and four pixels to one latent."""
    return build(
        CogVideoXPipeline,
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=SIZE // 4,
            sample_height=SIZE // 4,
            sample_frames=5,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(4, 4, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """Four frames and eight pixels to one latent."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )


@seeded
def hunyuan_video() -> HunyuanVideoPipeline:
    """Call it with `prompt_template=...`, whose first tokens are dropped."""
    return build(
        HunyuanVideoPipeline,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=hunyuan_vae(),
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip_text_encoder(projection=False),
        tokenizer_2=clip_tokenizer(),
    )


@seeded
def kandinsky5(visual_cond: bool = False) -> Kandinsky5T2VPipeline:
    pipe = build(
        Kandinsky5T2VPipeline,
        transformer=Kandinsky5Transformer3DModel(
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 2, 2),
            visual_cond=visual_cond,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=hunyuan_vae(),
        text_encoder=qwen_text_encoder(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip_text_encoder(projection=False),
        tokenizer_2=clip_tokenizer(),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "system image: user {}", 2
    return pipe


@seeded
def sana_video() -> SanaVideoPipeline:
    """Call it with `use_resolution_binning=False` and a size that is a multiple of 32."""
    return build(
        SanaVideoPipeline,
        transformer=SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
        vae=wan_vae(),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        tokenizer=qwen_tokenizer(),
    )


VIDEO = {"height": SIZE, "width": SIZE, "num_frames": 5}
LARGE = {"height": 32, "width": 32, "num_frames": 5}
WORDS = {"prompt_template": {"template": "system image: user {}", "crop_start": 2}, "max_sequence_length": 16}

EXPERTS = ("transformer", "transformer_2")
CASES: dict[str, Case] = {
    "WanImageToVideoPipeline": Case(wan_image_to_video, VIDEO, columns={"image": IMAGES}),
    "WanImageToVideoPipeline-2.2": Case(
        lambda: wan_image_to_video(expand_timesteps=True), VIDEO, columns={"image": IMAGES}
    ),
    "WanPipeline-2.2": Case(wan_experts, VIDEO),
    "LTXPipeline": Case(ltx, LARGE),
    "LTXPipeline-0.9.1": Case(lambda: ltx(timestep_conditioning=True), LARGE),
    "MochiPipeline": Case(mochi, {**LARGE, "num_frames": 7, "max_sequence_length": 32}),
    "CogVideoXPipeline": Case(cogvideox, {**VIDEO, "max_sequence_length": 16}),
    "HunyuanVideoPipeline": Case(hunyuan_video, {**LARGE, **WORDS}),
    "HunyuanVideoPipeline-true-cfg": Case(hunyuan_video, {**LARGE, **WORDS, "true_cfg_scale": 3.0}),
    "Kandinsky5T2VPipeline": Case(kandinsky5, LARGE),
    "SanaVideoPipeline": Case(
        sana_video,
        {
            "height": 32,
            "width": 32,
            "frames": 5,
            "use_resolution_binning": False,
            "max_sequence_length": 32,
            "complex_human_instruction": None,
        },
    ),
}
