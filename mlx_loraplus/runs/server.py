"""``mlx_loraplus serve``: the pages of all runs in a folder, live, for browsers.

The server only reads. It renders pages from the histories of the runs that it finds, and sends no
other file. On this machine alone it needs no token. In a network, every request must have one: in
the address the first time, and then in a cookie.
"""

import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..command_config import ServeConfig
from ..errors import ConfigError, LoRAPlusError
from ..pages.pages import Headline, RunLink, render_index
from .history import HISTORY, SETTINGS, Run
from .report import LIVE_SECONDS, REFRESH, report_page
from .report_headline import headline

_COOKIE = "mlx_loraplus_token"
_MAX_DEPTH = 4  # folders between the served folder and a run
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # an address may have the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_BROKEN = (LoRAPlusError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class _Found:
    """A run's folder, and when its history was written, in seconds since 1970."""

    folder: Path
    written: float

    def is_live(self, run: Run, now: float) -> bool:
        """Return whether a run has not ended, and has written its history recently."""
        return run.outcome == "not ended" and now - self.written < LIVE_SECONDS


def serve_folder(config: ServeConfig, log: Callable[[str], None], now: Callable[[], float]) -> None:
    """Serve the pages of the runs in a folder until Ctrl-C.

    Args:
        config: The folder, and where to serve it.
        log: Called with the address.
        now: Returns the time, in seconds since 1970.

    Raises:
        ConfigError: The folder does not exist, the address can't be used, or the libraries are not
            installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _missing_library(error) from None
    if not Path(config.folder).is_dir():
        raise ConfigError(f"{config.folder} is no folder: give the folder that holds the runs")

    token = config.token
    if not token and not is_loopback(config.host):
        token = secrets.token_urlsafe(16)
    app = make_app(Path(config.folder), token, now)

    with _listen(config) as listener:
        log(f"serving the runs in {config.folder} at {_address(config.host, listener, token)}")
        log("stop with Ctrl-C")
        settings = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(settings).run(sockets=[listener])


def make_app(folder: Path, token: str | None, now: Callable[[], float]) -> Any:
    """Return the ASGI application that serves the runs in a folder.

    Args:
        folder: The folder; its runs are looked for at every request.
        token: What requests must have. Without one, only requests to this machine are answered.
        now: Returns the time, in seconds since 1970.

    Raises:
        ConfigError: The library is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.base import BaseHTTPMiddleware
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise _missing_library(error) from None

    def index(_: Request) -> Response:
        return HTMLResponse(_index_page(folder, now()))

    def page(request: Request) -> Response:
        # Only the names of runs that were found are known, so a name can't lead anywhere else.
        found = dict(find_runs(folder)).get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("there is no such run", 404)
        try:
            run = Run.load(found.folder)
            live = found.is_live(run, now())
            return HTMLResponse(report_page(run, live=live, heard=found.written))
        except _BROKEN as problem:
            return PlainTextResponse(f"this run can't be shown: {problem}", 500)

    async def guard(request: Request, call_next: Any) -> Response:
        if token is None:
            allowed = is_loopback(request.url.hostname or "")
            response = await call_next(request) if allowed else _refused(request)
        elif _is_same(request.query_params.get("token"), token):
            # The next addresses need no token, so that it is not shared by accident.
            response = RedirectResponse(request.url.path, 303)
            response.set_cookie(_COOKIE, token, httponly=True, samesite="lax")
        elif _is_same(request.cookies.get(_COOKIE), token):
            response = await call_next(request)
        else:
            response = _refused(request)
        response.headers.update(_HEADERS)
        return response

    def _refused(_: Request) -> Response:
        text = "give the whole address that mlx_loraplus serve has printed, with its token"
        return PlainTextResponse(text, 403)

    routes = [Route("/", index), Route("/runs/{name:path}", page)]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def find_runs(folder: Path) -> Iterator[tuple[str, _Found]]:
    """Yield the name of each run below a folder, which is its path from there, and the run.

    A served folder that is a run itself has an empty name.
    """
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if HISTORY in files and SETTINGS in files and not (path / HISTORY).is_symlink():
            written = (path / HISTORY).stat().st_mtime
            name = path.relative_to(folder).as_posix()
            yield "" if name == "." else name, _Found(path, written)

        # A run's own folders, such as checkpoints, hold no runs.
        depth = len(path.relative_to(folder).parts)
        is_end = depth >= _MAX_DEPTH or (HISTORY in files and path != folder)
        folders[:] = [] if is_end else sorted(name for name in folders if name[0] != ".")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, which no other machine can reach by that name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _index_page(folder: Path, now: float) -> bytes:
    """Return the page with all runs, the newest first."""
    runs = sorted(find_runs(folder), key=lambda each: -each[1].written)
    links: list[RunLink] = []
    for name, found in runs:
        address = f"/runs/{quote(name)}"
        try:
            run = _read(found.folder, found.written)
            head = headline(run, live=found.is_live(run, now))
        except _BROKEN as problem:
            head = Headline("can't be shown", "failed", str(problem))
        links.append(RunLink(name or folder.absolute().name, address, head))
    is_live = any(link.head.is_live for link in links)
    return render_index(f"Runs in {folder.absolute().name}", links, REFRESH if is_live else None)


@lru_cache(maxsize=256)
def _read(folder: Path, written: float) -> Run:  # noqa: ARG001  the key of the cache
    """Return a run, which is read again when its history has changed."""
    return Run.load(folder)


def _is_same(given: str | None, token: str) -> bool:
    """Compare in constant time, so that the time reveals nothing about the token."""
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


def _listen(config: ServeConfig) -> socket.socket:
    """Return a socket that listens at the address.

    Raises:
        ConfigError: The address can't be used.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{config.host} port {config.port} can't be used ({error.strerror}): give another"
            " --port, such as 0 for a free one, or another --host"
        ) from None


def _address(host: str, listener: socket.socket, token: str | None) -> str:
    """Return the address to open in a browser."""
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):  # all addresses of this machine  # noqa: S104
        shown = socket.gethostname()
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def _missing_library(error: ImportError) -> ConfigError:
    return ConfigError(f"serve needs its libraries ({error}): pip install 'mlx_loraplus[serve]'")
