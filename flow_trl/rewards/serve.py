"""
Serves a reward function to [`~rewards.RemoteReward`], from another environment, machine or GPU than the training's.

A reward model that needs other versions than the training, such as ImageReward or HPSv3, gets an environment of its own.
There the server needs Pillow and the packages of the extra `serve`, and nothing else of what flow_trl depends on. With
the model in `my_rewards.py`, as a function or as a class that loads it when it is constructed:

```python
class ImageReward:
    def __init__(self):
        import ImageReward

        self.model = ImageReward.load("ImageReward-v1.0")

    def __call__(self, prompts, images, **columns):
        return [self.model.score(prompt, image) for prompt, image in zip(prompts, images)]
```

```sh
pip install image-reward clip-anytorch "transformers==4.45.2" "diffusers==0.31.0" "torch==2.5.1" "torchvision==0.20.1"
pip install starlette uvicorn pillow && pip install --no-deps flow-trl
FLOW_TRL_REWARD_TOKEN=... python -m flow_trl.rewards.serve my_rewards:ImageReward --host 0.0.0.0 --port 8000
```

and on the machine that trains, with the same `FLOW_TRL_REWARD_TOKEN` in the environment,

```python
trainer = TPGRPOTrainer(model, reward_funcs=[RemoteReward("http://gpu-box:8000", name="image_reward")], ...)
```

A built-in reward is served by its name: `pip install "flow-trl[serve,ocr]"` and `python -m flow_trl.rewards.serve ocr`.

`POST /score` takes what [`~rewards.RemoteReward`] sends; requests are scored one after the other, in one thread.
`GET /health` answers with the reward's name, also meanwhile and without a token. Without a token whoever reaches the port
can ask for scores, and over `http` the token and the images are readable on the way: beyond a trusted network put the
server behind a proxy that speaks `https`. Ctrl-C ends the server after the requests under way, three times at once.
"""

import argparse
import asyncio
import hmac
import inspect
import json
import logging
import math
import os
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from PIL import Image

from . import get_reward_func, reward_name


try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    from ..utils import import_extra  # not above: it needs torch, and a server may do without

    import_extra(error.name, extra="serve", purpose="The reward server")

logger = logging.getLogger("flow_trl.rewards.serve")


def create_app(reward_func: Callable, *, token: str | None = None, max_batch_bytes: int = 64 * 2**20) -> Starlette:
    """
    Makes the ASGI application that serves a reward function.

    Args:
        reward_func (`Callable`):
            Reward function, sync or async.
        token (`str`, *optional*):
            Bearer token that requests for scores must carry. By default none is asked for.
        max_batch_bytes (`int`, *optional*, defaults to `67108864`, 64 MiB):
            Largest request.

    Returns:
        `starlette.applications.Starlette`: the application, with the routes `POST /score` and `GET /health`.

    Example:

    ```python
    >>> uvicorn.run(create_app(get_reward_func("ocr"), token="secret"), port=8000)
    ```
    """
    name = reward_name(reward_func)
    free = asyncio.Lock()
    worker = ThreadPoolExecutor(1)
    runner = asyncio.Runner()  # one event loop for all requests, which an async function's HTTP client may need

    def evaluate(arguments: dict[str, list]) -> list[float | None]:
        result = reward_func(**arguments)
        if inspect.isawaitable(result):
            result = runner.run(_wait_for(result))
        scores = [_to_number(score) for score in result]
        if len(scores) != len(arguments["images"]):
            raise ValueError(f"`{name}` returned {len(scores)} scores for {len(arguments['images'])} images.")
        return scores

    async def score(request: Request) -> Response:
        given = request.headers.get("Authorization", "").encode("latin-1")
        allowed = token is None or hmac.compare_digest(given, f"Bearer {token}".encode())
        # Read to its end in any case, since a client that is still sending may not see the answer
        body = bytearray()
        async for chunk in request.stream():
            if allowed and len(body) <= max_batch_bytes:
                body += chunk
        if not allowed:
            return _message(401, "The bearer token is missing or wrong.")
        if len(body) > max_batch_bytes:
            return _message(
                413, f"The request is larger than `--max_batch_bytes`, {max_batch_bytes}: send fewer images."
            )
        async with free:
            if await request.is_disconnected():
                return _message(400, "The client hung up.")
            in_worker = asyncio.get_running_loop().run_in_executor
            try:
                arguments = await in_worker(worker, _parse, body)
            except ValueError as error:
                return _message(400, str(error))
            try:
                return JSONResponse({"scores": await in_worker(worker, evaluate, arguments)})
            except Exception as error:
                logger.exception("The reward function `%s` failed.", name)
                return _message(500, f"{type(error).__name__}: {error}")

    async def health(request: Request) -> Response:
        return JSONResponse({"name": name})

    return Starlette(routes=[Route("/score", score, methods=["POST"]), Route("/health", health)])


def _message(status: int, text: str) -> Response:
    return PlainTextResponse(text.encode(errors="replace"), status)


def _parse(body: bytes) -> dict[str, list]:
    """The reward function's arguments from a request's body; a ValueError says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The request is not JSON ({error}).") from None
    if not isinstance(request, dict) or not {"prompts", "images"} <= request.keys():
        raise ValueError("The request must be a JSON object with `prompts` and `images`.")
    prompts, images, columns = request["prompts"], request["images"], request.get("columns", {})
    if not (isinstance(prompts, list) and isinstance(images, list) and isinstance(columns, dict)):
        raise ValueError("`prompts` and `images` must be lists, and `columns` a JSON object of lists.")
    for name, values in {**columns, "prompts": prompts}.items():
        if not isinstance(values, list) or len(values) != len(images):
            raise ValueError(f"`{name}` must be a list of {len(images)} entries, one per image.")
    return {**columns, "prompts": prompts, "images": [_decode(image, i) for i, image in enumerate(images)]}


def _decode(image: str | list[str], index: int) -> Image.Image | list[Image.Image]:
    if isinstance(image, list):
        return [_decode(frame, index) for frame in image]
    try:
        decoded = Image.open(BytesIO(b64decode(image, validate=True)), formats=["PNG", "WEBP"])
        decoded.load()
    except Exception as error:  # a broken file can raise almost anything in Pillow
        raise ValueError(f"`images[{index}]` is no PNG or WebP image in base64 ({error}).") from None
    return decoded


async def _wait_for(result: Any) -> Any:
    return await result


def _to_number(score: Any) -> float | None:
    if score is None:
        return None
    if isinstance(score, str):
        raise TypeError(f"A score must be a number or `None`, but there is {score!r}.")
    number = float(score.item() if hasattr(score, "item") else score)
    if not math.isfinite(number):
        raise ValueError(f"A score must be a finite number or `None`, but there is {number}.")
    return number


def main(argv: list[str] | None = None) -> None:
    """
    Runs the server, see the module's docstring.

    Args:
        argv (`list[str]`, *optional*):
            Arguments of the command line. Defaults to those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flow_trl.rewards.serve",
        description="Serves a reward function to flow_trl.rewards.RemoteReward.",
    )
    parser.add_argument("reward", help="name of a built-in reward, or package.module:name of a function or class")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines to reach it"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_batch_bytes", type=int, default=64 * 2**20, help="largest request (default: 64 MiB)")
    parser.add_argument(
        "--token_env",
        default="FLOW_TRL_REWARD_TOKEN",
        help="environment variable whose value, where it is set, clients must send as bearer token (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    token = os.environ.get(args.token_env, "").strip() or None
    app = create_app(get_reward_func(args.reward), token=token, max_batch_bytes=args.max_batch_bytes)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
