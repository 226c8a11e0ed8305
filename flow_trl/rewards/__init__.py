"""
Reward functions for images, and the built-in ones by name.

A reward function is any callable, sync or async, that is called **by keyword**:

```python
f(prompts=[...], images=[...], **columns) -> list[float | None]
```

* `prompts` (`list[str]`): the prompt of each image.
* `images` (`list[PIL.Image.Image]`): the images to score, as many as there are prompts. For videos of more than one
  frame each is a list of frames. Whether a built-in function takes those is its attribute `takes_videos`: the CLIP
  models' do (mean over frames), the others raise. A function without that attribute is taken to.
* `columns` (`list` each): every other column of the data set, by its name, one entry per image. A function names the
  columns that it needs and takes the others with `**columns`.

It returns one number per image, higher is better. `None` means "not applicable": that image has no reward from this
function, and only the other functions count.

A generation is scored chunk by chunk, in a thread beside the sampling of the next chunk, and each function gets images and
columns of its own, to do with as it likes. As TRL's, a function that takes them also gets `trainer_state` (the
[`~transformers.TrainerState`]), `log_metric(name, value)` and `log_extra(column, values)` (one value per image; in the table
that `log_completions` writes). [`~scoring.Scorer`] is what calls functions, checks what they return, and gives them a time
limit and further tries; it works without a trainer too. [`~rewards.RemoteReward`] asks a server, which `python -m
flow_trl.rewards.serve` is for any reward: so rewards run on another machine, or with other versions of packages.

Example:

```python
from flow_trl import TPGRPOTrainer


def darkness(prompts, images, **columns):
    return [1 - sum(image.convert("L").histogram()[128:]) / (image.width * image.height) for image in images]


async def judged(prompts, images, question, **columns):  # the data set has a column `question`
    return await asyncio.gather(*(ask_judge(image, text) for image, text in zip(images, question, strict=True)))


trainer = TPGRPOTrainer(model, reward_funcs=["ocr", darkness, judged], ...)
```

Built-in names: `"ocr"` and `"ocr_flow_grpo"` ([`~rewards.ocr.OCRReward`]), [`~rewards.jpeg.jpeg_compressibility`] and
[`~rewards.jpeg.jpeg_incompressibility`]; and, which load a model from the Hub, `"geneval"` and `"geneval_strict"`, also
called `"scene"` and `"scene_strict"` ([`~rewards.scene.SceneReward`] with [`~rewards.scene.TransformersDetector`]),
`"clip_score"` ([`~rewards.clip.ClipScore`]), `"pickscore"` ([`~rewards.clip.PickScore`]), `"aesthetic"`
([`~rewards.clip.AestheticScore`]), `"hpsv2"` ([`~rewards.hps.HPSv2`]) and `"vlm_judge"` ([`~rewards.judge.VLMJudge`]).
The tiny world has scene rewards of its own, [`~flow_trl.tiny.scene_reward`].
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .remote import RemoteReward as RemoteReward


# What a trainer offers to reward functions that take it, as TRL's do.
EXTRAS = ("trainer_state", "log_extra", "log_metric")


def _load(module: str, name: str) -> Any:
    return getattr(import_module(f"flow_trl.rewards.{module}"), name)


@cache  # its model is large, and one serves all rewards
def _detector() -> Callable:
    return _load("scene", "TransformersDetector")()


def _scene_reward(name: str) -> Callable:
    return _load("scene", "SceneReward")(_detector(), strict=name.endswith("_strict"), name=name)


BUILT_IN_REWARDS: dict[str, Callable[[], Callable]] = {
    "aesthetic": lambda: _load("clip", "AestheticScore")(),
    "clip_score": lambda: _load("clip", "ClipScore")(),
    "geneval": lambda: _scene_reward("geneval"),
    "geneval_strict": lambda: _scene_reward("geneval_strict"),
    "hpsv2": lambda: _load("hps", "HPSv2")(),
    "jpeg_compressibility": lambda: _load("jpeg", "jpeg_compressibility"),
    "jpeg_incompressibility": lambda: _load("jpeg", "jpeg_incompressibility"),
    "ocr": lambda: _load("ocr", "OCRReward")(),
    "ocr_flow_grpo": lambda: _load("ocr", "OCRReward")(contained=True),
    "pickscore": lambda: _load("clip", "PickScore")(),
    "scene": lambda: _scene_reward("scene"),
    "scene_strict": lambda: _scene_reward("scene_strict"),
    "vlm_judge": lambda: _load("judge", "VLMJudge")(),
}


def __getattr__(name: str) -> Any:
    if name == "RemoteReward":
        return _load("remote", "RemoteReward")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def import_dotted(path: str, argument: str) -> Any:
    """
    What a dotted path stands for, such as a reward function on the command line; of a class an instance.

    Args:
        path (`str`):
            Module and name, for example `"my_package.rewards.darkness"` or `"my_package.rewards:darkness"`.
        argument (`str`):
            What it was given as, for the message.

    Returns:
        `Callable`: the function, or an instance of the class.

    Raises:
        ValueError: if there is no such module, no such name in it, or the name is no callable.

    Example:

    ```python
    >>> import_dotted("flow_trl.rewards.jpeg.jpeg_compressibility", "reward")
    ```
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` is {path!r}, which cannot be imported ({error}): it must be the module's path and a name in it, "
            "and the module must be installed, or in the folder where the command is run."
        ) from error
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise ValueError(
            f"`{argument}` is {path!r}, a {type(found).__name__}: it must be a function or a class of one."
        )
    return found


def get_reward_func(reward: str | Callable) -> Callable:
    """
    Returns the reward function that a name or a callable stands for.

    Args:
        reward (`str` or `Callable`):
            Name of a built-in reward (a key of `BUILT_IN_REWARDS`), dotted path ([`import_dotted`]) of a function or of a
            class that is made without arguments, or a reward function, which is returned unchanged.

    Returns:
        `Callable`: the reward function, see [`flow_trl.rewards`] for how it is called.

    Raises:
        ValueError: if `reward` is a `str` that names no built-in reward and nothing that can be imported, or one whose
            model cannot be loaded.
        TypeError: if `reward` is neither a `str` nor a callable.
        MissingExtraError: if the built-in reward needs an optional package that is not installed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards import get_reward_func

    >>> reward_func = get_reward_func("jpeg_compressibility")
    >>> reward_func(prompts=["nothing"], images=[Image.new("RGB", (32, 32))])
    [-0.643]
    ```
    """
    if isinstance(reward, str):
        if reward in BUILT_IN_REWARDS:
            return BUILT_IN_REWARDS[reward]()
        if "." in reward or ":" in reward:
            return import_dotted(reward, "reward")
        raise ValueError(
            f"`reward` is {reward!r}, which is no built-in reward. The built-in ones are "
            f"{', '.join(map(repr, BUILT_IN_REWARDS))}; for any other, pass the function itself (a callable) or its "
            "dotted path, such as 'my_package.rewards.darkness'."
        )
    if not callable(reward):
        raise TypeError(
            f"`reward` must be the name of a built-in reward ({', '.join(map(repr, BUILT_IN_REWARDS))}) or a "
            f"callable, but it is {reward!r}, a {type(reward).__name__}."
        )
    return reward


def reward_name(func: Callable) -> str:
    """
    Returns the name under which a reward function is logged: its `__name__`, or its class's name where it has none.

    Example:

    ```python
    >>> from flow_trl.rewards import get_reward_func, reward_name

    >>> reward_name(get_reward_func("jpeg_compressibility"))
    'jpeg_compressibility'
    ```
    """
    return getattr(func, "__name__", type(func).__name__)


def refuse_videos(name: str, images: list) -> None:
    """Raises a `ValueError` if an entry of `images` is a list, for the reward `name`, which takes single images."""
    if any(isinstance(image, list) for image in images):
        raise ValueError(
            f"The reward `{name}` takes single images, but `images` has videos (lists of frames). Pass a function of "
            f"your own that picks frames and calls this one, such as `def {name}_at_end(images, **columns): return "
            f"{name}(images=[frames[-1] for frames in images], **columns)`."
        )
