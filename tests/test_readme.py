"""The README and the pages in docs/: their commands and Python run, their links lead somewhere.

``scripts/check`` compares their generated parts.

Commands run on a tiny model. In a ```bash block, a comment that begins with "needs" names what a
command takes that a test does not have, such as ``# needs the network``; it is not run.
"""

import io
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_loraplus import cli
from mlx_loraplus.models.gguf.convert import write_folder
from scripts.readme import repository, with_addresses
from scripts.tiny_model import write_sums
from tests.models.gguf_files import write_gguf
from tests.test_messages import messages_of_package
from tests.training.tiny_runs import write_labeled, write_pairs

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ALSO_IN_BLOCKS = ("pip install ", "scripts/", "mlx.launch ", "vllm ", "ollama ")
"""Commands that are not run here: the environment is there, and scripts have tests of their own."""


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200
    assert len(PAGES["README.md"].encode()) <= 14_000


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_is_short_and_begins_with_what_the_reader_will_have_done(page: str):
    lines = PAGES[page].splitlines()
    assert len(lines) <= 250
    assert lines[0].startswith("# ")
    assert lines[2].startswith("At the end of this page")
    assert PAGES["README.md"].count(f"({page})") or page in with_addresses(PAGES["README.md"], None)


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_at_most_120_characters(page: str):
    """Not those of tables, pictures, code and generated parts."""
    flags = re.MULTILINE | re.DOTALL
    text = re.sub(r"^<!-- (\S+):start -->.*?^<!-- \1:end -->", "", PAGES[page], flags=flags)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=flags)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    assert not [line for line in lines if len(line) > 120]


# --- commands ---


def commands_of(page: str) -> list[str]:
    """Return the lines of a page's ```bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def is_run(line: str) -> bool:
    """Return whether a command is run here."""
    return line.startswith("mlx_l") and not re.search(r"#\s*needs ", line)


QUICKER = {
    r"--model \S+": "--model tiny",
    r"--iters 60\b": "--iters 3 --seeds 1 --lr-ratios 1 4",  # a sweep
    r"--iters \d{2,}\b": "--iters 3 --warmup 0",
    r"--max-steps \d{2,}\b": "--max-steps 3 --warmup 0",
    r"--rank 32 --alpha 64": "--rank 4 --alpha 8",
}


def quicker(line: str) -> str:
    """Return a command on the tiny model, with three steps."""
    if line.startswith("mlx_loraplus.plan"):
        return line  # a plan loads no model
    for pattern, other in QUICKER.items():
        line = re.sub(pattern, other, line)
    if line.startswith("mlx_loraplus.train") and "--data" not in line and "-c " not in line:
        line = line.partition("#")[0] + " --data my_folder"  # the demo set has 1,200 rows
    if line.startswith("mlx_loraplus.train") and "--prompts" not in line:
        line = line.partition("#")[0] + " --sample-rows 0"
    return line


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a reader has: a model, data, two runs, and an adapter in PEFT's format."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny").mkdir()
        write_folder(write_gguf(folder / "tiny.gguf"), Path("tiny"), "float32")

        write_sums(Path("my_folder"))
        rows = Path("my_folder/valid.jsonl").read_text()
        Path("my_folder/test.jsonl").write_text(rows)
        shutil.copy("my_folder/train.jsonl", "my_file.jsonl")
        write_pairs(Path("my_pairs"))
        write_labeled(Path("my_ratings"))
        table = [json.loads(row) for row in rows.splitlines()]
        lines = [f"{row['prompt']},{row['completion']}" for row in table]
        Path("my_table.csv").write_text("\n".join(["query,reply", *lines]) + "\n")

        settings = "--model tiny --data my_folder --iters 3 --warmup 0 --sample-rows 0"
        cli.train(shlex.split(f"{settings} --adapter-path my_run"))
        cli.train(shlex.split(f"{settings} --adapter-path other_run --learning-rate 1e-4"))
        cli.export(shlex.split("--to peft --model tiny --adapter-path my_run --save-path my_peft"))
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a copy of the workshop."""
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, commands_of(page)))])
def test_the_commands_of_a_page_run_in_their_order(page: str, here: Path):
    made: set[str] = set()  # what the page's own commands have written
    for line in filter(is_run, commands_of(page)):
        command, *words = shlex.split(quicker(line), comments=True)
        if command == "mlx_lm.generate":
            subprocess.run(
                [sys.executable, "-m", "mlx_lm", "generate", *words, "--max-tokens", "4"],
                check=True,
            )
            continue

        name, words = (words[0], words[1:]) if command == "mlx_loraplus" else (command[13:], words)
        if name.startswith("--"):
            cli.main([name])
            continue
        written = written_by(name, words)
        for_it = dict(itertools.pairwise(words)).get("--adapter-path")
        wants_free = for_it if "--dry-run" in words else written
        if wants_free and wants_free not in made and Path(wants_free).is_dir():
            shutil.rmtree(wants_free)  # the workshop's
        run(name, words)
        if written:
            made.add(written)
            assert Path(written).exists(), line


SWITCHES = {"--resume", "--dry-run", "--test", "--list-models", "--print-config"}
"""With these, train and sweep make no new folder."""


def written_by(command: str, words: list[str]) -> str | None:
    """Return the folder or file that a command makes anew."""
    settings = dict(itertools.pairwise(words))
    if SWITCHES & set(words):
        return None
    if command in ("train", "sweep"):
        return settings["--adapter-path"]
    default = {"fuse": "fused_model", "export": "exported"}.get(command)
    return settings.get("--save-path", default)


def run(command: str, words: list[str]) -> None:
    """Run a command of the package in this process, or in processes of its own where it starts several."""
    if command == "serve":
        serve(*words)
        return
    if "--launch" in words:
        subprocess.run([sys.executable, "-m", "mlx_loraplus", command, *words], check=True)
        return
    if "--print-config" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.COMMANDS[command](words)
        return
    cli.COMMANDS[command](words)


def serve(folder: str) -> None:
    """Serve a folder with a run, look at the address that is printed, and stop with Ctrl-C."""
    shutil.copytree("my_run", Path(folder) / "my_run")
    command = [sys.executable, "-u", "-m", "mlx_loraplus", "serve", folder, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        try:
            with urllib.request.urlopen(address, timeout=20) as page:
                assert b"/runs/my_run" in page.read()
        finally:
            process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_known(page: str):
    for line in commands_of(page):
        assert is_run(line) or "# needs " in line or line.startswith(ALSO_IN_BLOCKS), line


def test_the_pages_hold_many_commands():
    assert sum(is_run(line) for page in PAGES for line in commands_of(page)) >= 50


# --- Python ---


PYTHON = [
    pytest.param(page, code, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), 1)
]


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_the_python_of_a_page_runs(
    page: str, code: str, here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    if page == "README.md":
        assert len([line for line in code.splitlines() if line]) <= 10
    if re.search(r"adapter_path=\"my_run\"\)$", code, flags=re.MULTILINE) and "finetune" in code:
        shutil.rmtree("my_run")
    code = re.sub(r'"gemma-3[\w-]*"', '"tiny"', code)
    code = re.sub(r"\biters=60\b", "iters=3, seeds=1, lr_ratios=[1, 4]", code)
    code = re.sub(r"\biters=\d{2,}\b", "iters=3, warmup=0", code)
    code = re.sub(r"iters=3, warmup=0(.*\*\*sweep)", r"iters=3\1", code)
    try:
        exec(compile(code, page, "exec"), {"__name__": "page"})
    finally:
        mx.enable_compile()


# --- messages ---

SYMPTOMS = (
    "the process disappears without a message",
    "`-c …/run.yaml` on another machine",
    "file.jsonl:12: …",
)
"""What the page lists beside messages."""


def quoted_messages() -> list[str]:
    """Return the messages that the troubleshooting page quotes; "…" stands for what is filled in."""
    tables = PAGES["docs/troubleshooting.md"].partition("## Results that disappoint")[0]
    cells = re.findall(r"^\| (.*?) \| .* \|$", tables, flags=re.MULTILINE)
    kept = [cell for cell in cells if not cell.startswith("message") and cell not in SYMPTOMS]
    return [message for cell in kept for message in cell.split("; ")]


def test_every_message_of_the_troubleshooting_page_is_one_of_the_package():
    texts = [text.replace("'…'", "…") for text in messages_of_package()]
    quoted = quoted_messages()
    assert len(quoted) > 100

    def is_known(message: str) -> bool:
        pieces = [piece.strip() for piece in message.replace("'…'", "…").split("…")]
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.IGNORECASE | re.DOTALL)
        return any(map(pattern.search, texts))

    # What stands in parentheses may be the system's words, which the package only fills in.
    shortened = [re.sub(r" \([^)]*\)", "", message) for message in quoted]
    both = zip(quoted, shortened, strict=True)
    assert [whole for whole, short in both if not (is_known(whole) or is_known(short))] == []


# --- links ---


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_lead_somewhere(page: str):
    text = with_addresses(PAGES[page], None)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target

    for name in set(re.findall(r"`((?:scripts|tests)/[a-z_/]+(?:\.py)?)[` ]", text)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"`(?:mlx_loraplus/)?((?:[a-z_]+/)*[a-z_]+\.py)[:`]", text)):
        assert (ROOT / "mlx_loraplus" / name).exists() or (ROOT / name).exists(), name


def test_addresses_are_absolute_where_the_project_has_one():
    """A package index shows the README without the files beside it."""
    text = PAGES["README.md"]
    assert with_addresses(text, repository()) == text
    absolute = with_addresses(text, "owner/name")
    pictures = "https://raw.githubusercontent.com/owner/name/main/"
    assert f"({pictures}.github/images/report.png)" in absolute
    assert "(https://github.com/owner/name/blob/main/docs/data.md)" in absolute
    assert "](docs/" not in absolute
    assert with_addresses(absolute, None) == with_addresses(text, None)
