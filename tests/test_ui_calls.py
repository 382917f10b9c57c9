"""Random calls of a real server: whatever is asked, the answer is an answer, and nothing on the disk changes by it."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzz import seeds

from .browser import Site, close

PATIENCE = 60.0  # seconds for one answer
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 2**63, 10**40, "", " ", "\0", "\ud800"),
    *("é" * 300, "../r", "..", ".", "/etc/passwd", "~root/x", "C:\\x", "\\\\host\\share", "r/../r", "a" * 5000),
    *("r\n", "-rf", "%2e%2e", "<script>alert(1)</script>", "; touch pwned", "$(touch pwned)", "`touch pwned`"),
    *("{{7*7}}", "{red|blue}" * 50, [], {}, [[]], [None], ["a"] * 2000),
    *({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [[[[[["x"]]]]]], "name=../x", "data.path=/etc"),
    *("data.99999=1", "a.b.c.d.e.f.g=1", "=", "a=[[[[[[", "budget.images=1e999", "seed=-1", "file:///etc/passwd"),
    *("http://127.0.0.1:1/x", "hf:x", "random:sd15", "pocket", "r"),
]
"""Values of every kind, of which none is meant for the argument that it is given for."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server over a run that is done, which has a checkpoint that cannot be used."""
    folder = tmp_path_factory.mktemp("calls")
    seeds.runs(folder)
    seeds.photos(folder)
    (folder / "secret.txt").write_text("open sesame")
    (folder / "outside").mkdir()
    (folder / "outside" / "a.png").write_text("open sesame")
    for place in ("samples", "compare", "exports/a"):
        (folder / "runs" / "r" / place).mkdir(parents=True)
        (folder / "runs" / "r" / place / "out").symlink_to(folder / "outside")
        (folder / "runs" / "r" / place / "b.png").symlink_to(folder / "secret.txt")
    made = Site(folder / "runs", folder / "photos")
    made.start()
    yield made
    close(made)


@pytest.fixture(scope="module")
def endpoints(site: Site) -> dict[str, list[dict[str, Any]]]:
    """The named endpoints with their parameters, as the server tells them."""
    status, _, text = asked(site, "GET", "/gradio_api/info")
    assert status == 200
    return {name: told["parameters"] for name, told in json.loads(text)["named_endpoints"].items()}


def asked(
    site: Site, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], str]:
    """Status, headers and text of an answer; nothing tidies the address."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def called(site: Site, endpoint: str, data: Any) -> tuple[int, str]:
    """What a named endpoint answers: to the call, or, if that was taken, in the end."""
    body = json.dumps({"data": data}).encode()
    status, _, text = asked(site, "POST", f"/gradio_api/call{endpoint}", body, {"Content-Type": "application/json"})
    if status != 200:
        return status, text
    status, _, told = asked(site, "GET", f"/gradio_api/call{endpoint}/{json.loads(text)['event_id']}")
    return status, told


def require_discreet(site: Site, status: int, text: str) -> None:
    """No error of the server's own, nothing of its source, and no file that nobody may read."""
    assert status < 500, text
    source = Path(__file__).resolve().parents[1]
    for told in ("Traceback", 'File "', "site-packages", str(source / "ui"), str(source / "trainer"), "root:x:0"):
        assert told not in text, text
    assert "sesame" not in text


def contents(folder: Path) -> dict[str, str]:
    """Every file by its hash, but for the log of the server."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("ui.log",) and "cache" not in file.relative_to(folder).parts
    }


@pytest.fixture(autouse=True)
def unharmed(site: Site) -> Iterator[None]:
    """After all calls of a test: the files are the same, the log tells of no accident, and the server answers."""
    before = contents(site.runs.parent)
    logged = site.log.stat().st_size
    yield
    assert contents(site.runs.parent) == before
    said = site.log.read_bytes()[logged:].decode()
    assert "Traceback" not in said, said
    assert asked(site, "GET", "/")[0] == 200
    assert "Done, 2 steps." in called(site, "/status", ["r"])[1]


often = settings(
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_FITTING: dict[str, st.SearchStrategy[Any]] = {
    "string": st.sampled_from(["r", "a", "pocket"]),
    "number": st.integers(-3, 3) | st.floats(),
    "integer": st.integers(),
    "array": st.lists(st.sampled_from([*HOSTILE, "a cat"]), max_size=3),
}
"""Values that an argument may be given by its declared type."""


def arguments(parameters: list[dict[str, Any]]) -> st.SearchStrategy[list[Any]]:
    each = []
    for parameter in parameters:
        hostile = [value for value in HOSTILE if parameter["parameter_name"] != "images" or value not in (".", "..")]
        each.append(st.sampled_from(hostile) | _FITTING.get(str(parameter["type"].get("type")), st.none()))
    return st.tuples(*each).map(list)


@often
@given(data=st.data())
def test_endpoints_take_any_arguments(site: Site, endpoints: dict[str, list[dict[str, Any]]], data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(endpoints)))
    given_ = data.draw(st.one_of(arguments(endpoints[name]), st.sampled_from([*HOSTILE, [1] * 40])), label=name)
    require_discreet(site, *called(site, name, given_))


PATHS = [
    *(f"/{kind}/r/{place}" for kind in ("pictures", "exports") for place in ("samples/out/a.png", "compare/out/a.png")),
    *(f"/{kind}/r/{place}" for kind in ("pictures", "exports") for place in ("exports/a/out/a.png", "exports/a/b.png")),
    *("/gradio_api/call/nothing", "/gradio_api/call/v2/status", "/gradio_api/call/v2/nothing"),
    *("/gradio_api/run/status", "/gradio_api/run/nothing", "/gradio_api/api/plan", "/gradio_api/queue/join"),
    *("/gradio_api/queue/data", "/gradio_api/upload", "/gradio_api/upload_progress?upload_id=x"),
    *("/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/heartbeat", "/gradio_api/call/status/nothing"),
    *("/gradio_api/component_server", "/gradio_api/info?x=%00", "/gradio_api/file=/etc/passwd"),
    *("/gradio_api/file=../secret.txt", "/gradio_api/file/secret.txt", "/file=/etc/passwd"),
    *("/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/proxy=http://huggingface.co/x"),
    *("/gradio_api/process_recording", "/gradio_api/stream/x/x/x/playlist.m3u8", "/gradio_api/stream/x"),
    *("/gradio_api/openapi.json", "/gradio_api/vibe-edit", "/gradio_api/vibe-code", "/gradio_api/undo-vibe-edit"),
    *("/gradio_api/vibe-starter-queries", "/gradio_api/dev/reload", "/gradio_api/run-history/records"),
    *("/gradio_api/runs", "/monitoring", "/monitoring/x", "/login", "/logout", "/config"),
    *("/gradio_api/custom_component/x/y/z/w", "/static/../../x", "/assets/..%2f..%2fx", "/svelte/%2e%2e/%2e%2e/x"),
    *("/theme.css", "/manifest.json", "/pwa_icon/0", "/pwa_icon/-1", "/pwa_icon/99999999", "/gradio_api/app_id"),
    *("/captions", "/nothing", "/docs", "/openapi.json", "/gradio_api/token", "/gradio_api/deep_link"),
    *("/gradio_api/startup-events", "/gradio_api"),
    *(
        f"/pictures/r/{name}"
        for name in ("", "..", "samples/%00.png", "samples/" + "a" * 300 + ".png", "samples//x.png")
    ),
    *(
        f"/pictures/{run}/samples/a.png"
        for run in ("..", "%2e%2e", "a" * 300, "%00", ".", "%2fetc", "r%0a", "%ff", quote("é"))
    ),
    *(f"/exports/r/exports/{name}" for name in ("a" * 300, "r.md", "%2e%2e/config.toml", "..%5cconfig.toml", "r.md/x")),
    *("/drawn/" + "a" * 300 + ".png", "/drawn/%2e%2e%2fsecret.txt", "/thumbnails/" + "0" * 32 + ".webp"),
    *("//etc/passwd", "/" + "a/" * 3000, "/%", "/%zz", "/?" + "a" * 5000, "/;x", "/..;/secret.txt"),
    *("/%252e%252e%252fsecret.txt", "*"),
]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"]
BODIES = [
    *(None, b"", b"{", b"null", b"[]", b'{"data": null}', b'{"data": []}', b"\xff\xfe\0", b"[" * 20_000),
    *(b"9" * 5000, b'{"data": [1], "fn_index": 99999, "session_hash": "x"}'),
    b'{"data": [], "fn_index": -1, "session_hash": "x"}',
    b'{"data": {"a": 1}, "fn_index": "x", "session_hash": {}}',
    b'{"data": [], "fn_index": 0, "session_hash": "x"}',
    *(b'{"session_hash": "x", "fn_index": 1e999, "event_id": "x"}', b"a=1&b=2"),
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../x.txt"\r\n\r\nhello\r\n--x--\r\n',
]
HEADERS = [
    *({}, {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=x"}),
    *({"Content-Type": "multipart/form-data"}, {"Content-Type": "text/plain"}, {"Content-Type": "x" * 3000}),
    *({"Host": "evil.example"}, {"Host": ""}, {"Host": "127.0.0.1:99999999"}, {"Host": "[::1"}),
    *({"Range": "bytes=0-1"}, {"Range": "bytes=9-1"}, {"Range": "bytes=-9999999999999999999999"}, {"Range": "x"}),
    {"Range": "bytes=" + "0-0," * 300},
    {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "eA==", "Sec-WebSocket-Version": "13"},
    *({"Accept": "text/event-stream"}, {"Cookie": "a=\xff; " * 50}, {"Authorization": "Basic \xff"}),
    *({"Origin": "null"}, {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "javascript"}),
    *({"Accept-Encoding": "\xff"}, {"X-Gradio-Target": "http://127.0.0.1:1"}, {"Accept-Language": "x" * 2000}),
    {"If-Modified-Since": "never"},
]


@often
@given(
    method=st.sampled_from(METHODS),
    path=st.sampled_from(PATHS),
    body=st.sampled_from(BODIES),
    sent=st.sampled_from(HEADERS),
)
def test_routes_take_anything(site: Site, method: str, path: str, body: bytes | None, sent: dict[str, str]):
    status, _, text = asked(site, method, path, body, {**sent, "Connection": "close"})
    require_discreet(site, status, text)


@often
@given(given=st.fixed_dictionaries({key: st.sampled_from(HOSTILE) for key in ("folder", "name", "text", "shown")}))
def test_a_caption_of_anything_is_answered(site: Site, given: dict[str, Any]):
    status, _, text = asked(site, "POST", "/captions", json.dumps(given).encode(), {"Content-Type": "application/json"})
    assert status in (200, 400, 422)
    require_discreet(site, status, text)


@pytest.mark.parametrize(
    "headers", [{"Content-Length": str(2**40)}, {"Content-Length": "9" * 500}, {"Content-Length": str(2**25)}]
)
def test_a_body_that_is_too_large_is_not_waited_for(site: Site, headers: dict[str, str]):
    assert asked(site, "POST", "/gradio_api/call/status", headers=headers)[0] in (400, 413)


def test_a_body_of_unknown_length_is_refused(site: Site):
    assert asked(site, "POST", "/gradio_api/call/status", headers={"Transfer-Encoding": "chunked"})[0] == 413


JUNK = [
    *(b"\x16\x03\x01\x02\0" * 50, b"GET / HTTP/9.9\r\n\r\n", b"\0" * 4000, b"GET " + b"a" * 100_000),
    b"PRI * HTTP/2.0\r\n\r\n",
]


@pytest.mark.parametrize("junk", JUNK, ids=["TLS", "version", "zeros", "no end", "HTTP/2"])
def test_what_is_no_http_is_survived(site: Site, junk: bytes):
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as line:
        line.sendall(junk)
        line.shutdown(socket.SHUT_WR)
        with line.makefile("rb") as answer:
            require_discreet(site, 0, answer.read().decode("latin-1"))


def test_a_call_is_told_what_is_wrong_with_its_arguments(site: Site):
    """Before anything is done, by name."""
    for endpoint, data, what in (
        ("/status", [7], "run: should be a valid string"),
        ("/sample", ["r", "a cat", None, 1.0, None], "prompts: should be a valid list"),
        ("/sample", ["r", ["a cat"], "x", 1.0, None], "step: should be a valid integer"),
        ("/export", ["r", None, [1], "fp16", 1.0], "formats.0: should be a valid string"),
        ("/export", ["r"], "needed: 5, got: 1"),
    ):
        assert what in called(site, endpoint, data)[1]


@pytest.mark.parametrize(
    "name",
    [
        "../../x.png",
        "/etc/x.png",
        "a" * 400 + ".png",
        "..",
        "con",
        "x\0.png",
        "%2e%2e%2fx.png",
        "; touch x.png",
        "é.png",
    ],
)
def test_the_name_of_an_upload_leads_nowhere_else(site: Site, name: str):
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = f"{head}hello\r\n--x--\r\n".encode()
    sent = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _, text = asked(site, "POST", "/gradio_api/upload", body, sent)
    require_discreet(site, status, text)
    uploads = (site.runs.parent / "cache" / "lorasmith" / "uploads").resolve()
    for path in json.loads(text) if status == 200 else ():
        assert Path(path).resolve().is_relative_to(uploads)
