import functools
import re
import subprocess
import sys

import pytest
from PIL import Image

from flow_trl.rewards import BUILT_IN_REWARDS, get_reward_func, reward_name
from flow_trl.rewards.jpeg import jpeg_compressibility


@pytest.mark.parametrize("name", BUILT_IN_REWARDS)
def test_built_in_reward_by_name(name):
    if name in ("aesthetic", "clip_score", "pickscore"):
        pytest.skip("its weights are on the Hub, see test_clip.py")
    if name == "ocr":
        pytest.importorskip("rapidocr_onnxruntime")
    reward_func = get_reward_func(name)
    assert callable(reward_func)
    assert reward_name(reward_func) == name


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


def test_unknown_name():
    with pytest.raises(ValueError, match=re.escape("`reward` is 'orc'")) as info:
        get_reward_func("orc")
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
