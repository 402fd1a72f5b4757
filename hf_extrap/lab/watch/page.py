"""The page: a Trackio dashboard on the loopback interface, behind a token, with copies of the runs' rows."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from transformers.integrations import rewrite_logs

from hf_extrap.lab.watch.advice import advice
from hf_extrap.lab.watch.runs import WatchedRun, find_runs
from hf_extrap.training.extras import extra

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Application = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[None]]], Awaitable[None]]

PROJECT = "hf_extrap"
HOST = "127.0.0.1"
#: Seconds between two readings of the folders.
PERIOD = 2.0
#: Ends of the names that are not shown.
UNSHOWN = ("step", "epoch", "_runtime", "_samples_per_second", "_steps_per_second", "_preparation_time")
#: What comes first on the page.
ORDER = "train/loss,eval/loss,eval/*,train/extrap/*,train/*"
COOKIE = "hf_extrap_token"


class Store:
    """Copies rows of runs into Trackio's database, in a folder that is deleted with the page."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.runs: dict[Path, WatchedRun] = {}
        self._told: dict[str, str] = {}

    def update(self) -> int:
        """Copy what is new; return the number of rows."""
        for run in find_runs(self.folders):
            self.runs.setdefault(run.folder.path, run)
        return sum(self._copy(run) for run in self.runs.values())

    def _copy(self, run: WatchedRun) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        rows = run.new_rows()
        if not rows:
            return 0
        steps = [row["step"] for row in rows]
        metrics = [_shown(row) for row in rows]
        SQLiteStorage.bulk_log(PROJECT, run.name, metrics, steps=steps, config=run.arguments())
        sentences = [(row["step"], text) for row in rows if (text := advice(row)) is not None]
        if sentences and self._told.get(run.name) != sentences[-1][1]:
            step, text = sentences[-1]
            self._told[run.name] = text
            SQLiteStorage.bulk_alert(PROJECT, run.name, ["Batch size"], [text], ["info"], [step])
        return len(rows)


def _shown(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, with the names that `report_to` gives them in TensorBoard, Trackio and W&B."""
    # The times of evaluations and of the whole training are no curves.
    is_curve = "loss" in row or any(name.startswith(("eval_", "test_")) for name in row)
    kept = {name: value for name, value in row.items() if value is not None and not name.endswith(UNSHOWN)}
    return dict(rewrite_logs(kept if is_curve else {}))


class Guard:
    """An ASGI application that answers only those who have the token, and only under the names of the loopback.

    The token comes once as `?token=…` and is kept in a cookie of the session.
    """

    def __init__(self, inner: Application, token: str) -> None:
        self._inner, self._token = inner, token

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._inner(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        cookies = dict(pair.strip().partition("=")[::2] for pair in headers.get("cookie", "").split(";"))
        # A page of another site whose name points here would come with that name.
        is_local = headers.get("host", "").partition(":")[0] in (HOST, "localhost")
        has_token = any(secrets.compare_digest(word, self._token) for word in (given, cookies.get(COOKIE, "")))
        if not (is_local and has_token):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"This page needs the address with its token."})

        async def with_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and given:
                cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                message["headers"] = [*message.get("headers", []), (b"set-cookie", cookie.encode())]
            await send(message)

        await self._inner(scope, receive, with_cookie)


@contextmanager
def serving(folders: Sequence[Path], port: int = 0) -> Iterator[tuple[str, Store]]:
    """Serve the page until the end of the block; yields its address, with the token, and the store.

    Args:
        folders: runs, or folders that hold runs.
        port: 0 for any free one.

    Raises:
        FileNotFoundError: a folder does not exist.
        ModuleNotFoundError: Trackio is not installed.
        RuntimeError: this process has served a page before.
        ValueError: no run lies in the folders, or the port is in use.
    """
    if not list(find_runs(folders)):
        raise ValueError(f"{', '.join(map(str, folders))}: no run is there; allowed: folders with history.jsonl below.")
    with tempfile.TemporaryDirectory(prefix="hf_extrap_watch_", ignore_cleanup_errors=True) as place:
        # Trackio reads them when it is imported.
        names = {"DIR": place, "CONFIG_PATH": str(Path(place) / "config.json"), "PLOT_ORDER": ORDER}
        os.environ |= {f"TRACKIO_{name}": value for name, value in names.items()}
        with extra("watch"):
            import uvicorn
            from trackio import utils
            from trackio.server import build_starlette_app_only
        if str(utils.TRACKIO_DIR) != place:
            raise RuntimeError("a process serves one page: Trackio has chosen its folder already.")

        store = Store(folders)
        store.update()
        token = secrets.token_urlsafe(24)
        application, _ = build_starlette_app_only()
        listener = socket.socket()
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            raise ValueError(f"port is {port}, which is in use; allowed: another one, or 0 for a free one.") from error
        server = uvicorn.Server(uvicorn.Config(Guard(application, token), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}/?project={PROJECT}&token={token}", store
        finally:
            server.should_exit = True
            thread.join(10)
            listener.close()


def watch(folders: Sequence[Path], port: int = 0, open_browser: bool = True) -> None:
    """Serve the page, and copy new rows, until Ctrl-C."""
    with serving(folders, port) as (address, store):
        print(f"{len(store.runs)} runs at {address}\nCtrl-C ends it.", flush=True)
        if open_browser:
            webbrowser.open(address)
        pause = threading.Event()
        try:
            while not pause.wait(PERIOD):
                store.update()
        except KeyboardInterrupt:
            print("ended")
