"""The floors of the house, its public names and its options: a change to any is a deliberate line in a diff."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mlx_loraplus
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.command_config import (
    ChatConfig,
    CompareConfig,
    DoctorConfig,
    ExportConfig,
    FuseConfig,
    GenerateConfig,
    ServeConfig,
    SweepConfig,
)
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import configure, setting_names, settings_of

PACKAGE = Path(mlx_loraplus.__file__).parent
FLOORS = [
    {"errors", "interrupted_imports", "spelling"},
    {"userpaths", "hub_access", "rich_display", "foreign_names", "value_hints"},
    {
        "mlx_lm_schedule",
        "translation",
        "setting_types",
        "files",
        "device",
        "failures",
        "call_checks",
        "pages",
    },
    {"config"},
    {"command_config", "keyword_types"},
    {"conflicts"},
    {"settings", "python_messages", "_runtime"},
    {"settings_file", "migration", "help_text", "tyro_errors"},
    {"models", "launching"},
    {"adapters"},
    {"data"},
    {"kernels", "inference"},
    {"memory"},
    {"runs"},
    {"export", "training"},
    {"sweep"},
    {"given_settings", "unknown_arguments"},
    {"unknown_commands"},
    {"arguments"},
    {"run_argument"},
    {"cli"},
    {"__main__", "commands"},
]
"""The rooms from the ground up: a file imports only from its own room and from lower floors."""

KINDS = {
    "train": TrainConfig, "generate": GenerateConfig, "chat": ChatConfig, "compare": CompareConfig, "fuse": FuseConfig,
    "export": ExportConfig, "sweep": SweepConfig, "doctor": DoctorConfig, "serve": ServeConfig,
}  # fmt: skip
ROOT = PACKAGE.parent
COMMANDS = (
    "train",
    "generate",
    "fuse",
    "plan",
    "sweep",
    "compare",
    "chat",
    "export",
    "doctor",
    "serve",
)
STUBS = {
    "train.py",
    "generate.py",
    "fuse.py",
    "plan.py",
    "compare.py",
    "chat.py",
    "doctor.py",
    "serve.py",
    "sweep/__main__.py",
    "export/__main__.py",
}
"""What ``python -m mlx_loraplus.train`` and the like run: four lines that call ``cli.py``."""


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return "commands" if inside.as_posix() in STUBS else inside.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms of the package that a file imports from, anywhere in it."""
    folder = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]))
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), folder)
            names += [f"{home}.{alias.name}" for alias in node.names]
    inside = [name.split(".") for name in names if name.startswith(f"{PACKAGE.name}.")]
    return {parts[1] for parts in inside} - {"__version__"}


def test_a_file_imports_only_rooms_below_its_own():
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        room = room_of(path)
        for other in imported_rooms(path) - {room}:
            assert floor_of[other] < floor_of[room], f"{path.relative_to(PACKAGE)} imports {other}"


def test_the_page_names_files_that_exist():
    """The path of one example has twelve steps, and every file on the page is there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = page.split("## The path of one example")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. `\w+/\w+\.py`", way, flags=re.MULTILINE)) == 12

    # Paths are relative to the package, or to the repository
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", page)
    missing = [n for n in named if not (PACKAGE / n).exists() and not (ROOT / n).exists()]
    assert not missing


def test_scripts_and_workflows_name_files_that_exist():
    """The paths of files and folders of this repository, and the modules that are run."""
    files = [p for p in (ROOT / "scripts").rglob("*") if p.suffix in ("", ".py", ".md", ".mjs")]
    files += [*(ROOT / ".github").rglob("*.yml"), *(ROOT / ".github").rglob("*.md")]
    files += (ROOT / ".ci").iterdir()
    missing: list[str] = []
    for file in filter(Path.is_file, files):
        if file.name.startswith("."):  # a Mac's .DS_Store
            continue
        text = file.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w./-])((?:scripts|tests|docs|mlx_loraplus)/[\w./-]*\w)", text)
        modules = re.findall(r"-m (scripts[\w.]*\w)", text)
        named += [f"{module.replace('.', '/')}.py" for module in modules]
        missing += [f"{file.name}: {name}" for name in named if not (ROOT / name).exists()]

    # Old commits, which that script measures, have it instead of scripts/bench/trainers.py.
    assert missing == ["compare_commits.py: scripts/bench_trainers.py"]


def test_what_has_no_gpu_kernel_is_computed_on_the_cpu():
    """MLX raises an error on a GPU for all its linear algebra except norms without an order."""
    streams: dict[str, str | None] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or "linalg." not in ast.unparse(node.func):
                continue
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            is_plain_norm = ast.unparse(node.func) == "mx.linalg.norm" and len(node.args) == 1
            if not is_plain_norm or "ord" in words:
                streams[f"{path.name}:{node.lineno}"] = words.get("stream")
    assert len(streams) >= 4
    assert set(streams.values()) == {"mx.cpu"}, streams


@pytest.mark.parametrize("folder", ["mlx_loraplus", "tests", "scripts"])
def test_files_are_short(folder: str):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, path.name


def test_no_name_stands_for_two_things():
    """No file name, class name or public function name is used twice in the package."""
    files = Counter(
        path.name
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in STUBS
    )
    assert not [name for name, count in files.items() if count > 1 and not name.startswith("__")]

    defined: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_public = isinstance(
                node, ast.ClassDef | ast.FunctionDef
            ) and not node.name.startswith("_")
            if is_public and path.name != "cli.py":  # a command has the name of what it does
                defined[node.name] += 1
    assert not [name for name, count in defined.items() if count > 1]


def test_every_page_says_the_same_about_the_direction_of_imports():
    pages = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    said = [
        sentence
        for page in pages
        for sentence in re.findall(
            r"[^.]*\bimports? only\b[^.]*\.", page.read_text(encoding="utf-8")
        )
    ]
    assert len(said) >= 2
    assert all(
        re.search(r"own\s+room\s+and\s+(from\s+|the\s+)?(rooms|floors)\s+below", each)
        for each in said
    )


def test_public_names():
    assert mlx_loraplus.__all__ == [
        "AdapterConfig", "AdapterError", "BackendError", "ConfigError", "DataConfig", "DataError", "DeviceError",
        "LoRAPlus", "LoRAPlusError", "ModelError", "OptimizerConfig", "OutputError", "PeerError", "Run", "TrainConfig",
        "attach_adapters", "compare_runs", "complete", "evaluate", "find_rate", "finetune", "fuse_adapter", "load", "load_adapter",
        "plan_memory", "preview", "save_adapter", "sweep_rates",
    ]  # fmt: skip
    code = (
        "import mlx_loraplus as m; "
        "assert all(callable(getattr(m, name)) for name in m.__all__ for _ in range(2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options():
    assert setting_names(TrainConfig) == [
        "model", "adapter_path", "resume_adapter_file", "resume", "iters", "epochs", "grad_accumulation_steps",
        "grad_checkpoint", "compile", "selfcheck", "steps_per_report", "steps_per_eval", "steps_per_save",
        "keep_checkpoints", "on_save_error", "patience", "max_minutes", "max_skipped_steps", "parallel",
        "distributed_timeout", "seed", "overwrite", "sample_rows", "prompts", "report_to", "adapter", "init",
        "rank", "alpha", "rslora", "dropout", "target_modules", "train_modules",
        "num_layers", "quantize", "quantize_group_size", "loftq_iters", "svd", "optimizer", "learning_rate", "lr_ratio",
        "magnitude_lr_ratio", "embedding_learning_rate", "weight_decay", "schedule", "warmup", "max_grad_norm",
        "objective", "beta", "label_smoothing", "simpo_gamma", "orpo_lambda", "kto_weights", "reference", "data",
        "data_weights", "fields", "valid_split", "on_bad", "on_long", "train_on", "batch_size", "max_seq_length",
        "pack",
    ]  # fmt: skip
    assert setting_names(GenerateConfig) == [
        "model", "adapter_path", "max_tokens", "temperature", "system", "seed", "prompt", "chat", "tools",
    ]  # fmt: skip
    assert setting_names(FuseConfig) == [
        "model", "adapter_path", "save_path", "bits", "dequantize", "keep_vision", "data", "sample_tokens", "overwrite",
    ]  # fmt: skip
    assert setting_names(ExportConfig) == [
        "to", "from_", "model", "adapter_path", "save_path", "merged", "repo_id", "overwrite",
    ]  # fmt: skip
    assert setting_names(ChatConfig) == [
        "model",
        "adapter_path",
        "max_tokens",
        "temperature",
        "system",
        "seed",
    ]
    assert setting_names(DoctorConfig) == ["model", "save_path", "overwrite"]
    assert setting_names(ServeConfig) == ["folder", "host", "port", "token"]
    assert setting_names(CompareConfig) == ["runs", "save_path", "overwrite"]
    shared = set(setting_names(TrainConfig)) & set(setting_names(SweepConfig))
    assert [name for name in setting_names(SweepConfig) if name not in shared] == [
        "learning_rates", "lr_ratios", "ranks", "alphas", "rounds", "seeds", "valid_rows",
    ]  # fmt: skip
    assert set(setting_names(TrainConfig)) - shared == {
        "epochs", "grad_checkpoint", "compile", "selfcheck", "steps_per_report", "steps_per_eval",
        "steps_per_save", "keep_checkpoints", "on_save_error", "patience", "max_skipped_steps", "sample_rows",
        "prompts", "report_to", "parallel", "distributed_timeout",
    }  # fmt: skip


@pytest.mark.parametrize("command", KINDS)
def test_a_setting_is_a_flag_a_yaml_key_and_a_row_of_the_settings_page(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kind = KINDS[command]
    with pytest.raises(SystemExit):
        parse(kind, Switches, ["--help-all"], f"mlx_loraplus.{command}")
    told = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    part = (
        (ROOT / "docs" / "settings.md")
        .read_text(encoding="utf-8")
        .split(f"\n`mlx_loraplus.{command}`\n")[1]
    )
    rows = dict(
        re.findall(
            r"^\| `(\S+)` \|.*?\| (.*) \|$", part.split("\n`mlx_loraplus.")[0], flags=re.MULTILINE
        )
    )
    elsewhere = (
        set(setting_names(TrainConfig)) if kind is SweepConfig else set()
    )  # train's own are in train's table
    for name in setting_names(kind):
        flag = (
            name.upper()
            if name in ("runs", "folder")
            else "--" + name.rstrip("_").replace("_", "-")
        )
        assert flag in told or name in ("runs", "folder"), f"--help of {command} has no {flag}"
        if flag not in rows and name in elsewhere:
            continue
        assert "".join(rows[flag].replace("\\|", "|").split()) in told, (
            f"--help and docs/settings.md differ on {flag}"
        )
    config = configure(kind, {})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings_of(config)))
    assert parse(kind, Switches, ["-c", str(tmp_path / "settings.yaml")], command)[0] == config


def test_start_up_imports_nothing_heavy():
    light = {"pydantic", "pydantic_core", "tyro", "rich", "yaml"} | {  # and what these import
        "annotated_types", "typing_extensions", "typing_inspection", "docstring_parser", "cython_runtime",
    }  # fmt: skip
    commands = ", ".join(
        f"mlx_loraplus.{name.removesuffix('.py').replace('/', '.')}" for name in STUBS
    )
    for imports, allowed in (("mlx_loraplus", set()), (f"mlx_loraplus, {commands}", light)):
        code = (
            f"import sys; old = set(sys.modules); import {imports}; own = {{'mlx_loraplus',"
            " 'coverage'};print(*{name.split('.')[0] for name in set(sys.modules) - old} -"
            " set(sys.stdlib_module_names) - own)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert {name for name in done.stdout.split() if not name.startswith("_")} <= allowed


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlx_loraplus.__version__)
    assert f"\n## [{mlx_loraplus.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(
        encoding="utf-8"
    )


def test_the_lock_holds_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    wanted += [
        line for extra in project["project"]["optional-dependencies"].values() for line in extra
    ]
    lines = (ROOT / "scripts" / "requirements.lock").read_text().splitlines()
    locked: dict[str, list[Version]] = {}
    for line in map(Requirement, filter(None, lines)):
        assert not line.url, line
        locked.setdefault(line.name, []).append(Version(str(line.specifier).removeprefix("==")))
    for requirement in map(Requirement, wanted):
        name = requirement.name.replace("_", "-").lower()
        assert all(requirement.specifier.contains(version) for version in locked[name]), (
            f"run scripts/lock: {name}"
        )
