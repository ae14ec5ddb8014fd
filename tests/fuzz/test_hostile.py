"""Files from strangers are loaded or refused: no crash, no hang, no escape, no secret told."""

import ast
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest

from mlx_loraplus.adapters.storage import load_adapter, save_adapter
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.rows import Row
from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.gguf.convert import write_folder
from tests.conftest import HangError, cpu_limit
from tests.data.reading import encode_rows
from tests.fuzz.fuzzing import PACKAGE, TARGETS, adapted, feed, fuzz, kept, tiny_llama
from tests.models.gguf_files import PIECES, SCORES, write_gguf
from tests.training.tiny_runs import Place


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_load_or_are_refused_in_a_line(name: str, tmp_path: Path):
    found = fuzz(name, len(kept(name)) + 100, seed=1, folder=tmp_path)
    assert len(found) > 1, "no two inputs led to different lines"


def test_the_fuzzer_notices_what_it_looks_for(tmp_path: Path):
    from tests.fuzz.fuzzing import EscapeError, Target

    def raise_it(error: Exception) -> None:
        raise error

    def go_round() -> None:
        while True:
            pass

    for loader, noticed in (
        (lambda *_: raise_it(ValueError("no error of ours")), ValueError),
        (lambda *_: raise_it(ml.ModelError("two\nlines")), EscapeError),
        (lambda *_: go_round(), HangError),
    ):
        with pytest.raises(noticed):
            feed(Target(lambda _: [], loader, 1.0), b"", tmp_path)


def test_small_files_that_are_huge_are_refused_at_once(tmp_path: Path):
    save_adapter(adapted(), tmp_path)
    for name, told in (
        ("adapter_config.json", "allowed are"),
        ("adapters.safetensors", "broken or cut off"),
    ):
        whole = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("wb") as file:
            file.write((2**36).to_bytes(8, "little"))
            file.truncate(1 << 40)
        with pytest.raises(ml.AdapterError, match=told), cpu_limit():
            load_adapter(tiny_llama(), tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    "content",
    [
        "rank: " + "[" * 60_000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nrank: *c\n",
        "rank: &a [*a]\n",
        "x" * 60_000 + ": 1",
        "? " * 30_000,
        "rank: " + "9" * 60_000,
        "data: !!python/object/apply:os.system [touch x]\n",
        "rank: " + "a" * (1 << 17),
    ],
)
def test_hostile_settings_are_one_short_line(tmp_path: Path, content: str):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ml.ConfigError) as error, cpu_limit():
        parse(TrainConfig, Switches, ["-c", str(tmp_path / "run.yaml")], "mlx_loraplus.train")
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)
    assert not Path("x").exists()


def test_a_vocabulary_with_an_endless_token_is_refused_at_once(tmp_path: Path):
    pieces = [*PIECES, "ab" * 2_000_000]
    metadata = {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": [*SCORES, 0.0]}
    metadata["tokenizer.ggml.token_type"] = [1] * len(pieces)
    from tests.models.gguf_files import HIDDEN, np

    embedding = {"token_embd.weight": np.zeros((len(pieces), HIDDEN), np.float32)}
    path = write_gguf(tmp_path / "long.gguf", metadata=metadata, tensors=embedding)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ml.ModelError, match="a token has more than 1,024 characters"), cpu_limit():
        write_folder(path, tmp_path, "float32")


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "names files outside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names files outside it"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "names files outside it"),
        ('{"weight_map": {"a": "\\u0000"}}', "it has no"),
        ('{"weight_map": {"a": 1, "b": []}}', "is broken"),
        ('{"weight_map": ' * 50_000, "is broken"),
    ],
)
def test_an_index_names_only_files_of_its_folder(place: Place, index: str, told: str):
    (place.folder / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ml.ModelError, match=told):
        ml.load(str(place.folder / "model"))


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ (1).__class__.__base__.__subclasses__()[0] }}{{ namespace.__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_does_not_get_out_of_its_sandbox(place: Place, template: str):
    (place.folder / "model" / "chat_template.jinja").write_text(
        template + "{{ messages[0]['content'] }}"
    )
    _, tokenizer = ml.load(str(place.folder / "model"))
    record = Row("completion", {"prompt": "a", "completion": "b"}, 1)
    with pytest.raises(ModelError, match="fails for every chat at line 1"):
        encode_rows([record], tokenizer)
    assert not Path("escaped").exists()


def test_no_pickle_no_foreign_code_and_no_wide_open_yaml():
    forbidden = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for path in Path(PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, path.name
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in (
                    "eval",
                    "exec",
                    "yaml.load",
                    "yaml.unsafe_load",
                    "torch.load",
                ), f"{path.name}: {name}"
                for keyword in node.keywords:
                    given = ast.unparse(keyword.value)
                    assert (keyword.arg, given) not in (
                        ("trust_remote_code", "True"),
                        ("allow_pickle", "True"),
                    ), path.name


def test_a_token_is_never_told_or_written(place: Place):
    secret = "hf_" + "x7Q" * 12
    seen: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        """Is there, and refuses every request with the token it was sent."""

        def do_GET(self):
            token = self.headers.get("Authorization", "")
            seen.append(token)
            self.send_response(200 if self.path == "/" else 403, token)
            self.send_header("X-Error-Message", f"not with {token}")
            self.end_headers()
            self.wfile.write(token.encode())

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    train = [
        sys.executable,
        "-m",
        "mlx_loraplus.train",
        "--data",
        "data",
        "--adapter-path",
        "run",
        "--iters",
        "2",
    ]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        environment = os.environ | {
            "HF_TOKEN": secret,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(place.folder / "hub"),
        }
        asked, trained = (
            subprocess.run(
                [*train, "--model", model],
                cwd=place.folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            for model in ("some/model", "model")
        )
        server.shutdown()
    assert any(secret in token for token in seen), "the hub was asked with it"
    assert asked.returncode == 2
    assert "some/model can't be downloaded" in asked.stderr
    assert trained.returncode == 0, trained.stderr
    for said in (asked.stdout, asked.stderr, trained.stdout, trained.stderr):
        assert secret not in said
    written = [path for path in place.folder.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert (
        json.loads((place.folder / "run" / "history.jsonl").read_text().splitlines()[-1])["step"]
        == 2
    )
