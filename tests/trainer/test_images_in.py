"""Training of pipelines that are given an image, or several, with each prompt."""

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from tests.pipelines_conditioned import CASES
from tests.trainer.runs import gray, logged, make_trainer


TEXTS = ["a red circle", "a blue square", "a cat", "two dogs"]
RNG = np.random.default_rng(0)
IMAGES = [PILImage.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in TEXTS]


def rows(column="image", values=IMAGES):
    dataset = Dataset.from_dict({"prompt": TEXTS, column: values})
    return dataset.cast_column(column, Image()) if values is IMAGES else dataset


def train(tmp_path, name="FluxKontextPipeline", dataset=None, reward_funcs=None, **config):
    case = CASES[name]
    dataset = rows() if dataset is None else dataset
    options = {"pipeline_kwargs": case.kwargs, "max_steps": 1, "check_pipeline": True, "log_completions": True}
    trainer = make_trainer(
        tmp_path, "flow", reward_funcs or watched, pipe=case.build(), train=dataset, evaluation=dataset,
        **(options | config),
    )  # fmt: skip
    trainer.train()
    return trainer


def watched(prompts, images, image=None, **columns):
    """The reward function gets what the pipeline got."""
    if image is not None and isinstance(image[0], PILImage.Image):
        assert [
            np.array_equal(given, IMAGES[TEXTS.index(text)]) for given, text in zip(image, prompts, strict=True)
        ] == [True] * len(images)
    return [gray(result) for result in images]


def test_the_image_of_each_prompt_reaches_the_pipeline(tmp_path):
    trainer = train(tmp_path)
    assert (
        logged(trainer, "ratio/max_deviation")[0] <= 1e-4 and logged(trainer, "check_pipeline/max_deviation")[0] < 1e-4
    )
    trainer.evaluate()
    grid = PILImage.open(next((tmp_path / "images").glob("eval-*.png")))
    assert grid.size == (8 * 16, 16)  # four pairs of an image and what was made of it
    for i, given in enumerate(IMAGES):
        assert np.array_equal(np.asarray(grid)[:, 32 * i : 32 * i + 16], np.asarray(given))


def test_other_images_give_other_rewards(tmp_path):
    rewards = []
    for i, values in enumerate((IMAGES, IMAGES[::-1])):
        dataset = Dataset.from_dict({"prompt": TEXTS, "image": values}).cast_column("image", Image())
        trainer = train(tmp_path / str(i), dataset=dataset, reward_funcs=lambda images, **_: [gray(x) for x in images])
        rewards.append(logged(trainer, "reward")[0])
    assert rewards[0] != rewards[1]


def test_paths_are_images(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(len(TEXTS))]
    for path, image in zip(paths, IMAGES, strict=True):
        image.save(path)
    by_path = train(tmp_path / "path", dataset=rows(values=paths))
    assert logged(by_path, "reward") == logged(train(tmp_path / "image"), "reward")


def test_a_control_image(tmp_path):
    trainer = train(tmp_path, "StableDiffusion3ControlNetPipeline", rows("control_image"))
    assert trainer._sampler.columns == ["control_image"]
    assert logged(trainer, "ratio/max_deviation")[0] <= 1e-4


def test_columns_that_are_not_wanted(tmp_path):
    dataset = rows().add_column("mask_image", [None] * len(TEXTS))
    assert train(tmp_path, dataset=dataset)._sampler.columns == ["image"]  # the call has no `mask_image`


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["picture"], "`picture` is not an argument of `FluxKontextPipeline.__call__`"),
        (["latents"], "`latents` is not an argument of .* that can be given for each prompt"),
        (["ip_adapter_image"], "`train_dataset` has no column `ip_adapter_image` but \\['prompt', 'image'\\]"),
    ],
)
def test_columns_that_cannot_be_given(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pipeline_columns=columns)
