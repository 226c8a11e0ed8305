import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from io import BytesIO

import httpx2
import numpy as np
import pytest
from PIL import Image

from flow_trl.rewards import RemoteReward, get_reward_func
from flow_trl.rewards.jpeg import jpeg_compressibility
from flow_trl.utils import MissingExtraError


pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

TOKEN = "s3cret"
LIMIT = 200_000
# Scores by what a column asks for.
MY_REWARDS = """
import asyncio
from decimal import Decimal
from fractions import Fraction

import numpy as np


class Tensor:  # has what a 0-d tensor has, without the seconds of importing torch
    def item(self):
        return 0.5


class Judge:
    __name__ = "my judge"

    def __init__(self):
        self.active, self.loops = 0, set()

    async def __call__(self, prompts, images, do, number=None, **columns):
        self.active += 1
        active = self.active
        self.loops.add(id(asyncio.get_running_loop()))
        if do[0] == "sleep":
            await asyncio.sleep(number[0])
        self.active -= 1
        return {
            "active": lambda: [active] * len(prompts),
            "sleep": lambda: [active] * len(prompts),
            "loops": lambda: [len(self.loops)] * len(prompts),
            "prompt": lambda: [float(prompt.split()[-1]) for prompt in prompts],
            "number": lambda: number,
            "columns": lambda: [len(columns)] * len(prompts),
            "frames": lambda: [len(image) for image in images],
            "modes": lambda: [["L", "RGBA"].index(image.mode) for image in images],
            "kinds": lambda: [
                np.float32(0.1), np.int64(2), np.array(0.3), Tensor(), np.array([0.25]), Decimal("0.7"),
                Fraction(1, 8), True, None,
            ],
            "array": lambda: np.arange(len(prompts), dtype=np.float32) / np.float32(3),
            "nan": lambda: [float("nan")] * len(prompts),
            "infinite": lambda: np.full(len(prompts), np.inf),
            "text": lambda: ["1.0"] * len(prompts),
            "nothing": lambda: None,
            "fewer": lambda: [1.0],
            "fail": lambda: {}["no such thing \\ud800"],
        }[do[0]]()


def give_prompt(prompts, images, **columns):
    return [float(prompt) for prompt in prompts]


not_callable = 3
"""


class Server:
    """`python -m flow_trl.rewards.serve` as a process of its own, whose output goes to a file."""

    def __init__(self, folder, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "flow_trl.rewards.serve", *arguments, "--port", self.url.rpartition(":")[2]]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        self._log = folder / "log.txt"
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log
            try:
                return httpx2.get(f"{self.url}/health").json()
            except httpx2.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"not up after a minute: {self.log}")

    @property
    def log(self):
        return self._log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("FLOW_TRL_REWARD_TOKEN", raising=False)
        (folder / "jpeg").mkdir()
        servers = {
            "judge": Server(folder, "my_rewards:Judge", "--max_batch_bytes", str(LIMIT)),
            "jpeg": Server(folder / "jpeg", "jpeg_compressibility", "--token_env", "MY_TOKEN", MY_TOKEN=f"{TOKEN}\n"),
        }  # side by side, since starting takes seconds
        yield servers
        for server in servers.values():
            server.process.kill()
            server.process.wait()


@pytest.fixture
def judge(servers):
    servers["judge"].wait()
    return servers["judge"]


@pytest.fixture
def jpeg(servers, monkeypatch):
    servers["jpeg"].wait()
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    return servers["jpeg"]


def picture(seed=0, size=(32, 32), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def ask(reward_func, images=1, **columns):
    images = [picture(i) for i in range(images)] if isinstance(images, int) else images
    return asyncio.run(reward_func(prompts=[f"prompt {i}" for i in range(len(images))], images=images, **columns))


def base64(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return b64encode(buffer.getvalue()).decode()


def post(server, **arguments):
    return httpx2.post(f"{server.url}/score", **arguments)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_scores_equal_the_local_ones(jpeg, image_format):
    images = [picture(0), picture(1, (100, 7)), picture(2, mode="L"), picture(3, mode="RGBA"), picture(4, mode="P")]
    reward_func = RemoteReward(jpeg.url, image_format=image_format, token_env="MY_TOKEN")
    assert ask(reward_func, images) == jpeg_compressibility(prompts=[], images=images)


def test_many_images(judge):
    reward_func = RemoteReward(judge.url, batch_size=16, max_concurrency=8)
    assert ask(reward_func, 300, do=["prompt"] * 300) == list(range(300))


def test_columns_arrive(judge):
    reward_func = RemoteReward(judge.url)
    assert ask(reward_func, 2, do=["number"] * 2, number=[0.1, None]) == [0.1, None]
    assert ask(reward_func, 2, do=["columns"] * 2, a=[1, 2], b=["ä", "猫"]) == [2.0, 2.0]


def test_videos_arrive(judge):
    videos = [[picture(i) for i in range(3)], [picture(4)]]
    assert ask(RemoteReward(judge.url), videos, do=["frames"] * 2) == [3.0, 1.0]


def test_modes_arrive(judge):
    images = [picture(mode="L"), picture(mode="RGBA")]
    assert ask(RemoteReward(judge.url), images, do=["modes"] * 2) == [0.0, 1.0]


def test_unicode_prompts(servers, judge):
    reward_func = RemoteReward(judge.url, columns=["do"])
    prompts = ["猫 1", "🦊 \ud800 \x00 2", "a\n\t“quoted” \\ 3"]
    assert asyncio.run(reward_func(prompts=prompts, images=[picture()] * 3, do=["prompt"] * 3)) == [1, 2, 3]


def test_every_kind_of_number_becomes_a_plain_one(judge):
    kinds = ask(RemoteReward(judge.url), 9, do=["kinds"] * 9)
    assert kinds == [float(np.float32(0.1)), 2.0, 0.3, 0.5, 0.25, 0.7, 0.125, 1.0, None]
    assert ask(RemoteReward(judge.url), 2, do=["array"] * 2) == [0.0, float(np.float32(1) / np.float32(3))]


def test_one_request_at_a_time_while_health_answers(judge):
    async def run():
        reward_func = RemoteReward(judge.url, batch_size=1, max_concurrency=4)
        scoring = asyncio.create_task(
            reward_func(prompts=["a"] * 4, images=[picture()] * 4, do=["sleep"] * 4, number=[0.25] * 4)
        )
        async with httpx2.AsyncClient() as client:
            await asyncio.sleep(0.2)
            health = await client.get(f"{judge.url}/health")
        return health.json(), scoring.done(), await scoring

    assert asyncio.run(run()) == ({"name": "my judge"}, False, [1.0] * 4)


def test_async_functions_run_in_one_event_loop(judge):
    for _ in range(2):
        assert ask(RemoteReward(judge.url), do=["loops"]) == [1.0]


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("fail", "500 Internal Server Error: KeyError: 'no such thing"),
        ("nan", "500 .*ValueError: A score must be a finite number or `None`, but there is nan"),
        ("infinite", "500 .*finite number or `None`, but there is inf"),
        ("text", "500 .*TypeError: A score must be a number or `None`, but there is '1.0'"),
        ("nothing", "500 .*TypeError: "),
        ("fewer", "500 .*`my judge` returned 1 scores for 2 images"),
    ],
)
def test_failure_of_the_reward(judge, do, message):
    with pytest.raises(RuntimeError, match=message):
        ask(RemoteReward(judge.url, retries=0), 2, do=[do] * 2)
    assert ask(RemoteReward(judge.url), do=["prompt"]) == [0]  # and the server goes on


def test_failure_of_the_reward_is_logged_with_its_traceback(judge):
    post(judge, json={"prompts": ["a"], "images": [base64(picture())], "columns": {"do": ["fail"]}})
    assert re.search(r"`my judge` failed.\nTraceback (.|\n)*my_rewards.py(.|\n)*KeyError: 'no such thing", judge.log)


def test_token(jpeg, monkeypatch):
    reward_func = RemoteReward(jpeg.url, token_env="MY_TOKEN")
    assert ask(reward_func) == jpeg_compressibility(prompts=[], images=[picture()])
    for token, state in (("another", "is set"), ("", "is not set")):
        monkeypatch.setenv("MY_TOKEN", token)
        with pytest.raises(RuntimeError, match=rf"401 .*missing or wrong.*`MY_TOKEN`, which {state}"):
            ask(reward_func)
    for wrong in (TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", b"Bearer \xff"):
        assert post(jpeg, headers={"Authorization": wrong}, content=b"").status_code == 401
    assert httpx2.get(f"{jpeg.url}/health").json() == {"name": "jpeg_compressibility"}
    assert TOKEN not in jpeg.log


def test_large_request_without_the_token_gets_its_answer(jpeg, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "another")
    with pytest.raises(RuntimeError, match="401"):
        ask(RemoteReward(jpeg.url, token_env="MY_TOKEN", retries=0), [picture(size=(1024, 2048))])


def test_request_that_is_too_large(judge):
    assert ask(RemoteReward(judge.url, max_request_bytes=LIMIT), 60, do=["prompt"] * 60) == list(range(60))
    with pytest.raises(RuntimeError, match=f"413 .*`--max_batch_bytes`, {LIMIT}"):
        ask(RemoteReward(judge.url), [picture(size=(1024, 2048))], do=["prompt"])


def body(**changes):
    given = {"prompts": ["0"], "images": [base64(picture())], "columns": {"do": ["prompt"]}, **changes}
    return {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (body(prompts=None), "`prompts` and `images`"),
        (body(images=None), "`prompts` and `images`"),
        ([], "`prompts` and `images`"),
        (3, "`prompts` and `images`"),
        (body(images="iVBO"), "must be lists"),
        (body(prompts="0"), "must be lists"),
        (body(columns=[]), "must be lists, and `columns` a JSON object"),
        (body(columns={"do": "p"}), "`do` must be a list of 1 entries"),
        (body(columns={"do": []}), "`do` must be a list of 1 entries"),
        (body(prompts=["0", "1"]), "`prompts` must be a list of 1 entries"),
        (body(images=["not base64!"]), r"`images\[0\]` is no PNG or WebP image in base64"),
        (body(images=["猫"]), r"`images\[0\]` is no PNG"),
        (body(images=[b64encode(b"no image").decode()]), r"`images\[0\]` is no PNG"),
        (body(images=[base64(picture())[:400]]), r"`images\[0\]` is no PNG"),
        (body(images=[base64(picture(), "GIF")]), r"`images\[0\]` is no PNG"),
        (body(images=[None]), r"`images\[0\]` is no PNG"),
        (body(images=[3]), r"`images\[0\]` is no PNG"),
        (body(images=[[base64(picture()), "broken"]]), r"`images\[0\]` is no PNG"),
        (body(images=[base64(Image.new("1", (20_000, 20_000)))]), r"`images\[0\]` is no PNG .*decompression bomb"),
    ],
    ids=str,
)
def test_bad_request(judge, request_body, message):
    response = post(judge, json=request_body)
    assert response.status_code == 400
    assert re.search(message, response.text)


@pytest.mark.parametrize(
    "content", [b"", b"prompts=1", b"\xff\xfe", b"[" * 100_000, b'{"prompts": '], ids=lambda c: c[:9]
)
def test_request_that_is_not_json(judge, content):
    response = post(judge, content=content)
    assert (response.status_code, response.text[:24]) == (400, "The request is not JSON ")


def test_other_paths_and_methods(judge):
    assert httpx2.get(f"{judge.url}/score").status_code == 405
    assert httpx2.post(f"{judge.url}/scores").status_code == 404
    with pytest.raises(RuntimeError, match="404 Not Found"):
        ask(RemoteReward(f"{judge.url}/other"))


def test_request_whose_client_left_while_it_waited_is_not_scored(judge):
    async def run():
        one = {"prompts": ["a"], "images": [picture()], "do": ["sleep"]}
        first = asyncio.create_task(RemoteReward(judge.url)(**one, number=[1.0]))
        await asyncio.sleep(0.3)
        with pytest.raises(ConnectionError, match="without an answer"):
            await RemoteReward(judge.url, timeout=0.3, retries=0)(**one, number=[60.0])
        await first

    asyncio.run(run())
    started = time.monotonic()
    assert ask(RemoteReward(judge.url), do=["active"]) == [1.0]
    assert time.monotonic() - started < 30


@pytest.fixture
def importable(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    "reward", ["my_rewards:give_prompt", "my_rewards.give_prompt", "flow_trl.rewards.jpeg:jpeg_compressibility"]
)
def test_reward_by_its_path(importable, reward):
    assert get_reward_func(reward).__name__ == reward.replace(":", ".").split(".")[-1]


@pytest.mark.parametrize(
    "reward", ["no_such_module:reward", "json:no_such_name", "./my_rewards.py:give_prompt", ":", ".darkness"]
)
def test_reward_that_does_not_exist(reward):
    with pytest.raises(ValueError, match=f"`reward` is {re.escape(repr(reward))}, which cannot be imported"):
        get_reward_func(reward)


def test_reward_that_cannot_be_called(importable):
    with pytest.raises(ValueError, match="`reward` is 'my_rewards:not_callable', a int: it must be a function"):
        get_reward_func("my_rewards:not_callable")


def test_server_starts_without_torch(folder):
    code = "import sys, flow_trl.rewards.serve; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "uvicorn" in modules
    assert not {"torch", "transformers", "httpx2"} & set(modules)


def test_missing_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "flow_trl.rewards.serve", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r'^The reward server needs `uvicorn`.*"flow-trl\[serve\]"'):
        import flow_trl.rewards.serve  # noqa: F401


def test_server_that_is_killed_in_the_middle_and_one_that_is_interrupted(servers, judge):
    """The last test, since it ends the servers."""

    async def run():
        reward_func = RemoteReward(judge.url, retries=1)
        scoring = asyncio.create_task(reward_func(prompts=["a"], images=[picture()], do=["sleep"], number=[60]))
        await asyncio.sleep(0.5)
        judge.process.kill()
        with pytest.raises(ConnectionError, match="failed in 2 of 2 attempts.*Is the server running"):
            await scoring

    asyncio.run(run())
    servers["jpeg"].wait()
    servers["jpeg"].process.send_signal(signal.SIGINT)
    assert servers["jpeg"].process.wait(20) == 0
    assert "Traceback" not in servers["jpeg"].log
