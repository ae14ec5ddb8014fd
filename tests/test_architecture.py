"""The floors of the house, its public names and its options: a change to any is a deliberate line in a diff."""

import ast
from pathlib import Path

import mlx_loraplus
from mlx_loraplus.config import ChatConfig, CompareConfig, ExportConfig, FuseConfig, GenerateConfig, RunConfig
from mlx_loraplus.settings import setting_names
from mlx_loraplus.study.config import SweepConfig

PACKAGE = Path(mlx_loraplus.__file__).parent
FLOORS = {
    "errors": 0, "config": 0, "settings": 0, "places": 0, "runtime": 0, "hub": 0, "machine": 0, "shown": 0,
    "models": 1, "adapters": 1, "data": 1,
    "memory": 1.2, "shapes": 1.4, "planning": 1.6,
    "generation": 2, "inspection": 2,
    "training": 3,
    "export": 4, "evaluation": 4, "comparison": 4, "conversation": 4, "study": 4,
    "commandline": 5, "train": 5, "generate": 5, "fuse": 5, "plan": 5, "compare": 5, "chat": 5, "sweep": 5,
    "launching": 5, "export command": 5,
}  # fmt: skip

COMMANDS = ("train", "generate", "fuse", "plan", "sweep", "compare", "chat", "export/__main__")


def room_of(path: Path) -> str:
    if path == PACKAGE / "export" / "__main__.py":  # a room and a command of one name
        return "export command"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_file_imports_only_rooms_below_its_own():
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        room, depth = room_of(path), len(path.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
                other = node.module.split(".")[0]
                same_house = FLOORS[room] in (0, 5)
                assert other == room or FLOORS[other] < FLOORS[room] or same_house, f"{path.name} imports {node.module}"


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
