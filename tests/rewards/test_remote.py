import asyncio
import json
import socket
import struct
import threading
import time
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from flow_trl.rewards import RemoteReward, remote


def picture(seed=0, size=32, mode="RGB"):
    shape = (size, size, 4)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), "RGBA").convert(mode)


def ask(reward_func, images=1, **columns):
    images = [picture(i) for i in range(images)] if isinstance(images, int) else images
    return asyncio.run(reward_func(prompts=[f"prompt {i}" for i in range(len(images))], images=images, **columns))


def answer(body, status=200, **headers):
    def act(handler):
        handler.send_response(status)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Length": len(content), **headers}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(content)

    return act


def count(handler):
    """Scores each image with the number in its prompt."""
    answer({"scores": [int(prompt.split()[-1]) for prompt in handler.server.requests[-1]["prompts"]]})(handler)


def reset(handler):
    """Breaks off in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores"')
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hang(handler):
    handler.server.closing.wait(20)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.server.sizes.append(len(body))
            self.server.paths.append(self.path)
            self.server.tokens.append(self.headers["Authorization"])
            self.server.requests.append(json.loads(body))
            act = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            if act is not hang:
                act(self)
                self.close_connection = True
        if act is hang:
            act(self)

    def log_message(self, *args):
        pass


@contextmanager
def serving(*script):
    """A server that acts as the script says, request after request, and goes on with its last entry."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.lock, server.closing = list(script), threading.Lock(), threading.Event()
    server.times, server.sizes, server.paths, server.tokens, server.requests = [], [], [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("FLOW_TRL_REWARD_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("url", "endpoint", "name"),
    [
        ("http://gpu-box:8000", "http://gpu-box:8000/score", "gpu-box:8000"),
        ("http://gpu-box:8000/", "http://gpu-box:8000/score", "gpu-box:8000"),
        ("http://gpu-box/score", "http://gpu-box/score", "gpu-box"),
        ("https://rewards.example.org/hpsv2/score", "https://rewards.example.org/hpsv2/score", "hpsv2"),
        ("https://example.org/v1/aesthetic", "https://example.org/v1/aesthetic", "aesthetic"),
        ("http://[::1]:8000", "http://[::1]:8000/score", "[::1]:8000"),
    ],
)
def test_endpoint_and_name_follow_from_the_url(url, endpoint, name):
    reward_func = RemoteReward(url)  # nothing listens there
    assert (reward_func.url, reward_func.__name__) == (endpoint, name)
    assert RemoteReward(url, name="mine").__name__ == "mine"


@pytest.mark.parametrize("url", ["", "gpu-box", "localhost:8000", "ftp://gpu-box", "http://", "http://gpu-box:port"])
def test_wrong_url(url):
    with pytest.raises(ValueError, match="`url` is"):
        RemoteReward(url)


def test_url_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="FLOW_TRL_REWARD_TOKEN") as info:
        RemoteReward("http://me:secret@gpu-box:8000")
    assert "secret" not in str(info.value)


@pytest.mark.parametrize(
    "argument", [{"batch_size": 0}, {"max_concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"image_format": "JPEG"}]
)
def test_argument_out_of_range(argument):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}` is"):
        RemoteReward("http://gpu-box:8000", **argument)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_images_arrive_bit_by_bit(image_format, mode):
    images = [picture(mode=mode), picture(mode=mode, size=7)]
    with serving(count) as server:
        assert ask(RemoteReward(server.url, image_format=image_format), images) == [0, 1]
    for image, sent in zip(images, server.requests[0]["images"], strict=True):
        arrived = Image.open(BytesIO(b64decode(sent)))
        assert arrived.format == image_format
        if image_format == "PNG":
            assert arrived.mode == mode
        rgba = [i.convert("RGBA").tobytes() for i in (image, arrived)]
        assert rgba[0] == rgba[1]


def test_videos_arrive_as_lists_of_frames():
    videos = [[picture(i) for i in range(3)], [picture(9)], []]
    with serving(count) as server:
        assert ask(RemoteReward(server.url), videos) == [0, 1, 2]
    arrived = [[Image.open(BytesIO(b64decode(frame))) for frame in video] for video in server.requests[0]["images"]]
    assert [[f.tobytes() for f in video] for video in arrived] == [[f.tobytes() for f in video] for video in videos]


def test_scores_are_in_order_whatever_the_batches():
    with serving(count) as server:
        assert ask(RemoteReward(server.url, batch_size=3, max_concurrency=2), 10) == list(range(10))
    assert sorted(len(request["images"]) for request in server.requests) == [1, 3, 3, 3]
    assert set(server.paths) == {"/score"}


def test_no_images_need_no_server():
    assert ask(RemoteReward("http://127.0.0.1:9"), 0, text=[]) == []


def test_all_columns_are_sent_and_what_trainers_add_is_not():
    columns = {"text": ["ä \ud800", None], "include": [[{"color": "red"}], []], "size": [1, 2.5]}
    added = {"trainer_state": object(), "log_extra": print, "log_metric": print}
    with serving(count) as server:
        ask(RemoteReward(server.url), 2, **columns, **added)
        ask(RemoteReward(server.url, columns=["size"]), 2, **columns, **added, answer=[object(), object()])
        ask(RemoteReward(server.url, columns=[]), 2, **columns)
    assert [request["columns"] for request in server.requests] == [columns, {"size": [1, 2.5]}, {}]


@pytest.mark.parametrize("value", [Image.new("RGB", (1, 1)), np.float32(1), b"bytes", float("nan"), {1, 2}])
def test_column_that_is_no_json(value):
    with pytest.raises(TypeError, match=r"The column `mask` cannot be sent as JSON .*`columns=\['text'\]`"):
        ask(RemoteReward("http://127.0.0.1:9"), 1, mask=[value], text=["CAT"])


def test_missing_column():
    with pytest.raises(ValueError, match=r"no column 'txt'; there are 'text'"):
        ask(RemoteReward("http://127.0.0.1:9", columns=["txt"]), 1, text=["CAT"])


def test_lists_of_different_lengths():
    with pytest.raises(ValueError, match="`text` has 1 entries for 2 images"):
        ask(RemoteReward("http://127.0.0.1:9"), 2, text=["CAT"])


@pytest.mark.parametrize("image", [Image.new("CMYK", (4, 4)), Image.new("F", (4, 4)), np.zeros((4, 4, 3)), None])
def test_image_that_cannot_be_sent_unchanged(image):
    with pytest.raises(ValueError, match=r"`images\[1\]` is a .* of mode .*convert"):
        ask(RemoteReward("http://127.0.0.1:9"), [picture(), image])


def test_image_too_wide_for_webp():
    with pytest.raises(ValueError, match=r"`images\[0\]`, of 20000 x 1 pixels, cannot be written as WEBP"):
        ask(RemoteReward("http://127.0.0.1:9", image_format="WEBP"), [Image.new("L", (20000, 1))])


def test_large_batches_are_split():
    with serving(count) as server:
        assert ask(RemoteReward(server.url, max_request_bytes=15_000), 8) == list(range(8))
    assert len(server.sizes) == 4
    assert max(server.sizes) <= 15_000


def test_single_image_above_the_limit_is_an_error_before_anything_is_sent():
    with serving(count) as server, pytest.raises(ValueError, match=r"`images\[5\]` .*`max_request_bytes` is 10000"):
        reward_func = RemoteReward(server.url, max_request_bytes=10_000, batch_size=4)
        ask(reward_func, [*(picture(i) for i in range(5)), picture(size=256), picture(6)])
    assert server.requests == []


def test_no_more_requests_at_a_time_than_asked_for():
    active, most = [], []

    async def run():
        async def handle(reader, writer):
            active.append(writer)
            most.append(len(active))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            await asyncio.sleep(0.05)
            active.remove(writer)
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"scores": [1]}')
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            reward_func = RemoteReward(url, batch_size=1, max_concurrency=3)
            return await reward_func(prompts=["a"] * 9, images=[picture()] * 9)

    assert asyncio.run(run()) == [1.0] * 9
    assert max(most) == 3


def test_none_is_a_score():
    with serving(answer({"scores": [None, 1, 0.1]})) as server:
        assert ask(RemoteReward(server.url), 3) == [None, 1.0, 0.1]


@pytest.mark.parametrize(
    "failure",
    [reset, hang, answer(b"broken", 500), answer(b"restarting", 503), answer(b"busy", 429)],
    ids=["reset", "slow", "500", "503", "429"],
)
def test_failure_that_may_pass_is_tried_again(failure):
    with serving(failure, failure, count) as server:
        assert ask(RemoteReward(server.url, timeout=1 if failure is hang else 20)) == [0]
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (reset, ConnectionError, r"failed in 3 of 3 attempts, the last time with \w+Error.*Is the server running\?"),
        (hang, ConnectionError, r"failed in 3 of 3 attempts, the last time without an answer within `timeout`, 0.7 s"),
        (
            answer(b"KeyError: 'no such thing'", 500),
            RuntimeError,
            "failed in 3 of 3 attempts.* with 500 .*'no such thing'",
        ),
        (
            answer(b"busy", 429),
            RuntimeError,
            "failed in 3 of 3 attempts, the last time with 429 Too Many Requests: busy",
        ),
    ],
    ids=["reset", "slow", "500", "429"],
)
def test_failure_that_does_not_pass(failure, error, message):
    with serving(failure) as server, pytest.raises(error, match=message) as info:
        ask(RemoteReward(server.url, timeout=0.7 if failure is hang else 20, retries=2, name="judge"))
    assert len(server.requests) == 3
    assert f"{server.url}/score (reward `judge`)" in str(info.value)


def test_connection_refused():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"{url}/score .*failed in 2 of 2 attempts.*Is the server running"):
            ask(RemoteReward(url, retries=1))


def test_waits_double(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.1)
    with serving(answer(b"", 500), answer(b"", 502), answer(b"", 503), count) as server:
        ask(RemoteReward(server.url))
    waits = np.diff(server.times)
    assert (waits >= [0.1, 0.2, 0.4]).all()


def test_retry_after_is_waited_for():
    with serving(answer(b"", 429, Retry_After=1), count) as server:
        assert ask(RemoteReward(server.url)) == [0]
    assert np.diff(server.times) >= 1


@pytest.mark.parametrize("asked", ["86400", "Wed, 21 Oct 2026 07:28:00 GMT", "-1", "soon"])
def test_retry_after_is_bounded(monkeypatch, asked):
    monkeypatch.setattr(remote, "MAX_WAIT", 0.1)
    with serving(answer(b"", 503, Retry_After=asked), count) as server:
        started = time.monotonic()
        assert ask(RemoteReward(server.url)) == [0]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_other_client_errors_are_not_tried_again(status):
    with serving(answer(b"the image is broken" + b"." * 1000, status)) as server:
        with pytest.raises(RuntimeError, match=f"/score .*answered {status} .*: the image is broken") as info:
            ask(RemoteReward(server.url), 3)
    assert len(server.requests) == 1
    assert len(str(info.value)) < 400


def test_redirect_is_shown():
    with serving(answer(b"", 308, Location="https://gpu-box/score")) as server:
        with pytest.raises(RuntimeError, match="answered 308 .*points to https://gpu-box/score"):
            ask(RemoteReward(server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>hello</html>", "no JSON with `scores`.*<html>hello"),
        (b"", "no JSON with `scores`"),
        (b"[" * 100_000, "no JSON with `scores`"),
        (b"\xff\xfe\x00", "no JSON with `scores`"),
        ([1.0], "no JSON with `scores`"),
        ({"score": [1.0]}, "no JSON with `scores`"),
        ({"scores": 1.0}, "`scores` that are no list"),
        ({"scores": {"0": 1.0, "1": 1.0}}, "`scores` that are no list"),
        ({"scores": [1.0]}, "1 scores for 2 images"),
        ({"scores": [1.0] * 3}, "3 scores for 2 images"),
        ({"scores": [1.0, float("nan")]}, "the score nan for image 1"),
        ({"scores": [float("-inf"), 1.0]}, "the score -inf for image 0"),
        ({"scores": ["1.0", 1.0]}, "the score '1.0' for image 0"),
        ({"scores": [True, 1.0]}, "the score True for image 0"),
        ({"scores": [1.0, 10**400]}, "the score 1000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_answer_without_usable_scores_is_not_tried_again(body, problem):
    with serving(answer(body)) as server, pytest.raises(ValueError, match=problem) as info:
        ask(RemoteReward(server.url), 2)
    assert len(server.requests) == 1
    assert f"{server.url}/score" in str(info.value)
    assert "the answer must be" in str(info.value)
    assert len(str(info.value)) < 500


def test_first_error_stops_the_other_requests():
    with serving(answer(b"no", 404), hang) as server:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="answered 404"):
            ask(RemoteReward(server.url, batch_size=1, max_concurrency=2), 6)
    assert time.monotonic() - started < 10
    assert len(server.requests) <= 3


def test_token_is_sent_and_never_shown(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_TOKEN", "s3cret\n")
    with serving(count, answer(b"wrong token s3cret", 401)) as server:
        reward_func = RemoteReward(server.url, token_env="MY_TOKEN")
        assert ask(reward_func) == [0]
        with pytest.raises(RuntimeError, match=r"401 .*wrong token \*\*\*.*`MY_TOKEN`, which is set") as info:
            ask(reward_func)
    assert server.tokens == ["Bearer s3cret"] * 2
    assert "s3cret" not in f"{info.value} {reward_func!r} {vars(reward_func)} {caplog.text}"


@pytest.mark.parametrize("status", [401, 403])
def test_missing_token(status):
    with serving(answer(b"who are you?", status)) as server:
        with pytest.raises(RuntimeError, match="who are you.*`FLOW_TRL_REWARD_TOKEN`, which is not set"):
            ask(RemoteReward(server.url))
    assert server.tokens == [None]


def test_token_that_cannot_be_sent(monkeypatch):
    monkeypatch.setenv("FLOW_TRL_REWARD_TOKEN", "s3cret\nX-Other: 1")
    with pytest.raises(ValueError, match="`FLOW_TRL_REWARD_TOKEN`") as info:
        ask(RemoteReward("http://127.0.0.1:9"))
    assert "s3cret" not in str(info.value)
