"""The web server: who may come in, which files are served, pictures and exports and nothing else, and captions taken.

Gradio would serve every file that a handler returns, and whole folders with all that is in them; so pages show pictures
by the addresses of `urls.py`, and this module answers them after a look at each.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ..datasets.thumbnails import THUMBNAIL_NAME, thumbnails
from ..trainer.errors import UserError
from ..trainer.files import user_cache
from ..trainer.jobs import RunFolder
from ..trainer.painting.orders import drawn_folder
from ..trainer.report.page import FILE as REPORT
from .api import NAMES
from .app import build
from .context import Context, is_file
from .images.saving import Answer, Left, save
from .theme import ASSETS, theme
from .urls import CAPTIONS, DRAWN, EXPORTS, PICTURES, REPORTS, THUMBNAILS

LARGEST_UPLOAD = "2gb"
"""Of one file; a folder of images as one zip is seldom as large."""
LARGEST_BODY = 16 * 2**20
"""Bytes of any other request; the largest of a page, thousands of captions, has one of them."""
_UPLOAD = "/gradio_api/upload"
_HEARTBEAT = "/gradio_api/heartbeat/"
"""Each tab would keep it open as long as it lives. A browser has six lines for all its tabs, and the seventh tab would
never come up; so browsers, which say how they fetch, get an answer that ends at once."""
_CLOSED = re.compile(
    rf"(/gradio_api)?/(call/(?!({'|'.join(NAMES)})/?($|/))|run|api/|proxy=|stream|vibe-|undo-vibe|process_recording|dev/"
    r"|monitoring|profiling|component_server|custom_component|deep_link|token|log(in|out)(/|$)|openapi)"
)
"""What Gradio offers besides, and no page of ours asks for: other ways to call, errors of which are a server's own; a
proxy, recordings, changes of the program, and accounts of its own."""
_PICTURE = re.compile(r"(samples|compare|exports)/([\w-][\w. -]*/)*[\w-][\w. -]*\.(png|jpg|jpeg|webp)")
_EXPORT = re.compile(r"exports/([\w-][\w. -]*/)*[\w-][\w. -]*")
_REPORT = re.compile(re.escape(REPORT))
_NOT_TO_SHARE = re.compile(r"\.unverified\.|\.rejected$|\.tmp$|\.log$")
_DRAWN = re.compile(r"[\w-]+\.png")
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The browser itself refuses to ask any other machine for anything."""


@dataclass(frozen=True)
class Door:
    """Where the server listens, and who may come in."""

    host: str = "127.0.0.1"
    port: int = 7860
    user: str = ""
    password: str = ""

    @classmethod
    def of(cls, listen: bool, port: int, auth: str) -> Door:
        """From the command line.

        Raises:
            UserError: if others could reach the page without a password.
        """
        user, colon, password = auth.partition(":")
        if auth and not (user and colon and password):
            raise UserError("is not USER:PASSWORD", "--auth", "Write both, with a colon between: --auth me:secret.")
        if listen and not auth:
            what = "others could start trainings and read what your folders hold"
            raise UserError(what, "--listen", "Give a name and a password: --listen --auth USER:PASSWORD.")
        return cls("0.0.0.0" if listen else "127.0.0.1", port, user, password)

    @property
    def is_local(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def socket(self) -> socket.socket:
        """Bound, so that a port in use is told before anything starts.

        Raises:
            UserError: if it is in use.
        """
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name != "nt":  # there it would share the port with another program
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
        except OSError as error:
            bound.close()
            fix = f"Take another one: --port {self.port % 65535 + 1}"
            raise UserError(f"the port {self.port} is in use", "--port", fix) from error
        return bound


def serve(runs: Path, door: Door, roots: tuple[Path, ...] = ()) -> None:
    """Serve the page until Ctrl-C; runs go on without it.

    Raises:
        UserError: if the port is in use.
    """
    bound = door.socket()
    runs.mkdir(parents=True, exist_ok=True)
    context = Context.of(runs, () if door.is_local else (roots or (Path.cwd(),)))
    try:
        app = application(context, door)
        print(
            f"Lorasmith is at http://{'127.0.0.1' if door.is_local else socket.gethostname()}:{door.port}", flush=True
        )
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
    finally:
        context.planner.close()
        bound.close()


def application(context: Context, door: Door) -> FastAPI:
    """The page with its files, behind the door."""
    os.environ["GRADIO_TEMP_DIR"] = str(user_cache() / "uploads")
    app = FastAPI(title="Lorasmith", docs_url=None, redoc_url=None, openapi_url=None)
    _serve_files(app, context)
    _take_captions(app, context)
    app.add_exception_handler(RequestValidationError, _not_understood)
    gr.mount_gradio_app(
        app,
        build(context),
        path="",
        server_name=door.host,
        server_port=door.port,
        footer_links=["api"],
        run_history=False,
        max_file_size=LARGEST_UPLOAD,
        show_error=False,
        ssr_mode=False,
        theme=theme(),
        css_paths=[ASSETS / "lorasmith.css"],
        head=f"<script>{(ASSETS / 'lorasmith.js').read_text(encoding='utf-8')}</script>",
    )
    for mounted in app.routes:
        if isinstance(mounted, Mount) and isinstance(mounted.app, FastAPI):
            mounted.app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_middleware(Guard, door=door)
    if door.is_local:  # else a foreign page could take this one's name, and read it (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return app


def _not_understood(_request: Request, _error: Exception) -> PlainTextResponse:
    """FastAPI would send back what came, and fails where that is no text."""
    return PlainTextResponse("That is not what is taken here.", 422)


class Guard:
    """Asks for the password, where there is one, before anything is answered; refuses what other pages in the same
    browser ask for, which would bring the password along; and tells the browser what to refuse itself."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.expected = base64.b64encode(f"{door.user}:{door.password}".encode()) if door.user else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # no page asks for a websocket
            await WebSocketClose()(scope, receive, send)
        elif refusal := self._refusal(scope):
            await refusal(scope, receive, send)
        elif scope["path"].startswith(_HEARTBEAT) and "sec-fetch-mode" in Headers(scope=scope):
            await PlainTextResponse("data: ALIVE\n\n", media_type="text/event-stream")(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, lambda message: send(_with_policy(message)))
        except RuntimeError as error:
            if not isinstance(error.__cause__, StarletteHTTPException):
                raise
            # Gradio has said within a stream of events that it knows no such call, and then raises it as well
            await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        """Why nothing is answered; None if something is."""
        headers, path = Headers(scope=scope), scope["path"]
        if not _of_this_page(headers):
            return PlainTextResponse("Another page may ask for nothing here.", 403)
        if not self._may_enter(headers):
            asking = {"WWW-Authenticate": 'Basic realm="Lorasmith", charset="UTF-8"'}
            return PlainTextResponse("Name and password, please.", 401, asking)
        if _CLOSED.match(path):
            return PlainTextResponse("There is nothing here.", 404)
        if path != _UPLOAD and ("transfer-encoding" in headers or not _is_small(headers.get("content-length", "0"))):
            return PlainTextResponse(f"No more than {LARGEST_BODY >> 20} MiB are taken, and their number first.", 413)
        return None

    def _may_enter(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        is_known = kind.lower() == "basic" and secrets.compare_digest(given.strip().encode(), self.expected)
        return not self.expected or is_known


def _is_small(length: str) -> bool:
    return length.isascii() and length.isdecimal() and len(length) < 10 and int(length) <= LARGEST_BODY


def _of_this_page(headers: Headers) -> bool:
    """A browser tells which page asks, wherever the answer could be read or something could change; programs do not."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _with_policy(message: Message) -> Message:
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        headers["Content-Security-Policy"] = _POLICY
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
    return message


def _take_captions(app: FastAPI, context: Context) -> None:
    @app.post(CAPTIONS)
    def caption(left: Left) -> Answer:
        return save(context, left)


# ---------------------------------------------------------------------------------------------------------------------
# files


def _serve_files(app: FastAPI, context: Context) -> None:
    def below(run_name: str, path: str, pattern: re.Pattern[str]) -> Path:
        run = context.run(run_name)
        return _allowed(run, path, pattern) if run else _nothing_here()

    @app.get(PICTURES + "/{run}/{path:path}")
    def picture(run: str, path: str) -> FileResponse:
        return FileResponse(below(run, path, _PICTURE), headers={"Cache-Control": "private, max-age=86400"})

    @app.get(EXPORTS + "/{run}/{path:path}")
    def export(run: str, path: str) -> FileResponse:
        file = below(run, path, _EXPORT)
        return FileResponse(file, filename=file.name, media_type="application/octet-stream")

    @app.get(REPORTS + "/{run}")
    def report(run: str) -> FileResponse:
        """To download, and never as a page of this address, which could do here what a person can."""
        file = below(run, REPORT, _REPORT)
        return FileResponse(file, filename=f"{file.parent.name}-{REPORT}", media_type="application/octet-stream")

    @app.get(THUMBNAILS + "/{name}")
    def thumbnail(name: str) -> FileResponse:
        return FileResponse(
            _named(thumbnails(), name, THUMBNAIL_NAME), headers={"Cache-Control": "private, max-age=604800"}
        )

    @app.get(DRAWN + "/{name}")
    def drawn(name: str) -> FileResponse:
        return FileResponse(_named(drawn_folder(context.runs), name, _DRAWN))


def _allowed(run: RunFolder, path: str, pattern: re.Pattern[str]) -> Path:
    """A file of a run that may be served: by its name, and by where it lies after links are followed."""
    file = run.path / path
    if pattern.fullmatch(path) and ".." not in path and not _NOT_TO_SHARE.search(path) and is_file(file):
        inside = run.path.resolve() / path.partition("/")[0]
        if file.resolve().is_relative_to(inside):
            return file
    return _nothing_here()


def _named(folder: Path, name: str, pattern: re.Pattern[str]) -> Path:
    file = folder / name
    return file if pattern.fullmatch(name) and is_file(file) and not file.is_symlink() else _nothing_here()


def _nothing_here() -> Path:
    raise HTTPException(404, "There is no such file.")
