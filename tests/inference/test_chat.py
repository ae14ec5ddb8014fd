"""A conversation, piped and in a terminal."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

import mlx_loraplus as ml
from mlx_loraplus.chat import main
from mlx_loraplus.command_config import ChatConfig
from mlx_loraplus.inference.chat import Conversation
from tests.training.tiny_runs import Place

QUESTION = "12 + 34 ="


def talk(
    lines: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    main([*words, "--max-tokens", "6"])
    return capsys.readouterr().out


def test_a_piped_talk(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--model", str(place.folder / "model"), "--adapter-path", str(folder)]
    lines = [
        QUESTION,
        "/base",
        QUESTION,
        "/adapter",
        QUESTION,
        "/temp -1",
        "/temp 0.5",
        "/both",
        "",
        "/bse",
        "/new",
    ]
    said = talk([*lines, "/quit", "no"], words, monkeypatch, capsys)
    answers = [line for line in said.splitlines() if line.startswith(("base: ", "adapter: "))]
    assert [line.split(":")[0] for line in answers] == ["base", "adapter", "base", "adapter"]
    for name, adapter in (("base", None), ("adapter", folder)):
        model, tokenizer = ml.load(str(place.folder / "model"), adapter)
        wanted = ml.complete(model, tokenizer, QUESTION, max_tokens=6)
        assert f"{name}: {wanted}".rstrip() in [line.rstrip() for line in answers]
    assert "/temp needs a number of at least 0, as in /temp 0.7, not '-1'" in said
    assert "unknown command '/bse' (did you mean '/base'" in said


def test_bytes_that_are_no_text_and_a_closed_pipe(place: Place):
    words = [
        sys.executable,
        "-m",
        "mlx_loraplus.chat",
        "--model",
        str(place.folder / "model"),
        "--max-tokens",
        "6",
    ]
    for encoding in ("utf-8", "ascii:surrogateescape"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(
            words, input=b"1 \xff\xed\xa0 =\n", capture_output=True, env=environment, check=True
        )
        assert done.stdout.startswith(b"base: ")
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.close()  # nobody reads
        _, said = process.communicate(b"1 + 1 =\n/help\n")
    assert (said, process.returncode) == (b"", 0)


def test_ctrl_c_at_the_prompt_drops_a_line_and_leaves_the_second_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    file = io.StringIO()
    talk = Conversation(ChatConfig(model=str(place.folder / "model")), Console(file=file))
    stop = KeyboardInterrupt

    def lines(prompt: str, *keys: str | type[BaseException]) -> list[str]:
        left = list(keys)

        def typing(_: str) -> str:
            if isinstance(key := left.pop(0), str):
                return key
            raise key

        monkeypatch.setattr("builtins.input", typing)
        return list(talk.lines(prompt))

    assert lines("> ", "a", stop, "b", "", stop, "c", EOFError) == ["a", "b", "c"]
    assert file.getvalue().count("press Ctrl-C again to leave") == 2
    assert lines("> ", "a", stop, stop, "b") == ["a"]
    assert lines("", "a", stop, "b") == ["a"], "where nobody types, once is enough"


def test_the_base_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said = talk(
        [QUESTION, "/adapter", "/both", "/help"],
        ["--model", str(place.folder / "model")],
        monkeypatch,
        capsys,
    )
    assert said.startswith("base: ")
    assert said.count("no adapter is loaded") == 2
    assert "/temp" in said


def test_both_share_the_base_and_remember_their_own_words(place: Place, folder: Path):
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    config = ChatConfig(model=str(place.folder / "model"), adapter_path=str(folder), max_tokens=4)
    before = mx.get_active_memory()
    conversation = Conversation(config, console)
    base, tuned = conversation.models.values()
    size = sum(array.nbytes for _, array in tree_flatten(base.parameters()))
    extra = sum(array.nbytes for _, array in tree_flatten(tuned.trainable_parameters()))
    assert mx.get_active_memory() - before < size + extra + 100_000
    conversation.answer(QUESTION)
    assert "base" in file.getvalue()
    assert "│" in file.getvalue(), "in columns"
    history = conversation.history
    assert history["base"][0] == history["adapter"][0] == {"role": "user", "content": QUESTION}
    assert history["base"][1] != history["adapter"][1]


def test_answers_that_are_longer_than_the_terminal_are_drawn_in_place(place: Place, folder: Path):
    file = io.StringIO()
    console = Console(file=file, width=60, height=7, force_terminal=True, color_system=None)
    config = ChatConfig(
        model=str(place.folder / "model"), adapter_path=str(folder), max_tokens=200, temperature=2.0
    )
    conversation = Conversation(config, console)
    conversation.answer(QUESTION)

    # Each time the table is drawn again, the cursor goes up as many lines as it has.
    moves = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", file.getvalue())
    assert max(move.count("\x1b[1A") for move in moves) < console.height
    lines = file.getvalue().rpartition("\x1b[1A")[2].splitlines()
    assert len(lines) > console.height, "at the end, the answers are printed whole"


def test_a_chat_template_sees_what_was_said():
    _, tokenizer = ml.load("smollm2-135m")
    from mlx_loraplus.data.encode_prompt import encode_prompt

    earlier = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
    ]
    text = tokenizer.decode(encode_prompt("What is my name?", tokenizer, earlier=earlier))
    assert text.index("My name is Ada.") < text.index("Hello Ada!") < text.index("What is my name?")
