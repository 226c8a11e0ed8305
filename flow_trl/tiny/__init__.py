"""
A world small enough to train in on two CPU cores: tasks with prompts and pictures, and shipped models that load with
the classes that real ones have.

Models are loaded in float32, on the CPU. A loader takes another `folder`, such as one that its script
`python -m flow_trl.tiny.build_...` has written, and further keyword arguments for `from_pretrained`, such as `dtype`.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..rewards.scene import SceneReward
from . import arithmetic, scenes
from .detector import detect_shapes


__all__ = [
    "load_clip",
    "load_diffusion_pipeline",
    "load_flow_pipeline",
    "load_language_model",
    "load_prompts",
    "scene_reward",
]

FLOW_FOLDER = Path(__file__).parent / "flow"
DIFFUSION_FOLDER = Path(__file__).parent / "diffusion"
CLIP_FOLDER = Path(__file__).parent / "clip"
LANGUAGE_FOLDER = Path(__file__).parent / "language"
_TASKS = {
    "scenes": partial(scenes.make_prompts, "scenes"),
    "words": partial(scenes.make_prompts, "words"),
    "arithmetic": arithmetic.make_prompts,
    "arithmetic_two_attempts": partial(arithmetic.make_prompts, prefix=arithmetic.TWICE),
}


def load_prompts(name: str, split: str = "train"):
    """
    Makes the prompts of a task of the tiny world; the same ones every time.

    - `"scenes"` has GenEval's kinds of prompts (`tag`): `single_object`, `two_object`, `counting` (2 or 3 of a class, or
      1 to 2 of each of two), `colors`, `position` and `color_attr`, with optional colours in `counting` and `position`.
      What is held out is the *content*: within each tag a random 45% of the combinations of classes, colours, numbers and
      relation are in the test split and in no train prompt of that tag, in whatever order they are mentioned ("a red
      circle left of a blue square" is the same content as "a blue square right of a red circle"). Every class, colour,
      number and relation occurs in train.
    - `"words"` asks for a word of 2 to 5 capital letters. 20% of the words are held out; every letter occurs in train.
    - `"arithmetic"` has problems of five difficulties, most of the hardest; see [`arithmetic.draw_problem`]. No problem
      of the test split is in train, nor is it with its factors or summands swapped.
    - `"arithmetic_two_attempts"` has the same problems after the words `"twice: "`, which ask the tiny language model for
      two attempts.

    The shipped image models and CLIP were trained on train prompts alone, the language model on problems drawn at random,
    never on one of test.

    Args:
        name (`str`):
            One of these tasks.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`.

    Returns:
        `datasets.Dataset`: in random order, no prompt twice, with a column `prompt` and what rewards need. Of scenes
        `tag`, `include` (list of `class`, `count`, `color`, `position`; `position` is GenEval's pair with the index as a
        string, as in `["left of", "0"]`) and `exclude` (list of `class` and `count`; `None` unless the tag is
        `counting`), about 1330 train and 1090 test rows. Of words `text`, 4000 and 1000 rows. Of arithmetic `answer` (a
        string) and `difficulty` (1 to 5), 4000 and 400 rows.

    Raises:
        ValueError: if there is no such task or split.

    Example:

    ```python
    >>> load_prompts("arithmetic", "test").column_names
    ['prompt', 'answer', 'difficulty']
    ```
    """
    if split not in ("train", "test"):
        raise ValueError(f'`split` is {split!r}: it must be "train" or "test".')
    if name not in _TASKS:
        raise ValueError(f"`name` is {name!r}: it must be one of {', '.join(map(repr, _TASKS))}.")
    return _TASKS[name](split)


@contextmanager
def _without_bars():
    """Nothing draws a progress bar here: what is loaded is there in a moment."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_flow_pipeline(folder: str | Path = FLOW_FOLDER, **kwargs: Any):
    """
    Loads the tiny world's flow-matching model, a [`~diffusers.StableDiffusion3Pipeline`].

    It draws 32 x 32 pictures for the prompts of [`load_prompts`]. It has no T5 encoder, for which the pipeline would
    put in 256 empty tokens: pass `max_sequence_length=0` to leave them out, as in training.

    Example:

    ```python
    >>> pipe = load_flow_pipeline()
    >>> prompt = "a photo of a red circle left of a blue square"
    >>> image = pipe(prompt, num_inference_steps=10, guidance_scale=2.0, max_sequence_length=0).images[0]
    ```
    """
    import torch
    from diffusers import StableDiffusion3Pipeline

    kwargs = {"dtype": torch.float32, "text_encoder_3": None, "tokenizer_3": None, **kwargs}
    with _without_bars():
        return StableDiffusion3Pipeline.from_pretrained(folder, **kwargs)


def load_diffusion_pipeline(folder: str | Path = DIFFUSION_FOLDER, **kwargs: Any):
    """
    Loads the tiny world's diffusion model, a [`~diffusers.StableDiffusionPipeline`] with DDIM and noise prediction as
    Stable Diffusion 1.x.

    Example:

    ```python
    >>> pipe = load_diffusion_pipeline()
    >>> image = pipe("a photo of two red circles", num_inference_steps=10, guidance_scale=2.0).images[0]
    ```
    """
    import torch
    from diffusers import StableDiffusionPipeline

    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kwargs = {"dtype": torch.float32, **absent, **kwargs}
    with _without_bars():
        return StableDiffusionPipeline.from_pretrained(folder, **kwargs)


def load_clip(folder: str | Path = CLIP_FOLDER, **kwargs: Any):
    """
    Loads the tiny world's CLIP, trained on pictures and prompts of `load_prompts("scenes")`: a
    [`~transformers.CLIPModel`] in evaluation mode and its [`~transformers.CLIPProcessor`].

    Example:

    ```python
    >>> from flow_trl.rewards.clip import ClipScore

    >>> clip_score = ClipScore(*load_clip())
    ```
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    kwargs = {"dtype": torch.float32, **kwargs}
    with _without_bars():
        return CLIPModel.from_pretrained(folder, **kwargs).eval(), CLIPProcessor.from_pretrained(folder)


def load_language_model(folder: str | Path = LANGUAGE_FOLDER, **kwargs: Any):
    """
    Loads the tiny world's language model, a [`~transformers.LlamaForCausalLM`], and its tokenizer.

    It solves the problems of `load_prompts("arithmetic")` and says how confident it is: too confident, and knowing
    little. Prompts of `load_prompts("arithmetic_two_attempts")` get two attempts instead.

    It understands no words. A system prompt of plain words does no harm, but one with tags, digits or signs misleads it:
    the system prompt of [`~tasks.confidence_task`] lowers its accuracy on test problems from 0.6 to 0.2, and that of
    [`~tasks.two_attempt_task`] spoils the format as well. So give it the problem alone.

    Example:

    ```python
    >>> model, tokenizer = load_language_model()
    >>> ids = model.generate(**tokenizer("23*47=?", return_tensors="pt"), max_new_tokens=64)
    >>> tokenizer.decode(ids[0], skip_special_tokens=True)
    '23*47=?<reasoning>23*40=920,23*7=161</reasoning><answer>1081</answer><analysis>fine</analysis><confidence>0.3</confidence>'
    ```
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    kwargs = {"dtype": torch.float32, **kwargs}
    with _without_bars():
        return LlamaForCausalLM.from_pretrained(folder, **kwargs), PreTrainedTokenizerFast.from_pretrained(folder)


def scene_reward(strict: bool = False) -> SceneReward:
    """
    The reward for pictures of `load_prompts("scenes")`: are the right shapes in the right colours, numbers and places?

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Whether to return strict accuracy, 0 or 1, rather than the graded score in [0, 1].

    Returns:
        [`~rewards.scene.SceneReward`]: with the tiny world's detector, logged as `"scene"` or `"scene_strict"`.

    Example:

    ```python
    >>> row = load_prompts("scenes", "test")[0]
    >>> image = scenes.render_scene(row["include"], seed=0)
    >>> scene_reward()(prompts=[row["prompt"]], images=[image], include=[row["include"]])
    [1.0]
    ```
    """
    return SceneReward(detect_shapes, strict)


# For command lines, by the dotted paths `flow_trl.tiny.scene` and `flow_trl.tiny.scene_strict`
scene, scene_strict = scene_reward(), scene_reward(strict=True)
