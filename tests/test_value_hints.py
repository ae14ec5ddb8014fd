"""A value in the wrong form is answered with the one that was meant, or with an example."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.command_config import ExportConfig, FuseConfig, GenerateConfig, SweepConfig
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.errors import ConfigError
from mlx_loraplus.settings import configure, setting_names
from mlx_loraplus.value_hints import example_of

BAD = ("", -7, "x", {"a": 1})
"""Values that most settings refuse."""


def read(*words: str) -> TrainConfig:
    return parse(TrainConfig, Switches, words, "mlx_loraplus.train")[0]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(*words)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--max-minutes 1h", "(write 60)"),
        ("--max-minutes 90s", "(write 1.5)"),
        ("--distributed-timeout 10min", "(write 600)"),
        ("--valid-split 20", "(20% is 0.2)"),
        ("--dropout 5%", "(write 0.05)"),
        ("--max-seq-length 4k", "(write 4096)"),
        ("--iters 1k", "(write 1000)"),
        ("--learning-rate 1e-4,", "(write 0.0001)"),
        ("--lr 1e-4,", "(write 0.0001)"),
        ("--rank 8.0", "(write 8)"),
        ("--iters 1e3", "(write 1000)"),
        ("--lr-ratio 16x", "(write 16)"),
        ("--rank eight", "(such as 8)"),
        ("--max-minutes long", "(such as 60)"),
        ("--data-weights 1,2", "(write 1 2)"),
        ("--kto-weights 1", "as in --kto-weights 1 0.5"),
    ],
)
def test_the_value_that_was_meant_is_accepted(words: str, meant: str):
    told = refusal(*words.split())
    assert meant in told
    flag = "--learning-rate" if words.startswith("--lr ") else words.split()[0]
    value = re.sub(r"[()]|write |such as |20% is |as in --kto-weights ", "", meant).split()
    objective = ["--objective", "kto"] if "kto" in flag else []
    data = ["--data", "a", "b"] if "data" in flag else []
    read(flag, *value, *objective, *data)


@pytest.mark.parametrize("value", ["1%", "1h", "100%"])
def test_no_hint_is_given_where_none_is_known(value: str):
    assert "such as 8" in refusal("--rank", value)


def test_a_fraction_as_warm_up_leads_to_a_run_with_one():
    told = refusal("--warmup", "0.1", "--iters", "50")
    assert "--warmup-ratio 0.1 with --iters N" in told
    assert read("--warmup-ratio", "0.1", "--iters", "50").optimizer.warmup == 5

    told = refusal("--warmup-ratio", "0.1")
    assert told.endswith("give --iters N too, or --warmup in steps instead")
    assert "a fraction of the run" in refusal("--warmup-ratio", "10")


def test_the_length_of_a_file_counts_for_a_fraction_as_a_flag(tmp_path: Path):
    file = tmp_path / "run.yaml"
    for name in ("iters", "max_steps"):
        file.write_text(f"{name}: 50\n")
        assert read("-c", str(file), "--warmup-ratio", "0.1").optimizer.warmup == 5


@pytest.mark.parametrize(
    "kind", [TrainConfig, SweepConfig, GenerateConfig, FuseConfig, ExportConfig]
)
def test_a_message_names_a_setting_as_it_was_written(kind: type, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    found = 0
    for name in setting_names(kind):
        written = name.rstrip("_").replace("_", "-")
        accepted = (-7,) if takes_text(kind, name) else ()
        refused = [value for value in BAD if f"{name} " in told_of(kind, {name: value})]
        for value in [value for value in refused if value not in accepted][:1]:
            found += 1
            told_in_python = told_of(kind, {name: value})
            assert "--" not in told_in_python

            # In a file, the message names the file too.
            file.write_text(yaml.safe_dump({name: value}))
            with pytest.raises(ConfigError) as error:
                parse(kind, Switches, ["-c", str(file)], "mlx_loraplus.train")
            assert str(error.value).startswith(f"{file}: {told_in_python[:20]}")
            assert "--" not in str(error.value)

            # As a flag, whose value is a text.
            if not isinstance(value, dict):
                with pytest.raises(ConfigError) as error:
                    parse(kind, Switches, [f"--{written}={value}"], "mlx_loraplus.train")
                assert f"--{written} " in str(error.value)
    assert found > len(setting_names(kind)) / 2


def takes_text(kind: type, name: str) -> bool:
    """Return whether a setting accepts a text, or several."""
    return not all(told_of(kind, {name: value}) for value in ("-7", ["-7"]))


def told_of(kind: type, settings: dict[str, Any]) -> str:
    """Return what is said in Python about settings; "" if they are accepted."""
    try:
        configure(kind, settings)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"iters": 3, "epochs": 3}, "{iters} and {epochs} both say how long"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "{optimizer} adam has no {weight_decay}"),
        ({"adapter": "vera", "alpha": 4}, "{adapter} vera has no scale: leave {alpha} out"),
        ({"adapter": "full", "rank": 4}, "{adapter} full trains the weights themselves and has no {rank}"),
        ({"loftq_iters": 2, "init": "pissa"}, "{loftq_iters} is for {init} loftq, not pissa"),
    ],
)  # fmt: skip
def test_settings_at_odds_are_named_as_they_were_written(
    settings: dict[str, Any], told: str, tmp_path: Path
):
    assert told.format(**{name: name for name in settings}) in told_of(TrainConfig, settings)

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert told.format(**{name: name for name in settings}) in refusal("-c", str(file))

    flags = {name: f"--{name.replace('_', '-')}" for name in settings}
    words = [f"{flags[name]}={value}" for name, value in settings.items()]
    assert told.format(**flags) in refusal(*words)

    # One in the file, and the other as a flag
    first, second = settings
    file.write_text(yaml.safe_dump({first: settings[first]}))
    mixed = {first: first, second: flags[second]}
    if {first, second} != {"iters", "epochs"}:  # a flag replaces the length in the file
        assert told.format(**mixed) in refusal("-c", str(file), words[1])


@pytest.mark.parametrize("kind", [TrainConfig, SweepConfig, GenerateConfig, FuseConfig])
def test_every_example_is_accepted(kind: type):
    for name in setting_names(kind):
        for value in BAD[2:3]:
            told = told_of(kind, {name: [value] if name.endswith("s") else value})
            example = re.search(r"\(such as (.*?)\)", told)
            if example:
                numbers = [float(word) for word in example[1].split()]
                given = (
                    numbers if name.endswith(("ratios", "rates", "ranks", "alphas")) else numbers[0]
                )
                assert "such as" not in told_of(kind, {name: given})
    assert example_of("seed", whole=True) == "8"


@pytest.mark.parametrize(
    "text", ["model: a\n\tdata: b\n", "prompts:\n\t- a\n", "seed: 1\niters:\t1\t# a\n"]
)
def test_a_tab_in_a_file_is_told_with_its_line(text: str, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert refusal("-c", str(file)) == f"{file}:2: YAML allows no tabs here: use spaces"
    file.write_text(text.replace("\t", " "))
    assert "tabs" not in str(told_of(TrainConfig, {"prompts": "a\tb"}))


def test_the_name_of_an_unknown_setting_comes_with_its_file(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("modelx: tiny\n")
    told = refusal("-c", str(file))
    assert told == f"{file}: modelx is not a setting (did you mean 'model'?)"
