"""Downloads through the real huggingface_hub, from a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import transformers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a model's page on the hub holds besides: none of it is needed.
LITTER = ("README.md", "tf_model.h5", "onnx/model.onnx", "flax_model.msgpack", "other.safetensors")

# Opens each (source, revision) of its argument and prints what came of it.
CLIENT = """
import json, sys
from bertrt.errors import BertRTError
from bertrt_export.checkpoints import open_checkpoint
answers = []
for source, revision in json.loads(sys.argv[1]):
    try:
        with open_checkpoint(source, revision=revision) as checkpoint:
            values = [float(checkpoint.tensor(name).sum()) for name in checkpoint.tensor_names]
            answers.append([checkpoint.source.kind, checkpoint.source.name, checkpoint.source.revision, sum(values)])
    except BertRTError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


class Hub:
    """The little of the hub's protocol that a download needs; notes the files that were asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.fetched: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0].strip("/")
                kind, _, rest = path.partition("/")
                name, marker, revision = rest.partition("/revision/")
                if kind == "api" and name.startswith("models/") and marker:
                    self.model(name.removeprefix("models/"), revision)
                else:
                    name, _, file = path.partition(f"/resolve/{COMMIT}/")
                    self.file(name, file)

            def model(self, name: str, revision: str) -> None:
                if name == "owner/gated":
                    self.refuse(403, "GatedRepo")
                elif name == "owner/down":
                    self.refuse(500, "")
                elif name not in hub.models:
                    self.refuse(401, "RepoNotFound")
                elif revision not in {"main", "v1", COMMIT}:
                    self.refuse(404, "RevisionNotFound")
                else:
                    files = [path for path in hub.models[name].rglob("*") if path.is_file()]
                    names = [path.relative_to(hub.models[name]).as_posix() for path in files]
                    value = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
                    self.give(json.dumps(value).encode(), {"Content-Type": "application/json"})

            def file(self, name: str, file: str) -> None:
                if self.command == "GET":
                    hub.fetched.add(file)
                data = (hub.models[name] / file).read_bytes()
                self.give(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

            def give(self, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody will while it is bound."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def ask(endpoint: str, cache: Path, questions: list[tuple[str, str | None]], **environment: str) -> list[Any]:
    # A process of its own: huggingface_hub reads its environment when it is imported.
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(questions)],
        env={**inherited, **own, **environment},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Progress is for terminals.
    assert done.stderr == ""
    answers = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answers, list)
    return answers


def test_download_offline_use_and_refusals(
    hub: Hub,
    closed_port: int,
    small_bert: Callable[..., transformers.BertForPreTraining],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = small_bert()
    plain = save_checkpoint(model)
    for name in (*LITTER, "pytorch_model.bin"):
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(b"not needed")
    sharded = save_checkpoint(model, max_shard_size="30KB")
    torch_only = save_checkpoint(model, safe_serialization=False)
    no_weights = save_checkpoint(model)
    (no_weights / "model.safetensors").unlink()
    hub.models = {
        "plain": plain,
        "owner/sharded": sharded,
        "owner/torch": torch_only,
        "owner/none": no_weights,
    }

    cache = tmp_path / "cache"
    found = ask(
        hub.url,
        cache,
        [
            ("plain", None),
            ("owner/sharded", "v1"),
            ("owner/torch", COMMIT),
            ("owner/none", None),
            ("owner/absent", None),
            ("owner/gated", None),
            ("plain", "no-such-branch"),
            ("owner/down", None),
        ],
    )
    total = found[0][3]
    assert found[:3] == [
        ["hub", "plain", COMMIT, total],
        ["hub", "owner/sharded", COMMIT, total],
        ["hub", "owner/torch", COMMIT, total],
    ]
    needed = {
        "config.json",
        "vocab.txt",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    }
    shards = {path.name for path in sharded.glob("model-*")}
    assert hub.fetched == needed | shards
    assert [answer[0] for answer in found[3:]] == ["CheckpointNotFoundError", *["DownloadError"] * 4]
    messages = [answer[1] for answer in found[3:]]
    for message, part in zip(
        messages,
        (
            "'owner/none' at 0123456789ab has no weights",
            "no such public model on the hub",
            "accepted its terms",
            "'plain' has no revision 'no-such-branch'",
            "the hub cannot be reached",
        ),
        strict=True,
    ):
        assert part in message
        assert "\n" not in message

    # Without a network: what is in the cache can be had, the rest is an error that names the alternative.
    nowhere = f"http://127.0.0.1:{closed_port}"
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        kept, lost = ask(nowhere, cache, [("plain", None), ("owner/new", None)], **environment)
        assert kept == ["hub", "plain", COMMIT, total]
        assert lost[0] == "DownloadError"
        assert "the hub cannot be reached (no network" in lost[1]
        assert "a local checkpoint folder instead, or 'demo'" in lost[1]


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bertrt.errors import DownloadError
    from bertrt_export.checkpoints import open_checkpoint

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pip install 'bertrt\[export\]'.*local checkpoint folder"):
        open_checkpoint("bert-base-cased")
