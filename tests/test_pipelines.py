import numpy as np
import pytest
import torch

from flow_trl.policy import PipelinePolicy
from tests import pipelines


BUILDERS = ["stable_diffusion_3", "flux", "qwen_image", "stable_diffusion", "stable_diffusion_xl", "wan"]


def draw(pipe):
    kwargs = {"height": 16, "width": 16, "num_frames": 5} if isinstance(pipe, pipelines.WanPipeline) else {}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="np", **kwargs)[0]


@pytest.mark.parametrize("builder", BUILDERS)
def test_building_twice_gives_the_same_pipeline(builder):
    build = getattr(pipelines, builder)
    state = torch.random.get_rng_state()
    assert np.array_equal(draw(build()), draw(build()))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("builder", BUILDERS)
def test_saving_and_loading(builder, tmp_path):
    pipe = getattr(pipelines, builder)()
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    if builder in ("flux", "qwen_image"):
        loaded.default_sample_size = pipe.default_sample_size  # not a part of the saved configuration
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(loaded), draw(pipe), rtol=0, atol=1e-4)


@pytest.mark.parametrize("builder", BUILDERS)
def test_output_depends_on_prompt_latents_and_timestep(builder):
    policy = PipelinePolicy(getattr(pipelines, builder)(), **{"height": 16, "width": 16})
    latents, schedule, conditioning = policy.start(["a red circle"] * 2, 4, torch.Generator().manual_seed(0))
    output = policy.predict(latents, 1, conditioning, schedule)
    others = {
        "prompt": policy.predict(latents, 1, policy.encode(["a blue circle"] * 2), schedule),
        "latents": policy.predict(0.9 * latents, 1, conditioning, schedule),
        "timestep": policy.predict(latents, 2, conditioning, schedule),
    }
    differences = {name: (output - other).abs().mean().item() for name, other in others.items()}
    assert min(differences.values()) > 0.01, differences
    assert 0.1 < output.std() < 20


def test_qwen_image_drops_its_template_alone():
    pipe = pipelines.qwen_image()
    tokens = pipe.tokenizer.tokenize(pipe.prompt_template_encode.format("red circle"))
    assert tokens[pipe.prompt_template_encode_start_idx :][:2] == ["red", "Ġcircle"]
