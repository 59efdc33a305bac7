"""Sharing: what is pushed is the bundle and no more, what cannot be pushed is told, and what was pushed is opened."""

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub as hub
import huggingface_hub.errors
import numpy as np
import pytest
from PIL import Image

from jft import bundle
from jft.errors import UserError
from jft.models import make_model
from jft.preprocess import Preprocess
from jft.push import FILES, push


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model, and what else there may be in and beside it."""
    folder = tmp_path_factory.mktemp("push") / "run"
    model = make_model("tiny_vit", num_classes=2)
    rng = np.random.default_rng(0)
    params, stats = ({n: rng.random(s.shape, np.float32) for n, s in of.items()} for of in model.shapes())
    bundle.save(
        folder / "model", model_name="tiny_vit", model_options={"num_classes": 2, "image_size": [32, 32]},
        params=params, batch_stats=stats, classes=["a", "b"], preprocess=Preprocess((32, 32)),
        card="---\ntags: []\n---\n",
    )  # fmt: skip
    (folder / "predictions.csv").write_text("private")
    (folder / "model" / "notes.txt").write_text("private")
    return folder


class Fake:
    """A hub that keeps what it is given."""

    private = False

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.made: list = []

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo, private, repo_type, exist_ok):
        self.made.append((repo, private, repo_type, exist_ok))
        return f"https://huggingface.co/{repo}"

    def model_info(self, repo):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo, operations, commit_message, repo_type):
        for one in operations:
            with one.as_file() as file:
                self.files[one.path_in_repo] = file.read()


def test_the_bundle_is_pushed_and_nothing_else(run, monkeypatch):
    fake, asked = Fake(), []
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    told = push(run, "me/bees", confirm=lambda text: asked.append(text) or True)
    assert told == "https://huggingface.co/me/bees" and fake.made == [("me/bees", False, "model", True)]
    assert fake.files == {name: (run / "model" / name).read_bytes() for name in FILES}
    (text,) = asked
    assert "a public repository me/bees" in text and all(name in text for name in FILES)
    assert "not uploaded: notes.txt" in text
    assert re.search(r"README.md +1 kB\n +config.json +[1-9] kB\n", text)


def test_nothing_is_sent_without_a_yes(run, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("it was asked of the hub"))
    with pytest.raises(UserError, match="Nothing was uploaded"):
        push(run, "me/bees", confirm=lambda told: False)
    for name in ("bees", "me/be es", "me/bees/x"):
        with pytest.raises(UserError, match="ORG/REPO is expected"):
            push(run, name)
    with pytest.raises(UserError, match="no model"):
        push(run.parent, "me/bees")
    for where in ("hf:me/bees", run / "no", run / "predictions.csv"):
        with pytest.raises(UserError, match="is no folder"):
            push(where, "me/bees")


def test_a_home_is_found(run, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setenv("HOME", str(run.parent))
    push("~/run", "me/bees")
    assert set(fake.files) == set(FILES)


def test_private_is_private(run, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    with pytest.raises(UserError, match="there already and public"):
        push(run, "me/bees", private=True)
    assert fake.files == {}
    fake.private = True
    assert push(run, "me/bees", private=True) and set(fake.files) == set(FILES)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (ConnectionError("no route"), "cannot be reached, or refuses .no route."),
        (hub.errors.OfflineModeIsEnabled("offline mode"), "offline mode"),
    ],
)
def test_what_is_missing_is_told(run, monkeypatch, error, message):
    class Failing(Fake):
        def whoami(self):
            raise error

    monkeypatch.setattr(hub, "HfApi", Failing)
    with pytest.raises(UserError, match=message):
        push(run, "me/bees")


class Server(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a push and a download take."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    tokens: set[str] = set()  # noqa: RUF012
    commit = "a" * 40

    def log_message(self, *args):
        pass

    def answer(self, body, code=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/bees", "id": "me/bees"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/bees/commit/{self.commit}"
            self.answer({"success": True, "commitOid": self.commit, "commitUrl": url})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        elif self.path.startswith("/api/models/me/bees"):
            siblings = [{"rfilename": n} for n in self.files]
            self.answer({"id": "me/bees", "sha": self.commit, "private": False, "siblings": siblings, "tags": []})
        elif "/resolve/" in self.path and name in self.files:
            etag = f'"{hash(self.files[name]) & 0xFFFFFFFF:08x}"'
            self.answer(self.files[name], ETag=etag, X_Repo_Commit=self.commit)
        else:
            self.answer({"error": self.path}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.mark.slow
def test_what_was_pushed_is_predicted_with_from_elsewhere(run, tmp_path):
    """Through the real client and a server on this machine: push, then predict by the repository's name alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "XLA_FLAGS": "",
    }  # fmt: skip
    words = [["push", str(run), "me/bees", "--yes"], ["predict", "hf:me/bees", "x.png", "--json"]]
    words += [["predict", "--weights", "hf:me/bees", "x.png", "--json"]]
    code = f"import sys\nfrom jft.cli import main\nsys.exit(sum(main(w) for w in {words!r}))"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert Server.files == {name: (run / "model" / name).read_bytes() for name in FILES}
    assert Server.tokens == {"Bearer hf_secret"}
    address, *rows = done.stdout.splitlines()
    assert address.endswith("/me/bees") and len(rows) == 2 and rows[0] == rows[1]
    assert json.loads(rows[0])["label"] in ("a", "b")
