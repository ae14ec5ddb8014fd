"""Names, folders and hub ids become a local folder, or one clear line."""

import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.find_model import ModelSource, find_model, list_models, original_of
from mlx_loraplus.models.known_models import KNOWN, MODELS, gemma_for
from mlx_loraplus.models.skeleton import config_of, make_skeleton

SHA = "0123456789abcdef0123456789abcdef01234567"


def ask(code: str, home: Path, **environment: str) -> list[str]:
    """Run code in a new process with its own hub cache (the hub's client reads its environment once).

    Only one that hangs takes as long as the time-out.
    """
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        env.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


FIND = """
from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.find_model import find_model
for name in {names!r}:
    try:
        print(find_model(name).path)
    except ModelError as problem:
        print(problem)
"""


@contextmanager
def silent_hub() -> Iterator[tuple[str, Callable[[], int]]]:
    """Take connections and never answer; yield the address, and what tells how many came since it was last called."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)

        def came() -> int:
            for count in itertools.count():
                try:
                    server.accept()[0].close()
                except BlockingIOError:
                    return count
            raise AssertionError

        yield f"http://127.0.0.1:{server.getsockname()[1]}", came


def test_the_names_of_the_issue_are_there():
    printed = list_models().splitlines()
    assert max(map(len, printed)) < 80, "no line wraps in a terminal"
    lines = dict(line.split(maxsplit=1) for line in printed if not line.startswith(" "))
    for name in (
        "gemma-3",
        "gemma-3-270m",
        "gemma-3-1b-it",
        "gemma-3-27b",
        "llama-3.1-8b",
        "llama-4-scout",
    ):
        assert lines[name].startswith(MODELS[name])
    assert all(repo.startswith("mlx-community/") for repo in MODELS.values())


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_list_says_whether_an_embedded_model_is_installed(
    monkeypatch: pytest.MonkeyPatch, *, is_installed: bool
):
    found = (KNOWN["smollm2-135m"].package, "1") if is_installed else None
    monkeypatch.setattr("mlx_loraplus.models.find_model._installed", lambda _: found)
    printed = list_models()
    assert max(map(len, printed.splitlines())) < 80
    assert ("or embedded (installed): used without a GPU or hub" in printed) == is_installed
    assert ("or embedded: pip install" in printed) != is_installed


@pytest.mark.parametrize("name", [
    "gemma-3-270m", "llama-3.2-1b", "llama-4-scout", "smollm2-135m", "qwen3.5-35b-a3b",
    "gpt-oss-20b", "olmo-3-7b", "ministral-3-3b", "granite-4.0-h-tiny", "granite-4.0-h-micro",
    "granite-4.0-h-small", "qwen3.5-2b", "mistral-small-24b",
])  # fmt: skip
def test_known_dimensions_are_a_config_that_mlx_lm_takes(name: str):
    config = config_of(name)
    assert ("quantization" in config) == KNOWN[name].repo.endswith(("4bit", "MXFP4-Q8"))
    layers = config.get("text_config", config)["num_hidden_layers"]
    assert len(make_skeleton(config).layers) == layers


def test_gemma_3_is_the_largest_that_fits():
    sizes = {0: "270m", 3: "1b", 6: "1b", 7: "4b", 15: "12b", 29: "12b", 30: "27b", 500: "27b"}
    for gigabytes, size in sizes.items():
        assert gemma_for(gigabytes << 30) == f"gemma-3-{size}-it"


def test_gemma_4_is_the_largest_that_fits():
    sizes = {0: "e2b", 10: "e2b", 11: "e4b", 29: "26b-a4b", 33: "26b-a4b", 34: "31b", 500: "31b"}
    for gigabytes, size in sizes.items():
        assert gemma_for(gigabytes << 30, "gemma-4") == f"gemma-4-{size}-it"


STATED = {
    "gemma-4-e2b-it": 4.63, "gemma-4-e4b-it": 7.46, "gemma-4-26b-a4b-it": 25.2, "gemma-4-31b-it": 30.7,
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.8,
    "qwen3-32b": 32.8, "qwen3-30b-a3b": 30.5, "qwen3.5-0.8b": 0.752, "qwen3.5-4b": 4.21,
    "qwen3.5-9b": 8.95, "qwen3.5-27b": 26.9, "qwen3.5-35b-a3b": 34.7, "gpt-oss-20b": 20.9,
    "olmo-3-7b": 7.3, "ministral-3-3b": 3.4, "ministral-3-14b": 13.5,
    "granite-4.0-h-tiny": 6.94, "mistral-7b": 7.25, "phi-4-mini": 3.84, "smollm3-3b": 3.08,
}  # fmt: skip
"""Billions of parameters; for Gemma 4 E2B and E4B without the towers for pictures and sound."""


@pytest.mark.parametrize("name", STATED)
def test_known_dimensions_have_the_stated_number_of_parameters(name: str):
    arrays: Any = tree_flatten(make_skeleton(KNOWN[name].config).parameters())
    assert sum(array.size for _, array in arrays) / 1e9 == pytest.approx(STATED[name], rel=0.01)


def test_importing_names_imports_nothing_heavy():
    code = "import sys, mlx_loraplus.models.find_model; print([m for m in {heavy} if m in sys.modules])"
    heavy = ["mlx", "mlx_lm", "numpy", "gguf", "transformers", "tokenizers", "huggingface_hub"]
    assert ask(code.format(heavy=heavy), Path()) == ["[]"]


def test_an_unknown_name_lists_the_nearest_and_what_is_allowed():
    with pytest.raises(
        ModelError,
        match=r"no model 'gema-3-1b' \(did you mean 'gemma-3-1b' .*\.gguf file.*--list-models",
    ):
        find_model("gema-3-1b")
    with pytest.raises(ModelError, match=r"no model 'qqqq'; allowed are"):
        find_model("qqqq")


def test_a_folder_must_hold_a_whole_model(tmp_path: Path):
    with pytest.raises(ModelError, match=r"is not a model: it has no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it has no model\*\.safetensors"):
        find_model(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    with pytest.raises(ModelError, match=r"it has no model-00002-of-00002\.safetensors"):
        find_model(str(tmp_path))
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json is broken"):
        find_model(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    assert find_model(str(tmp_path)).path == tmp_path


def test_a_gguf_file_must_be_there(tmp_path: Path):
    with pytest.raises(ModelError, match=r"there is no file .*none\.gguf"):
        find_model(str(tmp_path / "none.gguf"))


def test_a_hub_that_refuses_or_never_answers_is_asked_once(tmp_path: Path):
    with silent_hub() as (silent, came):
        for endpoint in (silent, "http://127.0.0.1:9", "not an address"):
            code = FIND.format(names=["gemma-3-1b", "no-such-org/no-such-model"])
            first, second = ask(code, tmp_path, HF_ENDPOINT=endpoint)
            assert first.startswith(
                "mlx-community/gemma-3-1b-pt-4bit is not in the local cache and the hub can't be"
            )
            assert second.startswith("no-such-org/no-such-model is not in the local cache")
            assert second.endswith("or use gemma-3, which is installed")
            assert came() == (endpoint == silent)


def test_offline_mode_asks_nobody(tmp_path: Path):
    with silent_hub() as (silent, came):
        (first,) = ask(
            FIND.format(names=["llama-3.2-1b"]), tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=silent
        )
        assert "can't be reached" in first
        assert came() == 0


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download uses, with one repository that also holds code."""

    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "modeling.py": b"evil",
    }
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        Hub.asked.append(path)
        name = path.rsplit("/", 1)[-1]
        if path == "/":
            self.answer(b"")
        elif "/org/model" not in path:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.answer(Hub.files[name], headers={"ETag": f'"{name}"', "X-Repo-Commit": SHA})
        elif "/tree/" in path:
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": n} for n, b in Hub.files.items()
            ]
            self.answer(json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": file} for file in Hub.files]
            self.answer(json.dumps({"id": "org/model", "sha": SHA, "siblings": siblings}).encode())

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object):
        pass


def test_a_download_takes_no_code_and_is_found_again_without_a_network(tmp_path: Path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found, missing = ask(
            FIND.format(names=["org/model", "org/other"]), tmp_path, HF_ENDPOINT=endpoint
        )
        server.shutdown()
    folder = Path(found)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not any("modeling.py" in path for path in Hub.asked)
    assert missing.startswith("org/other can't be downloaded: ")

    with silent_hub() as (silent, came):
        assert ask(FIND.format(names=["org/model"]), tmp_path, HF_ENDPOINT=silent) == [found]
        assert came() == 0
    (folder / "model.safetensors").unlink()
    (cut,) = ask(FIND.format(names=["org/model"]), tmp_path, HF_HUB_OFFLINE="1")
    assert cut.startswith("org/model is not in the local cache")


def test_a_config_that_was_asked_for_alone_is_found_again_without_a_network(tmp_path: Path):
    code = "from mlx_loraplus.models.find_model import find_config; print(find_config('org/model'))"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = ask(code, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert [file.name for file in Path(found[0]).parent.iterdir()] == ["config.json"]
    assert ask(code, tmp_path, HF_HUB_OFFLINE="1") == found


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-4-scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("mlx-community/Qwen3-4B-4bit-DWQ", "Qwen/Qwen3-4B"),
        ("mlx-community/Qwen3-4B-mxfp4", "Qwen/Qwen3-4B"),
        ("mine/model-4bit", "what mine/model-4bit was quantized from"),
        ("folder/model", "what folder/model was quantized from"),
    ],
)
def test_the_original_of_a_quantized_model(name: str, original: str):
    assert original_of(name) == original


def test_the_base_is_a_place_that_can_be_loaded():
    bases = [
        ModelSource(name, Path()).base
        for name in ("gemma-3-4b-it", "mlx-community/Mine-4B-4bit", "my/folder")
    ]
    assert bases == ["google/gemma-3-4b-it", "mlx-community/Mine-4B-4bit", "my/folder"]
