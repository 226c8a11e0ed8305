"""Prompts for image trainers: sets that are made here by name, files, data sets of the Hub."""

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset

from .rewards.scene import GENEVAL_COLORS, RELATIONS


# The 80 classes of COCO, as GenEval calls them.
CLASSES = """\
person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird
cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl
banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv
laptop computer_mouse tv_remote computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase
scissors teddy_bear hair_drier toothbrush""".split()
CLASSES = [name.replace("_", " ") for name in CLASSES]
NUMBERS = {2: "two", 3: "three", 4: "four"}
# How often Flow-GRPO trains each kind (https://huggingface.co/papers/2505.05470); all are evaluated alike.
KINDS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
ANIMALS = """\
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly
fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla
hedgehog kangaroo""".split()
WORDS = """\
Fresh Bread Daily Open Late Grand Market Harbor Winter Sale Summer Night Coffee House Garden Club Music Hall North Star Blue
River Book Fair City Tour Happy Birthday Thank You Welcome Home Keep Quiet Exit Gate Platform Nine Mountain Trail Lost Found
Golden Hour Free Lunch Science Lab Paper Moon Silver Bell Green Tea First Class Hidden Valley Old Town Bright Future""".split()
PLACES = """\
a neon sign above a shop window that reads {}
a chalkboard in a cafe with the words {}
a wooden signpost on a hiking trail that says {}
a vintage poster with the headline {}
a street at night with a billboard that shows {}
the cover of an old book titled {}
a birthday cake with {} written in icing
a mug on an office desk printed with {}
a brick wall with the graffiti {}
a red T-shirt with {} across the chest
a museum label engraved with {}
a bus that displays {} as its destination""".splitlines()


def describe(tag: str, include: list[dict[str, Any]]) -> str:
    """
    The prompt of GenEval's metadata, in the words of [GenEval](https://huggingface.co/papers/2310.11513)'s script.

    Args:
        tag (`str`):
            Kind of prompt: a key of `KINDS`.
        include (`list[dict]`):
            Objects: `class`, `count` and, where there are some, `color` and `position`.

    Returns:
        `str`: the prompt.

    Example:

    ```python
    >>> describe("position", [{"class": "bed", "count": 1}, {"class": "cat", "count": 1, "position": ["below", "0"]}])
    'a photo of a cat below a bed'
    ```
    """
    phrases = []
    for entry in include:
        words = " ".join(filter(None, [entry.get("color"), entry["class"]]))
        if entry["count"] > 1:
            phrases.append(f"{NUMBERS[entry['count']]} {words}{'es' if words.endswith('s') else 's'}")
        else:
            phrases.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
    link = f" {include[-1]['position'][0]} " if tag == "position" else " and "
    return "a photo of " + link.join(phrases[::-1] if tag == "position" else phrases)


def _entry(name: str, count: int = 1, color: str | None = None, position: list[str] | None = None) -> dict[str, Any]:
    return {"class": name, "count": count, "color": color, "position": position}


def _scene(tag: str, rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A random row of a kind, and what is in it whatever the order."""
    colored = tag in ("colors", "color_attr")
    names = rng.sample(
        CLASSES[1:] if colored else CLASSES, 2 if tag in ("two_object", "position", "color_attr") else 1
    )
    colors = rng.sample(GENEVAL_COLORS, len(names)) if colored else [None] * len(names)
    include = [_entry(name, color=color) for name, color in zip(names, colors, strict=True)]
    exclude = None
    if tag == "counting":
        include[0]["count"] = count = rng.choice(list(NUMBERS))
        exclude = [{"class": names[0], "count": count + 1}]
    if tag == "position":
        include[1]["position"] = [rng.choice(RELATIONS), "0"]
    content = tag, sorted((entry["class"], entry["count"], str(entry["color"])) for entry in include)
    return content, {"prompt": describe(tag, include), "tag": tag, "include": include, "exclude": exclude}


def _geneval(rng: random.Random, is_test: bool) -> tuple[Any, dict[str, Any]]:
    return _scene(rng.choices(list(KINDS), [1] * len(KINDS) if is_test else list(KINDS.values()))[0], rng)


def _ocr(rng: random.Random, is_test: bool) -> tuple[Any, dict[str, Any]]:
    text = " ".join(rng.sample(WORDS, rng.randint(1, 4)))
    return sorted(text.split()), {"prompt": rng.choice(PLACES).format(f'"{text}"'), "text": text}


def _draw(make: Callable, size: int, is_test: bool) -> list[dict[str, Any]]:
    """Random rows; a fifth of all contents is in test alone, where no prompt is twice."""
    rng, rows = random.Random(int(is_test)), {}
    while len(rows) < size:
        content, row = make(rng, is_test)
        if (zlib.crc32(repr(content).encode()) % 5 == 0) == is_test:
            rows.setdefault(row["prompt"] if is_test else len(rows), row)
    return list(rows.values())


_text, _number = Value("string"), Value("int64")
_counted = {"class": _text, "count": _number}
_GENEVAL_FEATURES = Features(
    prompt=_text,
    tag=_text,
    include=List({**_counted, "color": _text, "position": List(_text)}),
    exclude=List(_counted),
)
PROMPT_SETS: dict[str, Callable[[bool], Dataset]] = {
    "geneval": lambda is_test: Dataset.from_list(
        _draw(_geneval, 600 if is_test else 5000, is_test), features=_GENEVAL_FEATURES
    ),
    "ocr": lambda is_test: Dataset.from_list(_draw(_ocr, 500 if is_test else 5000, is_test)),
    "animals": lambda is_test: Dataset.from_dict({"prompt": ANIMALS}),
}


def load_prompts(name: str, eval_size: int = 1000) -> tuple[Dataset, Dataset]:
    """
    Prompts for training and for evaluation.

    Args:
        name (`str`):
            - `"geneval"`: scenes in GenEval's form, with its metadata (`tag`, `include`, `exclude`), for the rewards
              `"scene"` and `"geneval"`; 5000 of them in Flow-GRPO's proportions, and 600 of all kinds alike, of contents
              that are not trained.
            - `"ocr"`: 5000 and 500 prompts with a text to write, for the reward `"ocr"`; no text of test is trained.
            - `"animals"`: the 45 animals of [DDPO](https://huggingface.co/papers/2305.13301); the same for evaluation.
            - a `.txt` file with a prompt per line, a `.json` or `.jsonl` file, or a Hub id, with a column `prompt`. What has
              no split `test` gives a tenth of its rows to it, at most `eval_size`.
        eval_size (`int`, *optional*, defaults to `1000`):
            Largest number of prompts for evaluation.

    Returns:
        `tuple[Dataset, Dataset]`: those for training, and those for evaluation in random order, always the same.

    Raises:
        ValueError: if there are too few prompts, or `name` is neither a set, a file nor a data set that can be loaded.

    Example:

    ```python
    >>> train, test = load_prompts("animals", eval_size=8)
    >>> len(train), len(test)
    (45, 8)
    ```
    """
    return split_prompts(_load(name, "dataset_name"), eval_size)


def evaluation_prompts(name: str, size: int = 1000) -> Dataset:
    """
    Prompts for evaluation alone: all rows of what has no split `test`.

    Args:
        name (`str`):
            As in [`load_prompts`].
        size (`int`, *optional*, defaults to `1000`):
            Largest number of prompts.

    Returns:
        [`~datasets.Dataset`]: in random order, always the same.

    Raises:
        ValueError: if `name` is neither a set, a file nor a data set that can be loaded.

    Example:

    ```python
    >>> len(evaluation_prompts("geneval", 200))
    200
    ```
    """
    data = _load(name, "prompts")
    prompts = data["test" if "test" in data else "train"].shuffle(seed=0)
    return prompts.select(range(min(size, len(prompts))))


def _load(name: str, argument: str) -> dict[str, Dataset]:
    """The splits of what a name stands for, which was given as `argument`."""
    suffix = Path(name).suffix
    if name in PROMPT_SETS:
        return {"train": PROMPT_SETS[name](False), "test": PROMPT_SETS[name](True)}
    if suffix in (".txt", ".json", ".jsonl") and not Path(name).is_file():
        raise ValueError(f"`{argument}={name!r}`: there is no such file.")
    if suffix == ".txt":
        return load_dataset("text", data_files=name).rename_column("text", "prompt")
    if suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=name)
    try:
        return load_dataset(name)
    except Exception as error:
        error.add_note(
            f"`{argument}={name!r}` is no prompt set of this library ({', '.join(PROMPT_SETS)}) and no file."
        )
        raise


def split_prompts(data: dict[str, Dataset], eval_size: int) -> tuple[Dataset, Dataset]:
    """The split `train`, and so many rows of the split `test`, or of `train` where there is none."""
    if "test" not in data:
        if len(data["train"]) < 2:
            raise ValueError(
                f"There are {len(data['train'])} rows: at least two are needed, one of them for evaluation."
            )
        data = data["train"].train_test_split(test_size=max(1, min(eval_size, len(data["train"]) // 10)), seed=0)
    test = data["test"].shuffle(seed=0)
    return data["train"], test.select(range(min(eval_size, len(test))))
