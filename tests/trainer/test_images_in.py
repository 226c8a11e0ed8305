"""Training of pipelines that are given an image, or several, with each prompt."""

import numpy as np
import pytest
from datasets import Dataset, Image
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image as PILImage

from tests import pipelines
from tests.pipelines_conditioned import CASES
from tests.pipelines_video import CASES as WAN
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


def test_a_video_from_an_image(tmp_path):
    case = WAN["WanImageToVideoPipeline"]
    frames = []

    def first_frame(images, **columns):
        frames.append({len(video) for video in images})
        return [gray(video[0]) for video in images]

    first_frame.accepts_videos = True
    trainer = make_trainer(
        tmp_path, "flow", first_frame, pipe=case.build(), train=rows(), evaluation=rows(), pipeline_kwargs=case.kwargs,
        max_steps=1, check_pipeline=True,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert frames[0] == {case.kwargs["num_frames"]} and logged(trainer, "ratio/max_deviation")[0] <= 1e-4
    grid = PILImage.open(next((tmp_path / "images").glob("eval-*.png"))).convert("RGB")
    assert np.array_equal(np.asarray(grid)[:16, :16], np.asarray(IMAGES[0]))


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


def test_an_evaluation_set_without_the_images(tmp_path):
    case = CASES["FluxKontextPipeline"]
    without = Dataset.from_dict({"prompt": TEXTS})
    with pytest.raises(
        ValueError, match="`eval_dataset` has no column `image`, which the pipeline is given from another"
    ):
        make_trainer(
            tmp_path, "flow", gray_of, pipe=case.build(), train=rows(), evaluation=without, pipeline_kwargs=case.kwargs
        )


def test_an_image_for_all_and_one_for_each(tmp_path):
    with pytest.raises(ValueError, match="`image` is a column of a data set and an argument in `pipeline_kwargs`"):
        train(tmp_path, pipeline_kwargs={**CASES["FluxKontextPipeline"].kwargs, "image": IMAGES[0]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [IMAGES[0], None, IMAGES[1], IMAGES[2]],
            "`train_dataset\\[1\\]\\['image'\\]` is None: each row needs an image",
        ),
        (
            [__file__] * 3 + ["no/such.png"],
            "`train_dataset\\[3\\]\\['image'\\]` is 'no/such.png', and there is no such file",
        ),
    ],
)
def test_rows_without_an_image(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, dataset=rows(values=values))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_of_other_modes(tmp_path, mode):
    values = [image.convert(mode) for image in IMAGES]
    dataset = Dataset.from_dict({"prompt": TEXTS, "image": values}).cast_column("image", Image())
    assert logged(train(tmp_path, dataset=dataset, reward_funcs=gray_of), "ratio/max_deviation")[0] <= 1e-4


def gray_of(images, **columns):
    return [gray(image) for image in images]


def test_samples_of_other_images_are_not_taken(tmp_path):
    """What was sampled when a reward failed is for the same images."""

    def broken(images, **columns):
        raise RuntimeError("judge is away")

    with pytest.raises(RuntimeError, match="judge is away"):
        train(tmp_path, reward_funcs=broken)
    other = Dataset.from_dict({"prompt": TEXTS, "image": IMAGES[::-1]}).cast_column("image", Image())
    again = train(tmp_path, dataset=other, reward_funcs=gray_of)
    fresh = train(tmp_path / "fresh", dataset=other, reward_funcs=gray_of)
    assert logged(again, "reward") == logged(fresh, "reward")


def test_ddpo_from_an_image(tmp_path):
    """With a strength, only the last timesteps are run."""
    parts = pipelines.stable_diffusion().components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    trainer = make_trainer(
        tmp_path, "ddpo", gray_of, pipe=pipe, train=rows(), check_pipeline=True, pipeline_kwargs={"strength": 0.5}
    )
    trainer.train()
    assert logged(trainer, "check_pipeline/max_deviation")[0] < 1e-3 and logged(trainer, "nfe") == [3, 3][:1]
    assert trainer._schedule.timesteps.max() < 500
    card = trainer.create_model_card() or (tmp_path / "README.md").read_text()
    assert "StableDiffusionImg2ImgPipeline.from_pretrained" in card
    assert 'pipe(prompt="your prompt", image=image, num_inference_steps=4, ' in card  # of which 2 are run
