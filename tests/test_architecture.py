"""The floors of the house, its public names and its options: a change to any is a deliberate line in a diff."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mlx_loraplus
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.config import ChatConfig, CompareConfig, FuseConfig, GenerateConfig, RunConfig
from mlx_loraplus.export.targets import ExportConfig
from mlx_loraplus.settings import configure, setting_names, settings_of
from mlx_loraplus.sweep.config_sweep import SweepConfig

PACKAGE = Path(mlx_loraplus.__file__).parent
FLOORS = {
    "userpaths": -1, "errors": 0, "config": 0, "hub": 0, "shown": 0,
    "places": 0.2, "machine": 0.2, "settings": 0.4, "runtime": 0.4,
    "models": 0.8, "adapters": 1, "data": 1,
    "limits": 1.2, "memory": 1.2, "shapes": 1.4, "planning": 1.6,
    "generation": 2, "inspection": 2,
    "training": 3,
    "export": 4, "evaluation": 4, "comparison": 4, "conversation": 4, "study": 4,
    "commandline": 5, "launching": 5,
    "train": 6, "generate": 6, "fuse": 6, "plan": 6, "compare": 6, "chat": 6, "sweep": 6,
    "export command": 6, "__main__": 6,
}  # fmt: skip

KINDS = {
    "train": RunConfig, "generate": GenerateConfig, "chat": ChatConfig, "compare": CompareConfig, "fuse": FuseConfig,
    "export": ExportConfig, "sweep": SweepConfig,
}  # fmt: skip
ROOT = PACKAGE.parent
COMMANDS = ("train", "generate", "fuse", "plan", "sweep", "compare", "chat", "export/__main__")


def room_of(path: Path) -> str:
    if path == PACKAGE / "export" / "__main__.py":  # a room and a command of one name
        return "export command"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_file_imports_only_rooms_below_its_own():
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        room, folder = room_of(path), ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                home = resolve_name("." * node.level + (node.module or ""), folder)
                names = [f"{home}.{name}" for name in names]
            for house, other, *_ in (f"{name}.".split(".") for name in names):
                if house == PACKAGE.name:
                    assert other == room or FLOORS[other] < FLOORS[room], f"{path.name} imports {other}"


def test_files_are_short_and_commands_shorter():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
    for name in COMMANDS:
        assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80, name


def test_public_names():
    assert mlx_loraplus.__all__ == [
        "AdapterError", "ConfigError", "DataError", "LoRAPlus", "LoRAPlusError", "ModelError", "OutputError",
        "PeerError", "Run", "compare_runs", "complete", "evaluate", "finetune", "fuse_adapter", "load", "load_adapter",
        "plan_memory", "preview", "save_adapter", "sweep_rates",
    ]  # fmt: skip
    assert all(callable(getattr(mlx_loraplus, name)) for name in mlx_loraplus.__all__)


def test_options():
    assert setting_names(RunConfig) == [
        "model", "adapter_path", "resume_adapter_file", "resume", "iters", "epochs", "grad_accumulation_steps",
        "grad_checkpoint", "compile", "steps_per_report", "steps_per_eval", "steps_per_save",
        "keep_checkpoints", "on_save_error", "patience", "max_minutes", "max_skipped_updates", "parallel",
        "peer_timeout", "seed", "overwrite", "answer_rows", "prompts", "report_to", "adapter", "init",
        "rank", "alpha", "rslora", "dropout", "target_modules", "train_modules",
        "num_layers", "quantize", "quantize_group_size", "loftq_iters", "svd", "optimizer", "learning_rate", "lr_ratio",
        "magnitude_lr_ratio", "embedding_learning_rate", "weight_decay", "schedule", "warmup", "max_grad_norm", "data",
        "data_weights", "fields", "valid_split", "on_bad", "on_long", "train_on", "batch_size", "max_seq_length",
        "pack",
    ]  # fmt: skip
    assert setting_names(GenerateConfig) == [
        "model", "adapter_path", "max_tokens", "temperature", "seed", "prompt", "chat",
    ]  # fmt: skip
    assert setting_names(FuseConfig) == [
        "model", "adapter_path", "save_path", "bits", "dequantize", "keep_vision", "data", "sample_tokens", "overwrite",
    ]  # fmt: skip
    assert setting_names(ExportConfig) == [
        "to", "from_", "model", "adapter_path", "save_path", "whole", "repo_id", "overwrite",
    ]  # fmt: skip
    assert setting_names(ChatConfig) == ["model", "adapter_path", "max_tokens", "temperature", "seed"]
    assert setting_names(CompareConfig) == ["runs", "save_path", "overwrite"]
    shared = set(setting_names(RunConfig)) & set(setting_names(SweepConfig))
    assert [name for name in setting_names(SweepConfig) if name not in shared] == [
        "learning_rates", "lr_ratios", "ranks", "alphas", "rounds", "seeds", "valid_rows",
    ]  # fmt: skip
    assert set(setting_names(RunConfig)) - shared == {
        "resume_adapter_file", "epochs", "grad_checkpoint", "compile", "steps_per_report", "steps_per_eval",
        "steps_per_save", "keep_checkpoints", "on_save_error", "patience", "max_skipped_updates", "answer_rows",
        "prompts", "report_to", "parallel", "peer_timeout",
    }  # fmt: skip


@pytest.mark.parametrize("command", KINDS)
def test_a_setting_is_a_flag_a_yaml_key_and_a_row_of_the_readme(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kind = KINDS[command]
    with pytest.raises(SystemExit):
        parse(kind, Switches, ["--help"], f"mlx_loraplus.{command}")
    told = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    part = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n`mlx_loraplus.{command}`\n")[1]
    rows = dict(re.findall(r"^\| `(\S+)` \|.*?\| (.*) \|$", part.split("\n`mlx_loraplus.")[0], flags=re.MULTILINE))
    elsewhere = set(setting_names(RunConfig)) if kind is SweepConfig else set()  # train's own are in train's table
    for name in setting_names(kind):
        flag = name.upper() if name == "runs" else "--" + name.rstrip("_").replace("_", "-")
        assert flag in told or name == "runs", f"--help of {command} has no {flag}"
        if flag not in rows and name in elsewhere:
            continue
        assert "".join(rows[flag].replace("\\|", "|").split()) in told, f"--help and the README differ on {flag}"
    config = configure(kind, {})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings_of(config)))
    assert parse(kind, Switches, ["-c", str(tmp_path / "settings.yaml")], command)[0] == config


def test_start_up_imports_nothing_heavy():
    light = {"pydantic", "pydantic_core", "tyro", "rich", "yaml"} | {  # and what these import
        "annotated_types", "typing_extensions", "typing_inspection", "docstring_parser", "cython_runtime",
    }  # fmt: skip
    commands = ", ".join(f"mlx_loraplus.{name.replace('/', '.')}" for name in COMMANDS)
    for imports, allowed in (("mlx_loraplus", set()), (f"mlx_loraplus, {commands}", light)):
        code = (
            f"import sys; old = set(sys.modules); import {imports}; own = {{'mlx_loraplus', 'coverage'}};"
            "print(*{name.split('.')[0] for name in set(sys.modules) - old} - set(sys.stdlib_module_names) - own)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert {name for name in done.stdout.split() if not name.startswith("_")} <= allowed


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlx_loraplus.__version__)
    assert f"\n## [{mlx_loraplus.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_lock_holds_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    wanted += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    lines = (ROOT / "scripts" / "requirements.lock").read_text().splitlines()
    locked: dict[str, list[Version]] = {}
    for line in map(Requirement, filter(None, lines)):
        assert not line.url, line
        locked.setdefault(line.name, []).append(Version(str(line.specifier).removeprefix("==")))
    for requirement in map(Requirement, wanted):
        name = requirement.name.replace("_", "-").lower()
        assert all(requirement.specifier.contains(version) for version in locked[name]), f"run scripts/lock: {name}"
