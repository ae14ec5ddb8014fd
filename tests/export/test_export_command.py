"""mlx_loraplus.export as typed: files whole or none, one line where it can't be, and the hub."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from mlx_loraplus import fuse, load
from mlx_loraplus.adapters.storage import write_adapter
from mlx_loraplus.export import transformers_names
from mlx_loraplus.export.__main__ import main
from mlx_loraplus.export.written_files import GGUF, PEFT, kept_files_note
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.models.loading import load_folder
from tests.export.test_gguf_lora import adapted

TOKEN = "hf_secretsecretsecret"


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
    for more, told in (
        (["--to", "hub"], "--to hub needs --repo-id OWNER/NAME"),
        (["--to", "hub", "--repo-id", "me"], "--to hub needs --repo-id OWNER/NAME, not 'me'"),
        (["--to", "peft", "--repo-id", "me/it"], "--repo-id 'me/it' is for --to hub: leave it out"),
    ):
        assert told in fails(words(place, *more), capsys)


def test_what_is_there_is_kept(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in fails(words(place, "--to", "peft"), capsys)
    assert "is or contains" in fails(words(place, "--to", "peft", "--overwrite", out="run"), capsys)
    assert "is a file" in fails(words(place, "--to", "peft", out="tiny.gguf"), capsys)
    for more in (["--to", "gguf"], ["--from", "gguf", "--adapter-path", str(place / "tiny.gguf")]):
        assert "is or contains" in fails(words(place, *more, "--overwrite", out="."), capsys)
    assert "is or contains" in fails([*words(place, "--to", "peft"), "--save-path", "."], capsys)
    (place / "run" / "adapters.safetensors").write_bytes(b"broken")
    assert "broken" in fails(words(place, "--to", "peft", "--overwrite"), capsys)
    assert (place / "out" / "mine.txt").read_text() == "mine"


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
    assert not kept_files_note(out, ours), "every file that is written is known as ours"
    foreign = {"config.json", "notes.txt", "run.yaml", "sub/adapter.gguf", "weights.bin"}
    for name in foreign | set(ours):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    capsys.readouterr()
    main(words(place, *more, "--overwrite"))
    assert (
        f"kept the other files in {out}: config.json, notes.txt, run.yaml and 2 more"
        in capsys.readouterr().out
    )
    assert {(out / name).read_text() for name in foreign} == {"mine"}
    assert all((out / name).read_bytes() != b"mine" for name in ours if (out / name).exists())

    (out / ours[0]).unlink(missing_ok=True)
    (out / ours[0]).mkdir()
    assert f"{ours[0]} is a folder, but a file must be written there" in fails(
        words(place, *more, "--overwrite"), capsys
    )


@pytest.mark.parametrize(
    ("base", "name", "note"),
    [
        (
            "model",
            "{place}/model",
            "PEFT will look for the base in {place}/model: before you publish",
        ),
        (
            "tiny.gguf",
            "tiny.gguf",
            "PEFT can't load tiny.gguf as the base: set base_model_name_or_path",
        ),
    ],
)
def test_a_base_without_a_hub_id_is_named_for_peft(
    place: Path, base: str, name: str, note: str, capsys: pytest.CaptureFixture[str]
):
    if base == "tiny.gguf":
        write_adapter(adapted(load(str(place / base))[0]), place / "run")
    main([*words(place, "--to", "peft"), "--model", str(place / base)])
    assert note.format(place=place) in capsys.readouterr().out
    config = json.loads((place / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name.format(place=place)


def test_the_base_of_a_lora_in_gguf_is_made_as_the_export_says(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    # A folder whose tokenizer GGUF can express
    source = find_model(str(place / "tiny.gguf")).path
    shutil.copytree(source, place / "base")
    write_adapter(adapted(load(str(place / "base"))[0]), place / "run")
    main([*words(place, "--to", "gguf"), "--model", str(place / "base")])

    said = capsys.readouterr().out
    (command,) = re.findall(r"mlx_loraplus\.export (.*) && mv (\S+) (\S+)", said)
    main(shlex.split(command[0]))
    assert Path(command[1]).is_file()
    assert Path(command[2]) == place / "out/base.gguf"


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
        if (more, base, file.name) == (["--to", "peft"], "model", "adapter_config.json"):
            config = json.loads(content)  # PEFT finds the base by its path, which a note tells
            assert config.pop("base_model_name_or_path") == str(place / base)
            content = json.dumps(config).encode()
        assert str(place).encode() not in content, file.name
        assert place.name.encode() not in content, file.name
        assert b"/home/me" not in content, file.name
