"""The server of a folder of runs: what it shows, to whom, and that it shows nothing else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.pages.pages import content_policy
from mlx_loraplus.runs.history import encode_history
from mlx_loraplus.runs.server import find_runs, is_loopback, make_app
from mlx_loraplus.serve import main
from mlx_loraplus.sweep.sweep_page import sweep_page
from mlx_loraplus.sweep.sweep_result import Sweep
from mlx_loraplus.sweep.trial import Point
from tests.training.tiny_runs import Place

testclient = pytest.importorskip("starlette.testclient")
TOKEN = "s3cret-token"


@pytest.fixture
def runs(place: Place, tmp_path: Path) -> Path:
    """A folder with a finished run, a live one below another folder, and a broken one."""
    folder = tmp_path / "all runs"
    shutil.copytree(place.folder / "plus", folder / "plus")
    shutil.copytree(place.folder / "plus", folder / "later" / "a&b")
    run = ml.Run.load(folder / "later" / "a&b")
    (folder / "later" / "a&b" / "history.jsonl").write_bytes(encode_history(run.history[:-1]))
    (folder / "broken").mkdir()
    (folder / "broken" / "history.jsonl").write_text("[]\n")
    (folder / "broken" / "run.yaml").write_text("model: <b>\n")
    return folder


def client(folder: Path, token: str | None = None, **options: Any) -> Any:
    """Return a client of a server, at a time shortly after the live run's last event."""
    written = (folder / "later" / "a&b" / "history.jsonl").stat().st_mtime
    app = make_app(folder, token, lambda: written + 5)
    return testclient.TestClient(app, base_url="http://127.0.0.1:8765", **options)


def test_all_runs_are_listed_and_have_their_pages(runs: Path):
    with client(runs) as http:
        page = http.get("/").text
        assert page.count("<article") == 3
        assert 'data-refresh="10"' in page, "a run is live"
        assert "lower than that of the base model" in page
        addresses = re.findall(r'href="([^"]+)"', page)
        assert set(addresses) == {"/runs/plus", "/runs/later/a%26b", "/runs/broken"}
        assert "later/a&amp;b" in page

        assert "data-refresh" not in http.get("/runs/plus").text
        live = http.get("/runs/later/a%26b").text
        assert 'data-refresh="10"' in live
        written = (runs / "later" / "a&b" / "history.jsonl").stat().st_mtime
        assert f'data-written="{round(written)}"' in live
        broken = http.get("/runs/broken")
        assert (broken.status_code, broken.headers["content-type"][:10]) == (500, "text/plain")


def test_a_run_that_was_silent_for_long_is_not_live_but_may_continue(runs: Path):
    history = runs / "later" / "a&b" / "history.jsonl"
    app = make_app(runs, None, lambda: history.stat().st_mtime + 7200)
    with testclient.TestClient(app, base_url="http://localhost") as http:
        assert 'data-refresh="60"' in http.get("/").text
        page = http.get("/runs/later/a%26b").text
        assert "not ended" in page
        assert 'data-refresh="60"' in page


def test_new_events_are_shown_at_the_next_request(runs: Path):
    history = runs / "later" / "a&b" / "history.jsonl"
    with client(runs) as http:
        assert "step 6 of 6" in http.get("/").text
        run = ml.Run.load(history.parent)
        history.write_bytes(encode_history(run.history[:3]))
        os.utime(history, (1, history.stat().st_mtime + 1))
        assert "step 1 of 6" in http.get("/").text


def test_saved_pages_are_listed_and_sent_as_they_are(runs: Path):
    sweep, plan = runs / "sweeps" / "sweep.html", runs / "a plan.html"
    sweep.parent.mkdir()
    sweep.write_bytes(sweep_page(Sweep(SweepConfig(), Point(1e-4, 1.0, 8, 16.0), []), live=True))
    planned = ml.plan_memory("gemma-3-1b", memory="16GB", batch_size=4)
    planned.save(plan)
    with client(runs) as http:
        page = http.get("/").text
        addresses = set(re.findall(r'href="(/pages/[^"]+)"', page))
        assert addresses == {"/pages/sweeps/sweep.html", "/pages/a%20plan.html"}
        assert "gemma-3-1b: does training fit?" in page
        assert f">{planned.verdict}</span>" in page
        assert "The run takes" in page
        assert '<span class="state running">running</span>' in page
        assert "No full trial has ended yet.</p>" in page, "nothing is best yet"

        for name, path in (("sweeps/sweep.html", sweep), ("a%20plan.html", plan)):
            answer = http.get(f"/pages/{name}")
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].startswith("text/html")
            assert answer.headers["content-security-policy"] == content_policy()


def test_pages_of_other_programs_are_not_served(runs: Path):
    foreign = "<html><head><script>alert(1)</script></head><body><h1>mine</h1></header>"
    (runs / "notes.html").write_text(foreign)
    (runs / "late.html").write_text(f'{foreign}<meta name="generator" content="mlx_loraplus">')
    (runs / "linked.html").symlink_to(runs / "plus" / "report.html")
    with client(runs) as http:
        assert "/pages/" not in http.get("/").text
        for name in ("notes.html", "late.html", "linked.html", "plus/report.html", "plus/run.yaml"):
            assert http.get(f"/pages/{name}").status_code == 404

        # What a hostile page says first is text.
        ours = '<html><head><meta name="generator" content="mlx_loraplus"></head><body>'
        (runs / "notes.html").write_text(f"{ours}<h1><script>alert(1)</script></h1></header>")
        assert "&lt;script&gt;alert(1)" in http.get("/").text


def test_the_folder_may_be_a_run(runs: Path):
    assert list(dict(find_runs(runs / "plus"))) == [""]
    app = make_app(runs / "plus", None, lambda: 0.0)
    with testclient.TestClient(app, base_url="http://localhost") as http:
        assert '<a href="/runs/">plus</a>' in http.get("/").text
        assert "plus: finished" in http.get("/runs/").text


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../run.yaml",
        "/runs/..%2f..%2fetc%2fpasswd",
        "/runs//etc/passwd",
        "/runs/plus/../../secret",
        "/runs/plus/adapters.safetensors",
        "/runs/plus%00",
        "/plus/run.yaml",
        "/secret/report.html",
        "/runs/linked",
        "/runs/.hidden",
    ],
)
def test_nothing_else_is_served(runs: Path, path: str):
    shutil.copytree(runs / "plus", runs.parent / "secret")
    shutil.copytree(runs / "plus", runs / ".hidden")
    (runs / "linked").symlink_to(runs.parent / "secret")
    with client(runs) as http:
        answer = http.get(path)
        assert answer.status_code == 404
        assert len(answer.text) < 100


def test_it_only_reads(runs: Path):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with client(runs) as http:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert http.request(method, "/").status_code == 405
            assert http.request(method, "/runs/plus").status_code == 405
        http.get("/")
        http.get("/runs/plus")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_without_a_token_only_this_machine_is_answered(runs: Path):
    with client(runs) as http:
        # A page of another site can reach this machine by a name that it points here.
        assert http.get("/", headers={"host": "evil.example:8765"}).status_code == 403
        for host in ("localhost:8765", "127.0.0.1", "[::1]:8765"):
            assert http.get("/", headers={"host": host}).status_code == 200


def test_a_token_is_needed_once_and_then_a_cookie(runs: Path):
    with client(runs, TOKEN) as http:
        for address in ("/", "/runs/plus", "/?token=wrong", "/?token=", "/?token=é"):
            refused = http.get(address)
            assert refused.status_code == 403
            assert "a&amp;b" not in refused.text
        first = http.get(f"/runs/plus?token={TOKEN}", follow_redirects=False)
        assert (first.status_code, first.headers["location"]) == (303, "/runs/plus")
        assert "httponly" in first.headers["set-cookie"].lower()
        assert http.get("/runs/plus").status_code == 200
        answer = http.get("/", headers={"host": "my-mac.local:8765"})
        assert answer.status_code == 200
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("localhost.evil.example", False),
    ],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, expected: bool):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command(runs: Path, host: str):
    """The command as a process: it prints the address, answers, and stops with Ctrl-C."""
    words = ["mlx_loraplus.serve", str(runs), "--host", host, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    port = re.search(r":(\d+)/", line)
    assert port, line
    token = re.search(r"\?token=[\w-]{20,}", line)
    assert bool(token) == (host == "0.0.0.0"), "the network needs a token"
    local = f"http://127.0.0.1:{port[1]}/"
    if token:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(local, timeout=20)
    else:
        with urllib.request.urlopen(local, timeout=20) as answer:
            assert b"a&amp;b" in answer.read()
            assert "uvicorn" not in str(answer.headers)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_the_command_says_what_is_wrong(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for words, told in (
        ([str(runs / "nowhere")], "is not a folder"),
        ([str(runs), "--port", "70000"], "port"),
        ([str(runs), "--host", "203.0.113.7"], "give another --host, such as 127.0.0.1"),
        ([str(runs), "--host", "999.1.1.1"], "give another --host, such as 127.0.0.1"),
        ([str(runs), "--host", "a..b"], "give another --host, such as 127.0.0.1"),
        ([str(runs), "--host", ""], "give another --host, such as 127.0.0.1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        main([str(runs)])
    assert "pip install 'mlx_loraplus[serve]'" in capsys.readouterr().err
