import numpy as np
import pytest
from PIL import Image

from flow_trl.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility


def noise(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_size_is_that_of_pillows_own_file(tmp_path):
    images = [Image.new("RGB", (32, 32), "red"), noise()]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.jpg", quality=95)
    sizes = [(tmp_path / f"{i}.jpg").stat().st_size for i in range(2)]

    rewards = jpeg_compressibility(prompts=["a", "b"], images=images, tag=["x", "y"])
    assert rewards == [-size / 1000 for size in sizes]
    assert jpeg_incompressibility(prompts=["a", "b"], images=images) == [-reward for reward in rewards]


def test_plain_image_compresses_better_than_noise():
    plain, noisy = jpeg_compressibility(prompts=["a", "b"], images=[Image.new("RGB", (32, 32)), noise()])
    assert noisy < plain < 0


@pytest.mark.parametrize("reward", [jpeg_compressibility, jpeg_incompressibility])
def test_videos_are_refused(reward):
    assert not reward.takes_videos
    with pytest.raises(ValueError, match=f"`{reward.__name__}` takes single images.* a function of your own"):
        reward(prompts=["a", "b"], images=[[noise(), noise()]] * 2)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_every_mode(mode):
    image = noise(mode)
    assert jpeg_incompressibility(prompts=["a"], images=[image]) == jpeg_incompressibility(
        prompts=["a"], images=[image.convert("RGB")]
    )
