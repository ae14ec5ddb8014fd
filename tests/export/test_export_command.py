"""mlx_loraplus.export as typed: files whole or none, one line where it can't be, and the hub."""

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

from mlx_loraplus import fuse, load, load_adapter, save_adapter
from mlx_loraplus.adapters.storage import write_adapter
from mlx_loraplus.export import transformers_names
from mlx_loraplus.export.__main__ import main
from mlx_loraplus.export.hub import model_card, write_repository
from mlx_loraplus.export.written_files import GGUF, HUB, PEFT, what_stays
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.models.registry import find_model
from tests.export.test_gguf_lora import adapted, converted
from tests.models.gguf_files import write_gguf

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, and an adapter with a run's files."""
    model, _ = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    save_adapter(adapted(model), tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_text(
        "model: gemma-3\ndata: [/home/me/secret/rows, org/set]\nlearning_rate: 0.0002\nlr_ratio:"
        " 16.0\nrank: 4\n"
    )
    events = [
        {
            "step": 0,
            "schema": 1,
            "steps": 20,
            "model": "/home/me/gemma-3",
            "adapter": "4 of 9",
            "modules": [],
        }
        | {"memory": {"weights_gb": 0.5, "planned_gb": None, "available_gb": None}}
        | {split: {"examples": 1200, "tokens": 5, "supervised": 3} for split in ("train", "valid")},
        {"step": 0, "valid_loss": 3.0, "valid_seconds": 1},
        {"step": 10, "loss": 2.5, "useful_tokens": 1200, "seconds": 50.0, "peak_memory_gb": 1.5},
        {"step": 20, "loss": 1.5, "useful_tokens": 1300, "seconds": 70.0, "peak_memory_gb": 1.5},
    ]
    (tmp_path / "run" / "history.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events)
    )
    (tmp_path / "run" / "loss.png").write_bytes(b"\x89PNG")
    return tmp_path


def words(place: Path, *more: str, out: str = "out") -> list[str]:
    folders = ["--model", str(place / "model"), "--save-path", str(place / out)]
    return [
        *folders,
        *([] if "--adapter-path" in more else ["--adapter-path", str(place / "run")]),
        *more,
    ]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert (stop.value.code, len(said)) == (2, 1)
    return said[0]


@pytest.mark.parametrize(
    ("to", "files"),
    [("peft", {"adapter_model.safetensors"}), ("gguf", {"adapter.gguf", "Modelfile"})],
)
def test_out_and_back(place: Path, to: str, files: set[str], capsys: pytest.CaptureFixture[str]):
    main(words(place, "--to", to))
    out = place / "out"
    assert files <= {path.name for path in out.iterdir()}
    source = out if to == "peft" else out / "adapter.gguf"
    main(words(place, "--from", to, "--adapter-path", str(source), out="back"))
    assert "try it: mlx_loraplus.generate" in capsys.readouterr().out
    ours, back = (load_folder(place / "model")[0] for _ in range(2))
    from mlx_loraplus import load_adapter
    from tests.conftest import same

    load_adapter(ours, place / "run")
    load_adapter(back, place / "back")
    assert same(ours.trainable_parameters(), back.trainable_parameters())


def test_a_whole_model_is_written(place: Path):
    main(words(place, "--to", "gguf", "--merged", "q8_0"))
    assert {path.name for path in (place / "out").iterdir()} == {"model.gguf", "Modelfile"}


@pytest.mark.parametrize(
    ("form", "template"),
    [
        ("alpaca", "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"),
        ("question", "Question: {{ .Prompt }}\nAnswer:"),
        ("completion", "{{ .Prompt }}"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--merged", "f16"]])
def test_a_modelfile_has_the_prompt_form_of_the_adapter(
    place: Path, form: str, template: str, more: list[str]
):
    config = json.loads((place / "run" / "adapter_config.json").read_text())
    config["prompt_format"] = {"form": form, "thinking": False}
    (place / "run" / "adapter_config.json").write_text(json.dumps(config))
    main(words(place, "--to", "gguf", *more))
    assert f'TEMPLATE """{template}"""\n' in (place / "out" / "Modelfile").read_text()


def test_names_that_were_not_checked_are_reported(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    main(words(place, "--to", "peft"))
    assert "not checked" not in capsys.readouterr().out
    monkeypatch.setattr(transformers_names, "_names", dict)
    main(words(place, "--to", "peft", "--overwrite"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    assert len(lines) == 1
    assert (
        "the module names were not checked: transformers' names for llama are unknown" in lines[0]
    )


def test_settings_that_do_not_go_together_are_reported(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    assert "give one of --to (peft, gguf, hub) and --from" in fails(words(place), capsys)
    assert "give one of --to" in fails(words(place, "--to", "peft", "--from", "peft"), capsys)
    assert "merged is for --to gguf" in fails(
        words(place, "--to", "peft", "--merged", "f16"), capsys
    )
    for more in (
        ["--to", "hub"],
        ["--to", "hub", "--repo-id", "me"],
        ["--to", "peft", "--repo-id", "me/it"],
    ):
        assert "repo_id must be owner/name with --to hub" in fails(words(place, *more), capsys)


def test_what_is_there_is_kept(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in fails(words(place, "--to", "peft"), capsys)
    assert "is what is read" in fails(
        words(place, "--to", "peft", "--overwrite", out="run"), capsys
    )
    assert "is a file" in fails(words(place, "--to", "peft", out="tiny.gguf"), capsys)
    for more in (["--to", "gguf"], ["--from", "gguf", "--adapter-path", str(place / "tiny.gguf")]):
        assert "or holds it" in fails(words(place, *more, "--overwrite", out="."), capsys)
    assert "or the current folder" in fails(
        [*words(place, "--to", "peft"), "--save-path", "."], capsys
    )
    (place / "run" / "adapters.safetensors").write_bytes(b"broken")
    assert "broken" in fails(words(place, "--to", "peft", "--overwrite"), capsys)
    assert (place / "out" / "mine.txt").read_text() == "mine"


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
            "| spent | 2,500 tokens, 2.0 minutes in steps |",
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


@pytest.mark.parametrize(
    ("more", "ours"),
    [
        (["--to", "peft"], PEFT),
        (["--to", "gguf"], GGUF),
        (["--to", "gguf", "--merged", "f16"], GGUF),
    ],
)
def test_other_files_stay_beside_what_is_replaced(
    place: Path, more: list[str], ours: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    main(words(place, *more))
    out = place / "out"
    assert not what_stays(out, ours), "every file that is written is known as ours"
    foreign = {"config.json", "model.safetensors", "notes.txt", "run.yaml", "sub/adapter.gguf"}
    for name in foreign | set(ours):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    capsys.readouterr()
    main(words(place, *more, "--overwrite"))
    assert (
        f"kept the other files in {out}: config.json, model.safetensors, notes.txt and 2 more"
        in capsys.readouterr().out
    )
    assert {(out / name).read_text() for name in foreign} == {"mine"}
    assert all((out / name).read_bytes() != b"mine" for name in ours if (out / name).exists())

    (out / ours[0]).unlink(missing_ok=True)
    (out / ours[0]).mkdir()
    assert f"{ours[0]} is a folder, but a file must be written there" in fails(
        words(place, *more, "--overwrite"), capsys
    )


@pytest.mark.parametrize("base", ["model", "tiny.gguf"])
@pytest.mark.parametrize(
    "more",
    [
        ["--to", "peft"],
        ["--to", "gguf"],
        ["--to", "gguf", "--merged", "f16"],
        ["--from", "peft"],
        ["fuse"],
    ],
)
def test_nothing_that_is_written_has_a_path_of_this_machine(
    place: Path, base: str, more: list[str]
):
    if base == "tiny.gguf":
        write_adapter(adapted(load(str(place / base))[0]), place / "run")
    arguments = [*words(place, *more), "--model", str(place / base)]
    if more == ["fuse"]:
        fuse.main([word for word in arguments if word != "fuse"])
    else:
        if more == ["--from", "peft"]:
            main([*words(place, "--to", "peft", out="theirs"), "--model", str(place / base)])
            arguments += ["--adapter-path", str(place / "theirs")]
        main(arguments)

    files = [file for file in (place / "out").rglob("*") if file.is_file()]
    assert len(files) >= 2
    for file in files:
        content = file.read_bytes()
        if more == ["--from", "peft"] and file.name == "adapter_config.json":
            config = json.loads(
                content
            )  # an imported adapter is for this machine: it names its base
            assert config.pop("model") == str(place / base)
            content = json.dumps(config).encode()
        assert str(place).encode() not in content, file.name
        assert place.name.encode() not in content, file.name
        assert b"/home/me" not in content, file.name


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
    assert not what_stays(place / "hub", HUB)
