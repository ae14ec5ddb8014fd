"""``mlx_loraplus serve``: the pages of all runs in a folder, live, for browsers.

The server only reads. It renders the pages of the runs that it finds from their histories. Of all
files, it sends only pages that this package has saved, such as those of sweeps and plans; a browser
runs no script in them but the pages' own.

On this machine alone it needs no token. In a network, every request must have one: in the address
the first time, and then in a cookie.
"""

import errno
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..command_config import ServeConfig
from ..errors import ConfigError, LoRAPlusError
from ..files import describe_contents
from ..pages.pages import Headline, PageLink, content_policy, render_index
from .history import HISTORY, REPORT, SETTINGS, Run
from .read_saved_page import SavedPage, read_page
from .report import LIVE_SECONDS, REFRESH, report_page
from .report_headline import headline

_COOKIE = "mlx_loraplus_token"
_SLOW_REFRESH = 60  # seconds after which a page loads itself again while no run reports
_MAX_DEPTH = 4  # levels below the served folder at which a run is still found
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # an address may have the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_HTML, _TEXT = "text/html", "text/plain"
_BROKEN = (LoRAPlusError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class _Found:
    """A run's folder or a saved page, and when it was last written, in seconds since 1970."""

    path: Path
    written: float

    def is_fresh(self, now: float) -> bool:
        """Return whether it was written recently, so that more may follow."""
        return now - self.written < LIVE_SECONDS


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
        raise ConfigError(f"{config.folder} is not a folder: give the folder that holds the runs")

    _check_shows_runs(Path(config.folder), log)

    token = config.token
    if not token and not is_loopback(config.host):
        token = secrets.token_urlsafe(16)
    app = make_app(Path(config.folder), token, now)

    with _listen(config) as listener:
        log(f"serving the runs in {config.folder} at {_address(config.host, listener, token)}")
        log("stop with Ctrl-C")
        settings = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(settings).run(sockets=[listener])


def _check_shows_runs(folder: Path, log: Callable[[str], None]) -> None:
    """Check that a folder without runs and pages is not one of something else.

    Raises:
        ConfigError: It holds data, a model or an adapter.
    """
    if any(find_runs(folder)) or any(find_pages(folder)):
        return
    if contents := describe_contents(folder):
        raise ConfigError(
            f"{folder} holds {contents}, and no runs: give the folder that holds the runs, the one"
            " above --adapter-path"
        )
    log(f"there are no runs in {folder} yet: the page lists them once they have started")


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
        status, kind, content = _run_page(folder, request.path_params["name"], now())
        return Response(content, status, media_type=kind)

    def saved_page(request: Request) -> Response:
        status, kind, content = _saved_page(folder, request.path_params["name"])
        return Response(content, status, media_type=kind)

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
        response.headers.update(_HEADERS | {"Content-Security-Policy": content_policy()})
        return response

    def _refused(_: Request) -> Response:
        text = "give the whole address that mlx_loraplus serve has printed, with its token"
        return PlainTextResponse(text, 403)

    routes = [
        Route("/", index),
        Route("/runs/{name:path}", page),
        Route("/pages/{name:path}", saved_page),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def find_runs(folder: Path) -> Iterator[tuple[str, _Found]]:
    """Yield the name and the run for each run below a folder; the name is its path from there.

    A served folder that is a run itself has an empty name.
    """
    for path, files in _walk(folder):
        if HISTORY in files and SETTINGS in files and not (path / HISTORY).is_symlink():
            written = (path / HISTORY).stat().st_mtime
            name = path.relative_to(folder).as_posix()
            yield "" if name == "." else name, _Found(path, written)


def find_pages(folder: Path) -> Iterator[tuple[str, _Found]]:
    """Yield the name and the file for each page below a folder; the name is its path from there.

    The report of a run is left out, because its page is rendered from its history.
    """
    for path, files in _walk(folder):
        for name in files:
            page = path / name
            is_report = name == REPORT and HISTORY in files
            if page.suffix == ".html" and name[0] != "." and not is_report:
                if page.is_symlink() or not page.is_file():
                    continue
                yield page.relative_to(folder).as_posix(), _Found(page, page.stat().st_mtime)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder that may hold runs or pages, and the names of its files."""
    for place, folders, files in os.walk(folder):
        path = Path(place)
        yield path, sorted(files)

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


def _run_page(folder: Path, name: str, now: float) -> tuple[int, str, bytes]:
    """Return the status, the type and the content of the answer for a run."""
    # Only the names of runs that were found are known, so a name can't lead anywhere else.
    found = dict(find_runs(folder)).get(name)
    if found is None:
        return 404, _TEXT, b"there is no such run"
    try:
        run = Run.load(found.path)
        has_ended = run.outcome != "not ended"
        live = not has_ended and found.is_fresh(now)
        # A silent run may go on, because the computer slept, or be continued.
        refresh = None if live or has_ended else _SLOW_REFRESH
        return 200, _HTML, report_page(run, live=live, heard=found.written, refresh=refresh)
    except _BROKEN as problem:
        return 500, _TEXT, f"this run can't be shown: {problem}".encode()


def _saved_page(folder: Path, name: str) -> tuple[int, str, bytes]:
    """Return the status, the type and the content of the answer for a saved page."""
    found = dict(find_pages(folder)).get(name)
    saved = None if found is None else _read_page(found)
    if saved is None:
        return 404, _TEXT, b"there is no such page"
    return 200, _HTML, saved.content


def _index_page(folder: Path, now: float) -> bytes:
    """Return the page with all runs and saved pages, the newest first."""
    links: list[tuple[float, PageLink]] = []
    for name, found in find_runs(folder):
        try:
            run = _read(found.path, found.written)
            live = run.outcome == "not ended" and found.is_fresh(now)
            head = headline(run, live=live)
        except _BROKEN as problem:
            head = Headline("can't be shown", "failed", str(problem))
        shown = name or folder.absolute().name
        links.append((found.written, PageLink(shown, f"/runs/{quote(name)}", head)))

    for name, found in find_pages(folder):
        saved = _read_page(found)
        if saved is not None:
            head = replace(saved.head, is_live=saved.head.is_live and found.is_fresh(now))
            links.append((found.written, PageLink(name, f"/pages/{quote(name)}", head)))

    newest_first = sorted(links, key=lambda each: -each[0])
    return _render_links(folder, [link for _, link in newest_first])


def _render_links(folder: Path, links: list[PageLink]) -> bytes:
    is_live = any(link.head.is_live for link in links)
    refresh = REFRESH if is_live else _SLOW_REFRESH  # another run may begin
    return render_index(f"Runs in {folder.absolute().name}", links, refresh)


def _read_page(found: _Found) -> SavedPage | None:
    """Return a saved page, or None if it can't be read or is of another program."""
    try:
        return read_page(found.path)
    except OSError:
        return None


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
        socket.getaddrinfo(config.host, config.port, family)  # its errors have a type of their own
        return socket.create_server((config.host, config.port), family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: a..b is not the name of a host
        # An unknown host, or one that is not an address of this machine, or else the port
        code = getattr(error, "errno", None)
        is_host = isinstance(error, socket.gaierror | UnicodeError) or code == errno.EADDRNOTAVAIL
        advice = "--port, such as 0 for a free one, or another --host"
        if is_host:
            advice = "--host, such as 127.0.0.1, or 0.0.0.0 for all addresses of this machine"
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while")[0]
        raise ConfigError(
            f"{config.host} port {config.port} can't be used ({reason}): give another {advice}"
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
