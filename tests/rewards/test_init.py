import functools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from flow_trl import rewards, tiny
from flow_trl.rewards import BUILT_IN_REWARDS, get_reward_func, reward_name, scene
from flow_trl.rewards.clip import ClipScore
from flow_trl.rewards.jpeg import jpeg_compressibility
from flow_trl.tiny.scenes import render_scene, render_word


ON_THE_HUB = (
    "aesthetic",
    "clip_score",
    "hpsv2",
    "pickscore",
    "vlm_judge",
)  # their weights, see test_clip.py and others
SCENES = ("geneval", "geneval_strict", "scene", "scene_strict")


@pytest.fixture
def detector(monkeypatch):
    """Stands in for the one on the Hub; collects how often it is loaded."""
    loaded = []
    monkeypatch.setattr(scene, "TransformersDetector", lambda: loaded.append(list) or list)
    rewards._detector.cache_clear()
    yield loaded
    rewards._detector.cache_clear()


@pytest.mark.parametrize("name", [name for name in BUILT_IN_REWARDS if name not in ON_THE_HUB])
def test_built_in_reward_by_name(detector, name):
    if name.startswith("ocr"):
        pytest.importorskip("rapidocr_onnxruntime")
    reward_func = get_reward_func(name)
    assert callable(reward_func)
    assert reward_name(reward_func) == name
    assert reward_func.takes_videos is False


def test_scene_rewards_by_name_share_the_detector_for_photos(detector):
    reward_funcs = [get_reward_func(name) for name in SCENES]
    assert detector == [list] and all(reward_func.detector is list for reward_func in reward_funcs)
    assert [reward_func.strict for reward_func in reward_funcs] == [False, True, False, True]


@pytest.mark.parametrize("name", SCENES)
def test_scene_rewards_by_name_need_the_network(name):
    with pytest.raises(ValueError, match=f'(?s)`model` is "{scene.MASK2FORMER}".*`flow_trl.tiny.scene_reward'):
        get_reward_func(name)


@pytest.mark.parametrize("name", ["clip_score", "ocr", "scene"])
def test_rewards_give_the_same_scores_from_other_threads(name):
    if name == "ocr":
        pytest.importorskip("rapidocr_onnxruntime")
    words = name == "ocr"
    columns = tiny.load_prompts("words" if words else "scenes", "test").select(range(16)).to_dict()
    render, content = (render_word, columns["text"]) if words else (render_scene, columns["include"])
    columns |= {"prompts": columns.pop("prompt"), "images": [render(c, seed=i % 3) for i, c in enumerate(content)]}
    make = {"clip_score": lambda: ClipScore(*tiny.load_clip()), "scene": tiny.scene_reward}
    reward_func = get_reward_func("ocr") if words else make[name]()
    scores = reward_func(**columns)
    with ThreadPoolExecutor(3) as threads:  # at the same time, as after a call that took too long
        others = [threads.submit(reward_func, **columns) for _ in range(12)]
    assert all(other.result() == scores for other in others)


def test_built_in_rewards_are_imported_when_asked_for():
    code = "import sys, flow_trl.rewards; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "flow_trl.rewards" in modules
    assert not {"torch", "PIL", "rapidocr_onnxruntime"} & set(modules)


def test_callable_is_returned_unchanged():
    async def judged(prompts, images, **columns):
        return [0.0] * len(images)

    assert get_reward_func(jpeg_compressibility) is jpeg_compressibility
    assert get_reward_func(judged) is judged


@pytest.mark.parametrize("name", ["orc", "jpg", ""])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=re.escape(f"`reward` is {name!r}")) as info:
        get_reward_func(name)
    assert all(repr(name) in str(info.value) for name in BUILT_IN_REWARDS)
    assert "callable" in str(info.value)


@pytest.mark.parametrize("reward", [None, 3, ["ocr"], Image.new("RGB", (1, 1))])
def test_wrong_type(reward):
    with pytest.raises(TypeError, match="`reward` must be the name of a built-in reward") as info:
        get_reward_func(reward)
    assert repr(reward) in str(info.value)


def test_reward_name():
    class Judge:
        def __call__(self, prompts, images, **columns):
            return [0.0] * len(images)

    assert reward_name(jpeg_compressibility) == "jpeg_compressibility"
    assert reward_name(Judge()) == "Judge"
    assert reward_name(functools.partial(jpeg_compressibility, prompts=[])) == "partial"
