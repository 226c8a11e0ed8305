"""A Hub on this machine: it speaks as much of the API as `huggingface_hub` needs to create, upload, list and download."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from transformers.utils import hub as transformers_hub


USER = "me"


@dataclass
class Repo:
    """The files of a repository at its head, and the messages of its commits."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        state = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.files.items())
        return hashlib.sha1(repr((self.commits, state)).encode()).hexdigest()


class Hub:
    """
    A running server. `fault(method, path)` is asked before each request is answered: a number is answered as an HTTP status, `"drop"`
    closes the connection, `"hang"` keeps it open until the server stops, another `float` waits as many seconds, `None` goes on.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.fault: Callable[[str, str], int | float | str | None] = lambda method, path: None
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def files(self, repo: str) -> list[str]:
        return sorted(self.repos[repo].files)

    def close(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str):
        self._answer({"error": code}, 404, X_Error_Code=code)

    def _handle(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if not path.startswith("/lfs/"):  # whose addresses are signed
            hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer ") or None)
        fault = hub.fault(self.command, path)
        if fault == "drop" or fault == "hang":
            if fault == "hang":
                hub.stopped.wait()
            self.close_connection = True
            return self.connection.close()
        if isinstance(fault, float):
            time.sleep(fault)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault, int):
            return self._answer({"error": f"the fault {fault}"}, fault)
        parts = path.strip("/").split("/")
        kinds = ("models", "datasets", "spaces")
        if parts[:2] == ["api", "whoami-v2"]:
            return self._answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if parts[:2] == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[0] == "lfs":
            hub.objects[parts[1]] = body
            return self._answer()
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "api" and parts[1] in kinds:
            return self._api("/".join(parts[2:4]), parts[1], parts[4:], body)
        prefix = parts.pop(0) + "/" if parts[0] in kinds[1:] else ""
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve(prefix + "/".join(parts[:2]), "/".join(parts[4:]))
        return self._missing("RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, request: dict):
        kind = request.get("type") or "model"
        name = f"{request.get('organization') or USER}/{request['name']}"
        key = name if kind == "model" else f"{kind}s/{name}"
        status = 409 if key in self.hub.repos else 200
        self.hub.repos.setdefault(key, Repo({".gitattributes": b""}))
        self._answer({"url": f"{self.hub.endpoint}/{key}", "name": name}, status)

    def _batch(self, request: dict):
        objects = []
        for item in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def _api(self, name: str, kind: str, rest: list[str], body: bytes):
        repo = self.hub.repos.get(name if kind == "models" else f"{kind}/{name}")
        if repo is None:
            return self._missing("RepoNotFound")
        action = rest[0] if rest else "info"
        if action == "preupload":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            binary = (".safetensors", ".parquet", ".png", ".gif", ".pt", ".pth", ".bin")
            files = [
                {**file, "uploadMode": mode[file["path"].endswith(binary)], "shouldIgnore": False} for file in files
            ]
            return self._answer({"files": files})
        if action == "commit":
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if action == "tree":
            return self._answer([self._entry(path, data) for path, data in repo.files.items()])
        if action == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else []
            return self._answer([self._entry(path, repo.files[path]) for path in paths if path in repo.files])
        card = repo.files.get("README.md", b"").decode().split("---")
        info = {"id": name, "sha": repo.sha, "private": False, "tags": [], "downloads": 0, "likes": 0}
        info["siblings"] = [{"rfilename": path} for path in repo.files]
        if len(card) > 2:
            info["cardData"] = yaml.safe_load(card[1])
        self._answer(info)

    def _commit(self, name: str, repo: Repo, lines: list[dict]):
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                repo.commits.append(value["summary"])
            elif key == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                repo.files.pop(value["path"])
        url = f"{self.hub.endpoint}/{name}/commit/{repo.sha}"
        self._answer({"success": True, "commitOid": repo.sha, "commitUrl": url})

    @staticmethod
    def _entry(path: str, data: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _resolve(self, name: str, path: str):
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._missing("RepoNotFound")
        if path not in repo.files:
            return self._missing("EntryNotFound")
        data = repo.files[path]
        self._answer(data, X_Repo_Commit=repo.sha, ETag=f'"{hashlib.sha1(data).hexdigest()}"')


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for a test, which `huggingface_hub` in this process talks to; `HF_ENDPOINT` is for new processes."""
    server = Hub()
    environment = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_thesecretthatstayshere",
        "HF_HOME": str(tmp_path / "hub-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # What was read from the environment when it was imported
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-home" / "hub"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    close_session()
    yield server
    close_session()
    server.close()
