import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from peft import LoraConfig
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

from flow_trl.loading import load_pipeline, prepare_denoisers
from flow_trl.policy import PipelinePolicy
from tests import pipelines
from tests.pipelines_video import wan_experts
from tests.trainer.runs import logged, make_trainer, weights


LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])


def prepare(pipe, peft_config=LORA):
    return prepare_denoisers(pipe, PipelinePolicy(pipe).denoisers, peft_config)


def test_only_the_adapter_is_trained():
    pipe = pipelines.stable_diffusion_3(t5=False)
    assert prepare(pipe)
    trained = {name for name, weight in pipe.transformer.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert not any(weight.requires_grad for weight in pipe.vae.parameters())


def two_adapters(pipe):
    pipe.transformer.add_adapter(LORA, "one")
    pipe.transformer.add_adapter(LORA, "two")
    pipe.transformer.set_adapter(["one", "two"])


def half_strength(pipe):
    pipe.transformer.add_adapter(LORA, "one")
    pipe.set_adapters("one", 0.5)


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer)


def offloaded(pipe):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.vae, torch.device("cpu"))


def spread(pipe):
    pipe.hf_device_map = {"transformer": 0}


def fused(pipe):
    pipe.transformer.add_adapter(LORA, "one")
    pipe.fuse_lora()


def in_the_text_encoder(pipe):
    pipe.text_encoder.peft_config = {"one": LORA}


def hooked(pipe):
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float16)


def quantised(pipe):
    pipe.transformer.is_quantized = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_adapters, "active adapters \\['one', 'two'\\], but one is trained"),
        (half_strength, "adapter `one` of `model` has the strength 0.5"),
        (compiled, "compiled by `torch.compile.*`model.transformer.compile\\(\\)` instead"),
        (offloaded, "hook that moves its `vae` to the CPU.*offload_text_encoders=True"),
        (spread, "spread over devices"),
        (fused, "adapter `one` of `model` is fused.*`pipe.unload_lora_weights\\(\\)`"),
        (in_the_text_encoder, "LoRA in its `text_encoder`, which would not be saved"),
        (hooked, "hook of diffusers in its `vae`"),
        (quantised, "`model.transformer` is quantised.*pass a `peft_config`"),
    ],
)
def test_what_would_be_trained_in_vain_is_refused(change, message):
    pipe = pipelines.stable_diffusion_3(t5=False)
    change(pipe)
    with pytest.raises(ValueError, match=message):
        prepare(pipe, None)


def test_an_adapter_in_one_of_two_denoisers():
    pipe = wan_experts()
    pipe.transformer_2.add_adapter(LORA)
    with pytest.raises(ValueError, match="adapter in \\['transformer_2'\\] and none in its other denoiser"):
        prepare(pipe)


def test_compiled_in_place():
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.transformer.compile()
    assert prepare(pipe)


def test_a_folder_saved_without_a_component(tmp_path):
    pipelines.stable_diffusion_3(t5=False).save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), torch.float32, {}).text_encoder_3 is None


def test_a_quantised_base_with_a_lora_on_top(tmp_path):
    """The base keeps its integers, the adapter is trained."""
    pipelines.stable_diffusion_3(t5=False).save_pretrained(tmp_path)
    to_integers = {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
    init_kwargs = {"quantization_config": PipelineQuantizationConfig(quant_mapping=to_integers)}
    pipe = load_pipeline(str(tmp_path), torch.float32, init_kwargs)
    with pytest.raises(ValueError, match="`model.transformer` is quantised.*pass a `peft_config`"):
        prepare(pipe, None)
    trainer = make_trainer(tmp_path / "out", "flow", pipe=pipe, max_steps=1, check_pipeline=True)
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 0
    base = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert isinstance(base, Int8Tensor) and all("lora" in name for name in trainer._trained)
    assert logged(trainer, "ratio/max_deviation")[0] <= 1e-4
