"""Publishing: what arrives on the Hub is the bundle, byte for byte, and the token is nowhere but in the requests."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.errors import UserError
from lorasmith.trainer.sharing.bundle import write_zip
from lorasmith.trainer.sharing.hub import publish

TOKEN = "hf_SeCrEtSeCrEtSeCrEt"
COMMIT = "c0ffee" + "0" * 34
CARD = "---\nlicense: mit\n---\n\n# A style\n"
CONTENTS: dict[str, Path | bytes] = {
    "README.md": CARD.encode(),
    "style.safetensors": bytes(range(256)) * 40,
    "style.json": b"{}\n",
    "images/00.png": b"\x89PNG picture",
}

# huggingface_hub hands files to its own HTTP library in a way that that has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class FakeHub:
    """A Hub of one account, which has `owner` and their token: as much of it as publishing needs."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name to the files of the newest commit."""
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    refuses: dict[str, int] = field(default_factory=dict)
    """Parts of addresses to the status that they get."""
    messages: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub takes for the real one; nobody is logged in on this computer."""
    from huggingface_hub import constants

    fake = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(fake)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield fake
        server.shutdown()


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.removeprefix("/api/models/")
            if self.is_refused():
                return
            if name in hub.repos:
                files = [{"rfilename": file} for file in hub.repos[name]]
                private = hub.private.get(name, False)
                self.send({"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": private})
            elif self.path == "/api/whoami-v2" and self.is_known():
                self.send({"name": "owner"})
            else:
                self.send({}, 404 if self.is_known() else 401, {"X-Error-Code": "RepoNotFound"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.is_refused():
                return
            if self.path == "/api/validate-yaml":
                wrong = "license: wrong" in json.loads(body)["content"]
                said = {"errors": [{"message": '"license" must be one of'}] if wrong else [], "warnings": []}
                self.send(said, 400 if wrong else 200)
            elif not self.is_known():
                self.send({"error": f"Invalid token {self.headers['Authorization']}"}, 401)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                is_new = hub.repos.setdefault(name, {".gitattributes": b""}) == {".gitattributes": b""}
                hub.private.setdefault(name, asked.get("visibility") == "private")
                self.send({"url": f"{hub.url}/{name}", "id": name}, 200 if is_new else 409)
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = {True: "lfs", False: "regular"}
                modes_of = {f["path"]: modes[f["path"].endswith((".safetensors", ".png"))] for f in asked}
                files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes_of.items()]
                self.send({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                self.send({"transfer": "basic", "objects": [self.place_of(o) for o in json.loads(body)["objects"]]})
            elif "/commit/" in self.path:
                self.commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)

        def place_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{hub.url}/store/{wanted['oid']}", "header": {}}}
            return wanted | ({} if wanted["oid"] in hub.stored else {"actions": upload})

        def do_PUT(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.is_refused():
                return
            assert "Authorization" not in self.headers  # the store is another company's
            hub.stored[self.path.removeprefix("/store/")] = content
            self.send({})

        def commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[name][value["path"]] = hub.stored[value["oid"]]
            self.send({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def is_known(self) -> bool:
            return self.headers["Authorization"] == f"Bearer {TOKEN}"

        def is_refused(self) -> bool:
            status = next((code for part, code in hub.refuses.items() if part in self.path), 0)
            if status:
                self.send({"error": f"no, {self.headers['Authorization']}"}, status)
            return bool(status)

        def send(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            for header, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "style.zip", CONTENTS)


def unpacked(bundle: Path) -> Path:
    folder = bundle.with_suffix("")
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    return folder


def refusal(*arguments: Any, **named: Any) -> str:
    """What is said against it, which never holds the token, however it is looked at."""
    with pytest.raises(UserError) as caught:
        publish(*arguments, **named)
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in repr(error)
        assert TOKEN not in str(error)
        error = error.__cause__ or error.__context__
    return str(caught.value)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_what_arrives_is_the_bundle(hub: FakeHub, bundle: Path, private: bool, kind: str):
    source = bundle if kind == "zip" else unpacked(bundle)
    published = publish(source, "owner/style", private=private, token=TOKEN)
    assert (published.url, published.commit) == (f"{hub.url}/owner/style", COMMIT)
    there = hub.repos["owner/style"]
    assert {name: content for name, content in there.items() if name != ".gitattributes"} == {
        **CONTENTS,
        "SHA256SUMS": zipfile.ZipFile(bundle).read("SHA256SUMS"),
    }
    assert set(published.files) == there.keys() - {".gitattributes"}
    assert hub.private["owner/style"] is private
    assert hub.messages == ["Upload style"]
    assert set(hub.stored) == {
        hashlib.sha256(there[name]).hexdigest() for name in ("style.safetensors", "images/00.png")
    }


def test_a_new_version_takes_the_place_of_the_old_one(hub: FakeHub, tmp_path: Path, bundle: Path):
    publish(bundle, "owner/style", token=TOKEN)
    newer = write_zip(tmp_path / "newer.zip", CONTENTS | {"style.safetensors": b"better"})
    publish(newer, "owner/style", token=TOKEN)
    assert hub.repos["owner/style"]["style.safetensors"] == b"better"


def test_the_token_comes_from_the_environment_too(hub: FakeHub, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish(bundle, "owner/style")
    assert hub.repos["owner/style"]["style.json"] == CONTENTS["style.json"]


def test_a_repository_of_something_else_is_left_alone(hub: FakeHub, bundle: Path):
    hub.repos["owner/style"] = {"README.md": b"mine", "other.safetensors": b"other"}
    said = refusal(bundle, "owner/style", token=TOKEN)
    assert "exists and holds something else (other.safetensors)" in said
    assert "--overwrite" in said
    assert hub.repos["owner/style"] == {"README.md": b"mine", "other.safetensors": b"other"}
    publish(bundle, "owner/style", token=TOKEN, overwrite=True)
    assert hub.repos["owner/style"]["other.safetensors"] == b"other"
    assert hub.repos["owner/style"]["README.md"] == CARD.encode()


def test_a_repository_that_all_can_see_is_not_taken_for_a_private_one(hub: FakeHub, bundle: Path):
    publish(bundle, "owner/style", token=TOKEN)
    assert "--private has no effect" in refusal(bundle, "owner/style", private=True, token=TOKEN)


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("/api/repos/create", 403, "this token may not write there"),
        ("/commit/", 403, "this token may not write there"),
        ("/objects/batch", 401, "does not know the token"),
        ("/commit/", 422, "the Hub answers 422"),
        ("/store/", 403, "the upload broke off"),
    ],
)
def test_what_the_hub_refuses_is_told_without_the_token(
    hub: FakeHub, bundle: Path, part: str, status: int, says: str, capfd: pytest.CaptureFixture[str]
):
    hub.refuses[part] = status
    assert says in refusal(bundle, "owner/style", token=TOKEN)
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_token_that_the_hub_does_not_know_is_told(hub: FakeHub, bundle: Path):
    said = refusal(bundle, "owner/style", token="hf_wrong")
    assert "does not know the token" in said
    assert "hf auth login" in said
    assert "hf_wrong" not in said
    assert hub.repos == {}


def test_without_a_token_nothing_is_asked(hub: FakeHub, bundle: Path):
    assert "nobody is logged in" in refusal(bundle, "owner/style")
    for token in (f"{TOKEN} {TOKEN}", f"{TOKEN}\nX-Other: 1", f"{TOKEN}ü"):
        said = refusal(bundle, "owner/style", token=token)
        assert "has letters that no token has" in said


def test_a_card_that_the_hub_refuses_is_named(hub: FakeHub, bundle: Path):
    folder = unpacked(bundle)
    (folder / "README.md").write_text(CARD.replace("mit", "wrong"), encoding="utf-8")  # cards may be edited
    said = refusal(folder, "owner/style", token=TOKEN)
    assert '"license" must be one of' in said
    assert "Mend README.md" in said


def spoil(name: str, content: bytes | None) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil("style.safetensors", b"other"), "style.safetensors: is not as it was exported"),
        (spoil("images/00.png", None), "images/00.png: is missing"),
        (spoil("README.md", None), "is no bundle"),
        (spoil("SHA256SUMS", None), "is no bundle"),
        (spoil("style.safetensors.rejected", b""), "style.safetensors.rejected: was set aside as no true export"),
        (spoil("style.unverified.safetensors", b""), "style.unverified.safetensors: was set aside"),
        (spoil("SHA256SUMS", b"0  ../style.zip\n"), "../style.zip: is missing"),
    ],
)
def test_what_is_no_whole_bundle_is_refused_before_anything_is_asked(
    hub: FakeHub, bundle: Path, change: Any, says: str
):
    folder = unpacked(bundle)
    change(folder)
    assert says in refusal(folder, "owner/style", token=TOKEN)
    assert hub.repos == {}


def test_other_files_in_a_folder_stay_where_they_are(hub: FakeHub, bundle: Path):
    folder = unpacked(bundle)
    (folder / "diary.txt").write_text("private", encoding="utf-8")
    publish(folder, "owner/style", token=TOKEN)
    assert "diary.txt" not in hub.repos["owner/style"]


@pytest.mark.parametrize("repo", ["style", "owner/style/x", "owner/sty le", "", "owner/../x", "owner/a--b"])
def test_a_name_that_is_none_is_refused(hub: FakeHub, bundle: Path, repo: str):
    assert "--repo" in refusal(bundle, repo, token=TOKEN)


def test_what_is_no_zip_is_refused(hub: FakeHub, tmp_path: Path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and nothing else")
    assert "neither a folder nor a zip" in refusal(tmp_path / "a.zip", "owner/style", token=TOKEN)
    assert "no such file" in refusal(tmp_path / "b.zip", "owner/style", token=TOKEN)


_SCRIPT = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.sharing.hub import publish
try:
    print(publish(Path(sys.argv[1]), "owner/style", private=True).url)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "/owner/style"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused: the Hub: cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "refused: the Hub: is not asked: HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": "hf_WrOnG"}, "refused: the Hub: does not know the token"),
    ],
    ids=["as it should be", "no network", "offline", "wrong token"],
)
def test_a_process_leaves_the_token_nowhere(
    hub: FakeHub, bundle: Path, tmp_path: Path, environment: dict[str, str], says: str
):
    """With all that it and its libraries can log."""
    home = tmp_path / "home"
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(bundle)],
        env={**os.environ, **own, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert says in run.stdout, run.stderr
    tokens = [TOKEN, environment.get("HF_TOKEN", TOKEN)]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for token in tokens:
        assert token not in run.stdout + run.stderr
        assert not any(token.encode() in content for content in [*written, *hub.repos.get("owner/style", {}).values()])
