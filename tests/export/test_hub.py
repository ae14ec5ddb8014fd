"""What the hub gets: every format, a card, and never the token or a path of this machine."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mlx_loraplus import load_adapter
from mlx_loraplus.export.hub import model_card, write_repository
from mlx_loraplus.export.written_files import HUB, kept_files_note
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.models.loading import load_folder
from tests.export.test_export_command import TOKEN, words


class Hub(BaseHTTPRequestHandler):
    """The hub's HTTP interface, as far as an upload uses it."""

    files: dict[str, bytes]
    authorizations: set[str]
    refuse: bool

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.answer({})

    def do_GET(self) -> None:
        base = {
            "id": "x/y",
            "modelId": "x/y",
            "tags": [],
            "siblings": [],
            "downloads": 0,
            "likes": 0,
            "private": False,
        }
        card = {"language": "en"} if self.path.endswith("/smollm-unsaid") else {"license": "mit"}
        self.answer(base | {"cardData": card, "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.files[self.path.removeprefix("/blob/")] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        self.authorizations.add(self.headers.get("Authorization", ""))
        body, address = self.body(), f"http://{self.headers['Host']}"
        if self.refuse:
            self.answer({"error": f"no such token: {TOKEN}"}, 401)
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/repos/create"):
            assert "private" in json.loads(body).values()
            self.answer({"url": f"{address}/me/my-adapter", "id": "1"})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "regular" if file["path"].endswith((".md", ".json")) else "lfs",
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                each
                | {"actions": {"upload": {"href": f"{address}/blob/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.files.pop(value["oid"])
            self.answer({"commitUrl": f"{address}/me/my-adapter/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({}, 404)


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    kind = type("OneHub", (Hub,), {"files": {}, "authorizations": set(), "refuse": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def published(place: Path, address: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(place),
    }
    command = [
        sys.executable,
        "-m",
        "mlx_loraplus.export",
        *words(place, "--to", "hub", "--repo-id", "me/my-adapter", "--overwrite"),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_hub_gets_every_format_and_a_card_and_never_the_token(
    place: Path, hub: tuple[type[Hub], str]
):
    kind, address = hub
    done = published(place, address)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {address}/me/my-adapter" in done.stdout
    assert kind.authorizations == {f"Bearer {TOKEN}"}
    out = place / "out"
    written = {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    assert kind.files == written
    assert {
        "README.md",
        "mlx/adapters.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "adapter.gguf",
    } <= set(written)
    assert not any(TOKEN.encode() in content for content in written.values())
    assert TOKEN not in done.stdout + done.stderr
    config = json.loads(written["adapter_config.json"])
    card = written["README.md"].decode()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loraplus", "mlx"],
        "license": "other",
    }
    for said in (
        *(
            "license: other",
            "On `rows`, `org/set`:",
            "| model | gemma-3 |",
            "| train | 1,200 examples, 5 tokens, 60% supervised |",
            "| spent | 2,500 input tokens, 2.0 minutes in steps |",
            "| rates | A 2.00e-04, B 3.20e-03 (ratio 16), cosine",
            "| `rank` | 4 |",
        ),
        *(
            "| training loss | 2.5000 at first, 1.5000 at last |",
            "| validation loss | 3.0000 before",
        ),
        *("![Loss", "PeftModel.from_pretrained", "mlx_lm.generate"),
        "ollama create",
    ):
        assert said in card
    assert "/home/me" not in card
    assert str(place) not in card + json.dumps(config)


def test_a_hub_that_refuses_is_one_line_without_the_token(place: Path, hub: tuple[type[Hub], str]):
    kind, address = hub
    kind.refuse = True
    done = published(place, address)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: me/my-adapter can't be uploaded")
    assert not (place / "out").exists()
    assert TOKEN not in done.stdout + done.stderr


def test_a_hub_that_is_away_is_no_matter_of_the_name(place: Path):
    done = published(place, "http://127.0.0.1:9")
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: me/my-adapter can't be uploaded")
    assert "the hub can't be reached: connect" in said
    assert not (place / "out").exists()


def test_a_card_names_a_base_that_is_on_the_hub():
    card = model_card("org/base", "mit", "me/My-Adapter", None, ["mlx"])
    assert (card.data.base_model, card.data["base_model_relation"]) == ("org/base", "adapter")
    assert card.data.library_name == "mlx"
    assert "# My-Adapter\n" in card.text
    assert "PeftModel" not in card.text
    assert "## Training" not in card.text


def test_a_base_on_the_hub_says_its_licence(hub: tuple[type[Hub], str]):
    names = ["x/y", "gpt2", "x/smollm-unsaid"]
    code = f"from mlx_loraplus.export.hub import licence_of; print(*map(licence_of, {names}))"
    environment = os.environ | {"HF_ENDPOINT": hub[1], "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["mit", "other", "apache-2.0"]


def test_what_the_hub_gets_has_no_path_of_this_machine(place: Path):
    model, tokenizer, _ = load_folder(place / "model")
    load_adapter(model, place / "run")
    source = find_model(str(place / "model"))
    (place / "hub").mkdir()
    write_repository(model, tokenizer, source, "me/it", place / "run", place / "hub")
    for file in [file for file in (place / "hub").rglob("*") if file.is_file()]:
        content = file.read_bytes()
        assert place.name.encode() not in content, file.name
        assert b"/home/me" not in content, file.name
    assert not kept_files_note(place / "hub", HUB)
