"""Who may come in, and what is served: pictures, thumbnails, exports and reports of runs, and no other file here."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.trainer.errors import UserError
from lorasmith.ui.context import Context
from lorasmith.ui.paths import require_allowed
from lorasmith.ui.server import Door

from .browser import Site, close, free_port

SECRETS = [
    "../.env",
    "HF_TOKEN",
    "config.toml",
    "events.jsonl",
    "trainer.log",
    "checkpoints/step-000002/adapter.safetensors",
]


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with a run that has a picture and an export, and secrets around them."""
    folder = tmp_path_factory.mktemp("safety")
    made = Site(folder / "runs", folder / "images")
    run = made.run("seen")
    for file in [run.path / secret for secret in SECRETS] + [
        run.path / "exports/.x.tmp",
        run.path / "exports/x.export.log",
    ]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("secret")
    for place in ("samples/step-000000/00.png", "compare/0123456789abcdef.png", "exports/seen-grid.png"):
        (run.path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(run.path / place)
    (run.exports / "seen.safetensors").write_bytes(b"weights")
    (run.exports / "out.safetensors").symlink_to(run.path / "HF_TOKEN")
    (run.path / "report.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    for name, target in (("linked", run.path / "HF_TOKEN"), ("inside", "config.toml"), ("unreported", None)):
        other = made.run(name)
        other.path.mkdir()
        other.config.write_text("secret", encoding="utf-8")
        if target:
            (other.path / "report.html").symlink_to(target)
    made.start()
    yield made
    close(made)


def asked(site: Site, path: str, data: bytes | None = None, **headers: Any) -> tuple[int, bytes]:
    """What the server answers, without any client that tidies addresses."""
    request = urllib.request.Request(site.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/seen/samples/step-000000/00.png",
        "/pictures/seen/compare/0123456789abcdef.png",
        "/pictures/seen/exports/seen-grid.png",
        "/exports/seen/exports/seen.safetensors",
    ],
)
def test_pictures_and_exports_are_served(open_site: Site, path: str):
    status, content = asked(open_site, path)
    assert status == 200
    assert content == (open_site.runs / path.partition("/")[2].partition("/")[2]).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        *(f"/{kind}/seen/{secret}" for kind in ("pictures", "exports") for secret in SECRETS),
        "/pictures/seen/samples/../HF_TOKEN",
        "/pictures/seen/samples/%2e%2e/HF_TOKEN",
        "/pictures/seen/samples/..%2f..%2f..%2f.env",
        "/exports/seen/exports/../config.toml",
        "/exports/seen/exports/.x.tmp",
        "/exports/seen/exports/x.export.log",
        "/exports/seen/exports/out.safetensors",
        "/exports/../seen/config.toml",
        "/exports/%2e%2e/runs/seen/config.toml",
        "/pictures/seen/samples",
        "/thumbnails/..%2f..%2fseen%2fconfig.toml",
        "/thumbnails/config.toml",
        "/drawn/..%2fseen%2fHF_TOKEN",
        "/reports/linked",
        "/reports/inside",
        "/reports/unreported",
        "/reports/nobody",
        "/reports/..",
        "/reports/%2e%2e",
        "/reports/..%2fruns%2fseen",
        "/reports/seen%2freport.html",
        "/reports/seen/config.toml",
        "/reports/seen/..%2fHF_TOKEN",
        "/reports/seen%00",
        "/reports/" + "a" * 300,
        "/exports/seen/report.html",
        "/pictures/seen/report.html",
    ],
)
def test_nothing_else_is_served(open_site: Site, path: str):
    status, content = asked(open_site, path)
    assert status in (403, 404)
    assert b"secret" not in content
    assert b"name =" not in content


def test_a_report_is_downloaded_and_never_a_page_of_this_address(open_site: Site):
    """Which could do here whatever a person can, should someone have written a script into it."""
    with urllib.request.urlopen(f"{open_site.url}/reports/seen?v=1", timeout=30) as answer:
        assert answer.read() == (open_site.run("seen").path / "report.html").read_bytes()
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="seen-report.html"'
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("secret", [*SECRETS, "samples/step-000000/00.png", "exports/seen.safetensors"])
def test_gradio_serves_no_file_of_the_run_folders(open_site: Site, secret: str):
    for address in (
        f"/gradio_api/file={open_site.runs / 'seen' / secret}",
        f"/file={open_site.runs / 'seen' / secret}",
    ):
        status, content = asked(open_site, address)
        assert status in (403, 404)
        assert b"secret" not in content


def test_gradio_serves_nothing_of_the_folder_it_was_started_in(open_site: Site):
    assert asked(open_site, f"/gradio_api/file={Path.cwd() / 'pyproject.toml'}")[0] in (403, 404)


def test_another_name_for_this_computer_is_refused(open_site: Site):
    """A foreign page whose name leads here could read everything (DNS rebinding)."""
    assert asked(open_site, "/", Host="evil.example")[0] == 400


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\na\r\n--x--\r\n'
"""A form, which a browser sends to any server without asking it first."""


def uploaded(site: Site, **headers: str) -> tuple[int, bytes]:
    return asked(site, "/gradio_api/upload", UPLOAD, **{"Content-Type": "multipart/form-data; boundary=x", **headers})


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
def test_other_pages_in_the_same_browser_can_ask_for_nothing(open_site: Site, origin: str):
    assert uploaded(open_site, Origin=origin)[0] == 403
    assert asked(open_site, "/gradio_api/info", Origin=origin)[0] == 403


def test_the_page_itself_and_programs_can_ask(open_site: Site):
    assert uploaded(open_site, Origin=open_site.url)[0] == 200
    assert uploaded(open_site)[0] == 200


def test_the_browser_is_told_to_ask_no_other_machine(open_site: Site):
    with urllib.request.urlopen(open_site.url, timeout=30) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_the_page_names_no_foreign_address_that_it_loads(open_site: Site):
    text = asked(open_site, "/")[1].decode()
    assert 'src="http' not in text
    assert "fonts.googleapis" not in text


def test_only_the_named_endpoints_can_be_called(open_site: Site):
    named = json.loads(asked(open_site, "/gradio_api/info")[1])
    assert set(named["named_endpoints"]) == {"/plan", "/train", "/status", "/stop", "/resume", "/sample", "/export"}
    assert named["unnamed_endpoints"] == {}


# ---------------------------------------------------------------------------------------------------------------------
# others


def test_others_come_in_with_a_password_only():
    with pytest.raises(UserError, match="others could start trainings"):
        Door.of(listen=True, port=7860, auth="")
    with pytest.raises(UserError, match="USER:PASSWORD"):
        Door.of(listen=True, port=7860, auth="me")
    assert Door.of(listen=False, port=7860, auth="").host == "127.0.0.1"
    assert Door.of(listen=True, port=7860, auth="me:a:b") == Door("0.0.0.0", 7860, "me", "a:b")


def test_the_command_refuses_to_listen_without_a_password(tmp_path: Path):
    command = [sys.executable, "-m", "lorasmith.trainer.cli", "ui", "--runs", str(tmp_path), "--listen"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "--auth USER:PASSWORD" in ended.stderr


@pytest.fixture(scope="module")
def guarded_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("guarded")
    made = Site(
        folder / "runs", folder / "images", ("--listen", "--auth", "me:secret", "--root", str(folder / "images"))
    )
    made.runs.mkdir()
    made.start()
    yield made
    close(made)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/info", "/pictures/x/samples/a.png", "/exports/x/exports/a", "/reports/x"]
)
@pytest.mark.parametrize("given", ["", "me:wrong", "other:secret", ":"])
def test_without_the_password_nothing_is_told(guarded_site: Site, path: str, given: str):
    headers: dict[str, Any] = {"Authorization": "Basic " + base64.b64encode(given.encode()).decode()} if given else {}
    status, content = asked(guarded_site, path, **headers)
    assert status == 401
    assert b"Lorasmith" not in content


def test_with_the_password_the_page_is_there(guarded_site: Site):
    known: dict[str, Any] = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    assert asked(guarded_site, "/", **known)[0] == 200
    assert asked(guarded_site, "/gradio_api/info", **known)[0] == 200


def test_the_password_lets_no_other_page_in(guarded_site: Site):
    """The browser sends it along with what other pages ask for."""
    known: dict[str, Any] = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    assert asked(guarded_site, "/gradio_api/info", Origin="https://evil.example", **known)[0] == 403
    assert uploaded(guarded_site, Origin="https://evil.example", **known)[0] == 403
    assert asked(guarded_site, "/gradio_api/info", Origin=guarded_site.url, **known)[0] == 200


def test_where_others_type_paths_lie_below_the_roots(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/out").symlink_to(tmp_path)
    context = Context.of(tmp_path / "runs", (tmp_path / "images",))
    assert context.path(str(tmp_path / "images/a")) == tmp_path / "images/a"
    assert context.path(str(tmp_path / "runs/x")) == tmp_path / "runs/x"
    for outside in ("/etc", str(tmp_path), str(tmp_path / "images/../other"), str(tmp_path / "images/out")):
        with pytest.raises(UserError, match="outside of the folders"):
            context.path(outside)
    with pytest.raises(UserError, match="nothing was given"):
        context.path("  ")
    context.planner.close()


def test_names_of_runs_lead_nowhere_else(tmp_path: Path):
    context = Context.of(tmp_path / "runs")
    (tmp_path / "runs/.hidden").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "runs/.hidden"):
        (folder / "config.toml").touch()
    assert [context.run(name) for name in ("..", ".hidden", "../runs", "", None)] == [None] * 5
    context.planner.close()


def test_a_port_in_use_is_told():
    door = Door(port=free_port())
    with door.socket() as taken:
        taken.listen()
        with pytest.raises(UserError, match=f"the port {door.port} is in use"):
            door.socket()


@pytest.mark.parametrize(
    "values",
    [
        {"data": [{"path": "/etc"}]},
        {"data": [{"path": "hf:/etc"}]},
        {"data": [{"path": "images"}, {"path": "/etc/table.parquet?image=x"}]},
        {"base": {"model": "~/model.safetensors"}},
        {"base": {"vae": "../vae"}},
        {"base": {"merge": ["/etc/detail.safetensors:0.5"]}},
        {"adapter": {"start_from": "/etc/start.safetensors"}},
        {"preference": {"start": "/etc/step-000100"}},
        {"runtime": {"cache": "/var/cache"}},
    ],
    ids=str,
)
def test_a_configuration_names_nothing_outside_of_the_roots(tmp_path: Path, values: dict[str, Any]):
    context = Context.of(tmp_path / "runs", (tmp_path / "images",))
    with pytest.raises(UserError, match="outside of the folders"):
        require_allowed(context, values)
    require_allowed(context, values, before=values)  # what a run was begun with may stay
    require_allowed(Context.of(tmp_path / "runs"), values)  # where nobody else can type
    context.planner.close()


def test_names_on_the_hub_and_bases_without_files_are_no_paths(tmp_path: Path):
    context = Context.of(tmp_path / "runs", (tmp_path / "images",))
    for model in ("pocket", "random:sd15", "owner/name"):
        require_allowed(context, {"base": {"model": model}, "data": [{"path": "hf:owner/name?image=picture"}]})
    context.planner.close()


@pytest.mark.parametrize("typed", ["~nobody-of-this-name/x", "a" * 300, "zero\0byte"])
def test_what_can_be_no_path_is_told(tmp_path: Path, typed: str):
    context = Context.of(tmp_path / "runs")
    with pytest.raises(UserError, match="is no path on this computer"):
        context.path(typed)
    context.planner.close()
