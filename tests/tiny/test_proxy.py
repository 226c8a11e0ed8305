import numpy as np
import pytest
from PIL import Image

from flow_trl import tiny
from flow_trl.tiny.proxy import Proxy, gold


def covered(share):
    """A white image of 100 pixels, so many of which are red."""
    pixels = np.full((10, 10, 3), 255, dtype=np.uint8)
    pixels.reshape(-1, 3)[: round(100 * share)] = (255, 40, 40)
    return Image.fromarray(pixels)


def test_gold_is_the_distance_from_a_fifth():
    images = [covered(share) for share in (0.0, 0.1, 0.2, 0.35, 1.0)]
    assert gold(prompts=[""] * 5, images=images) == pytest.approx([-20, -10, 0, -15, -80])


@pytest.fixture(scope="module")
def proxy():
    return Proxy(seed=3)


def test_proxy_has_learnt_something_of_gold_but_not_all(proxy):
    assert 0.2 < proxy.correlation < 0.95
    pipe, prompts = tiny.load_diffusion_pipeline(), tiny.load_prompts("scenes", "test")["prompt"][:100]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts, num_inference_steps=5, guidance_scale=1.0).images
    scores = proxy(prompts=prompts, images=images)
    assert np.corrcoef(scores, gold(prompts, images))[0, 1] > 0.2
    assert abs(np.mean(scores)) < 1 and 0.5 < np.std(scores) < 2  # in standard deviations


def test_proxy_overshoots(proxy):
    """More is better to it also where gold falls: pictures that are covered by far too much."""
    scenes = [covered(share) for share in (0.2, 0.6)]
    prompts = ["", ""]
    right, too_much = gold(prompts, scenes)
    assert right > too_much
    first, second = proxy(prompts, scenes)
    assert second > first


@pytest.mark.slow
def test_proxies_of_a_seed_are_equal(proxy):
    image = [covered(0.3)]
    assert Proxy(seed=3)([""], image) == proxy([""], image)
    assert Proxy(seed=4)([""], image) != proxy([""], image)
