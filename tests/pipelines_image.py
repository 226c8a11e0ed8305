"""Small random pipelines: image."""

from functools import partial

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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
    ddim_scheduler,
    qwen_text_encoder,
    qwen_tokenizer,
    seeded,
    t5_text_encoder,
    t5_tokenizer,
    vae,
)


TEXT_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def glm_tokenizer() -> Qwen2Tokenizer:
    """Begins each text with a token, so that the empty one has a token too."""
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    start = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    return tokenizer


def flux_vae(**kwargs) -> AutoencoderKL:
    return vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4, **kwargs)


@seeded
def pixart_sigma() -> PixArtSigmaPipeline:
    return build(
        PixArtSigmaPipeline,
        transformer=PixArtTransformer2DModel(
            sample_size=SIZE // 2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        scheduler=ddim_scheduler(),
        vae=vae(),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )


@seeded
def sana() -> SanaPipeline:
    """Call it with `height=32, width=32`, of which it wants multiples."""
    return build(
        SanaPipeline,
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=SIZE,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            scaling_factor=0.4,
        ),
        text_encoder=Gemma2Model(Gemma2Config(**TEXT_CONFIG)),
        tokenizer=qwen_tokenizer(),
    )


@seeded
def aura_flow() -> AuraFlowPipeline:
    return build(
        AuraFlowPipeline,
        transformer=AuraFlowTransformer2DModel(
            sample_size=SIZE // 2,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(),
        text_encoder=t5_text_encoder(UMT5Config, UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
    )


@seeded
def chroma() -> ChromaPipeline:
    pipe = build(
        ChromaPipeline,
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux_vae(),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )
    pipe.default_sample_size = SIZE // 2
    return pipe


@seeded
def cogview4() -> CogView4Pipeline:
    return build(
        CogView4Pipeline,
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=SIZE // 2,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        vae=vae(),
        text_encoder=GlmModel(GlmConfig(**TEXT_CONFIG)),
        tokenizer=glm_tokenizer(),
    )


@seeded
def lumina2() -> Lumina2Pipeline:
    """Eight pixels to one latent, and images of 32 pixels."""
    return build(
        Lumina2Pipeline,
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
        text_encoder=Gemma2Model(Gemma2Config(**TEXT_CONFIG)),
        tokenizer=qwen_tokenizer(),
    )


@seeded
def z_image() -> ZImagePipeline:
    return build(
        ZImagePipeline,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
            axes_lens=[128, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**TEXT_CONFIG)),
        tokenizer=chat_tokenizer(),
    )


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIZE,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


@seeded
def flux2_klein() -> Flux2KleinPipeline:
    """Call it with `text_encoder_out_layers=(1, 2)`."""
    pipe = build(
        Flux2KleinPipeline,
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TEXT_CONFIG)),
        tokenizer=chat_tokenizer(),
    )
    pipe.default_sample_size = SIZE // 2
    return pipe


@seeded
def flux2() -> Flux2Pipeline:
    """Call it with `text_encoder_out_layers=(1, 2)`."""
    pipe = build(
        Flux2Pipeline,
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config={"model_type": "mistral", **TEXT_CONFIG},
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 4,
                },
            )
        ),
        tokenizer=chat_tokenizer(),  # of a `PixtralProcessor`, only `apply_chat_template` is used for text
    )
    pipe.default_sample_size = SIZE // 2
    return pipe


@seeded
def hidream_image() -> HiDreamImagePipeline:
    """Call it with `max_sequence_length=32`."""
    pipe = build(
        HiDreamImagePipeline,
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**TEXT_CONFIG, attn_implementation="eager")),
        tokenizer_4=qwen_tokenizer(),
    )
    pipe.default_sample_size = SIZE // 2
    # Routed experts have gradients in training mode alone, in which the whole transformer has another output.
    pipe.transformer.train().training = False
    return pipe


@seeded
def hunyuan_image(momentum: float | None = None, distilled: bool = False) -> HunyuanImagePipeline:
    """A momentum, as the real model has it from its seventh step on, makes guidance depend on earlier latents."""
    guider = AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_start_step=0, adaptive_projected_guidance_momentum=momentum
    )
    pipe = build(
        HunyuanImagePipeline,
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=distilled,
            use_meanflow=distilled,
            text_embed_dim=16,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=SIZE,
            scaling_factor=0.75,
        ),
        text_encoder=qwen_text_encoder(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_text_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        guider=None if distilled else guider,
    )
    pipe.default_sample_size = SIZE // 2
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 64
    return pipe


CASES: dict[str, Case] = {
    "PixArtSigmaPipeline": Case(pixart_sigma, {"use_resolution_binning": False}),
    "SanaPipeline": Case(sana, {"height": 32, "width": 32, "use_resolution_binning": False}),
    "AuraFlowPipeline": Case(aura_flow, {"height": SIZE, "width": SIZE}),
    "ChromaPipeline": Case(chroma, {}),
    "CogView4Pipeline": Case(cogview4, {}),
    "Lumina2Pipeline": Case(lumina2, {}),
    "ZImagePipeline": Case(z_image, {"height": SIZE, "width": SIZE}, guidance=(4.0, 0.0)),
    "Flux2KleinPipeline": Case(flux2_klein, {"text_encoder_out_layers": (1, 2)}),
    "Flux2Pipeline": Case(flux2, {"text_encoder_out_layers": (1, 2)}),
    "HiDreamImagePipeline": Case(hidream_image, {"max_sequence_length": 32}),
    "HunyuanImagePipeline": Case(hunyuan_image, {}, guidance=(None, None)),
    "HunyuanImagePipeline-distilled": Case(partial(hunyuan_image, distilled=True), {}, guidance=(None, None)),
}
