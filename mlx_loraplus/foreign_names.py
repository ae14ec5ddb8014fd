"""The settings of other programs, such as mlx-lm and TRL, and what each of them means here.

``migration.py`` translates settings with this table, and docs/migration.md shows it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ForeignSetting:
    """What a setting of another program means here.

    Attributes:
        ours: The setting with the same meaning; None if there is none.
        values: The values that can be translated. With ``ours``, a mapping from their value to
            ours, or to None for a value that is the default here. Without ``ours``, the values that
            change nothing here. None: all values.
        note: What to do instead of the other values, or why the setting can be left out.
    """

    ours: str | None = None
    values: Mapping[Any, Any] | Sequence[Any] | None = None
    note: str = ""

    @property
    def refused(self) -> bool:
        """Whether no value of the setting can be translated."""
        return self.values is not None and not self.values


def _left_out(note: str) -> ForeignSetting:
    """Return a setting that changes nothing here, whatever its value."""
    return ForeignSetting(note=note)


def _only(*values: Any, note: str) -> ForeignSetting:
    """Return a setting that changes nothing here if it has one of these values."""
    return ForeignSetting(values=values, note=note)


def _refused(note: str) -> ForeignSetting:
    """Return a setting that has no counterpart here."""
    return ForeignSetting(values=(), note=note)


_NO_REMOTE_CODE = "code from a model's repository is never run: use a model that mlx-lm knows"
_PRECISION = "the base keeps its type, and adapters train in float32"
_SWITCH = {True: True, False: None}
_NONE = (None, {}, [], False)

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw",
    "adamw_bnb_8bit": "adamw",
    "paged_adamw_8bit": "adamw",
    "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion_32bit": "lion",
    "lion_8bit": "lion",
    "paged_lion_8bit": "lion",
    "paged_lion_32bit": "lion",
    "muon": "muon",
}

MLX_LM: Mapping[str, ForeignSetting] = {
    "train": _only(True, note="training data goes to --data; --test only evaluates"),
    "training_mode": _only("normal", note="only supervised training is translated"),
    "test": _left_out("run the command again with --test after training"),
    "fine_tune_type": ForeignSetting(
        "adapter",
        {"lora": "lora", "dora": "dora", "full": "full"},
        "full: mlx-lm trains only blocks, the last 16 by default; --num-layers N does the same",
    ),
    "mask_prompt": ForeignSetting("train_on", {True: "last", False: "everything"}),
    "lora_layers": ForeignSetting("num_layers"),
    "scale": ForeignSetting("alpha", note="alpha = scale x rank"),
    "keys": ForeignSetting("target_modules"),
    "lora_parameters": ForeignSetting(note="rank, dropout, scale and keys"),
    "optimizer_config": ForeignSetting(note="weight_decay of the optimizer"),
    "lr_schedule": ForeignSetting(
        note="learning_rate, schedule and warmup; cosine_decay and linear_schedule that end near"
        " zero at the last step"
    ),
    "save_every": ForeignSetting("steps_per_save"),
    **dict.fromkeys(("val_batches", "test_batches"), _left_out("all of the rows are used")),
    "clear_cache_threshold": _left_out("memory is managed by the plan"),
    **dict.fromkeys(
        ("wandb", "project_name"),
        _refused("--report-to sets the tracker; variables such as WANDB_PROJECT set the project"),
    ),
    "trust_remote_code": _only(False, note=_NO_REMOTE_CODE),
    "hf_dataset": _refused("--data org/name, with --fields for its columns"),
    "prompt_feature": ForeignSetting("fields", note="--fields prompt=COLUMN"),
    "completion_feature": ForeignSetting("fields", note="--fields completion=COLUMN"),
    "chat_feature": ForeignSetting("fields", note="--fields messages=COLUMN"),
    "text_feature": ForeignSetting("fields", note="--fields text=COLUMN"),
    "temp": ForeignSetting("temperature"),
    **dict.fromkeys(("top_p", "top_k", "min_p"), _refused("--temperature alone sets the sampling")),
    "de_quantize": ForeignSetting("dequantize", _SWITCH),
    "export_gguf": _refused("mlx_loraplus.export RUN --to gguf --merged f16 writes a .gguf file"),
    "gguf_path": _refused("mlx_loraplus.export RUN --to gguf --merged f16 writes a .gguf file"),
    "upload_repo": _refused("mlx_loraplus.export RUN --to hub --repo-id OWNER/NAME uploads"),
}

PEFT: Mapping[str, ForeignSetting] = {
    "r": ForeignSetting("rank"),
    "lora_r": ForeignSetting("rank"),
    "lora_alpha": ForeignSetting("alpha"),
    "lora_dropout": ForeignSetting("dropout"),
    "lora_target_modules": ForeignSetting("target_modules"),
    "use_dora": ForeignSetting("adapter", {True: "dora", False: None}),
    "use_rslora": ForeignSetting("rslora", _SWITCH),
    "init_lora_weights": ForeignSetting(
        "init",
        {
            True: "init1",
            "gaussian": "init1",
            "pissa": "pissa",
            "pissa_niter_4": "pissa",
            "pissa_niter_16": "pissa",
            "loftq": "loftq",
        },
        "--init takes init1, init2, pissa and loftq",
    ),
    "loftq_config": ForeignSetting(note="quantize and loftq_iters"),
    "modules_to_save": ForeignSetting("train_modules"),
    "layers_to_transform": _only(*_NONE, note="--num-layers N adapts the last N blocks"),
    "layers_pattern": _only(*_NONE, note="--num-layers N adapts the last N blocks"),
    "exclude_modules": _only(*_NONE, note="name the modules to adapt: --target-modules"),
    "rank_pattern": _only(*_NONE, note="all adapters of a run have one --rank and one --alpha"),
    "alpha_pattern": _only(*_NONE, note="all adapters of a run have one --rank and one --alpha"),
    "bias": _only("none", note="biases don't train"),
    "lora_bias": _only(False, note="adapters have no bias"),
    "fan_in_fan_out": _only(False, note="mlx-lm stores all weights alike"),
    "task_type": _only("CAUSAL_LM", note="only language models train here"),
    "peft_type": ForeignSetting(
        "adapter", {"LORA": "lora", "VERA": "vera"}, "--adapter takes lora, dora and vera"
    ),
    "base_model_name_or_path": ForeignSetting("model"),
    "inference_mode": _left_out("training trains the adapter"),
    "loraplus_lr_ratio": ForeignSetting("lr_ratio"),
    "loraplus_lr_embedding": ForeignSetting("embedding_learning_rate"),
}

TRL: Mapping[str, ForeignSetting] = {
    "output_dir": ForeignSetting("adapter_path"),
    "overwrite_output_dir": ForeignSetting("overwrite", _SWITCH),
    "resume_from_checkpoint": ForeignSetting("resume", _SWITCH, "-c RUN/run.yaml --resume"),
    "model_name_or_path": ForeignSetting("model"),
    "dataset_name": ForeignSetting("data"),
    "eval_dataset": _refused("valid.jsonl, or in Python data={'train': rows, 'valid': rows}"),
    "dataset_text_field": ForeignSetting("fields", note="--fields text=COLUMN"),
    "per_device_train_batch_size": ForeignSetting("batch_size"),
    "per_device_eval_batch_size": _left_out("validation uses --batch-size"),
    "gradient_accumulation_steps": ForeignSetting("grad_accumulation_steps"),
    "gradient_checkpointing": ForeignSetting("grad_checkpoint", {True: "on", False: "off"}),
    "max_steps": ForeignSetting("iters"),
    "num_train_epochs": ForeignSetting("epochs"),
    "lr": ForeignSetting("learning_rate"),
    "lr_scheduler_type": ForeignSetting(
        "schedule",
        {
            "cosine": "cosine",
            "linear": "linear",
            "constant": "constant",
            "constant_with_warmup": "constant",
        },
        "--schedule takes cosine, linear and constant",
    ),
    "warmup_steps": ForeignSetting("warmup"),
    "warmup_ratio": ForeignSetting("warmup", note="warmup = warmup_ratio x iters"),
    "logging_steps": ForeignSetting("steps_per_report"),
    "eval_steps": ForeignSetting("steps_per_eval"),
    "save_steps": ForeignSetting("steps_per_save"),
    "save_total_limit": ForeignSetting("keep_checkpoints"),
    "logging_strategy": _only("steps", note="give --steps-per-report"),
    "eval_strategy": _only("steps", note="give --steps-per-eval"),
    "evaluation_strategy": _only("steps", note="give --steps-per-eval"),
    "save_strategy": _only("steps", "best", note="give --steps-per-save"),
    "load_best_model_at_end": _only(True, note="the best adapter is always kept"),
    "max_length": ForeignSetting("max_seq_length"),
    "packing": ForeignSetting("pack", _SWITCH),
    "completion_only_loss": ForeignSetting("train_on", {True: "turns", False: "everything"}),
    "assistant_only_loss": ForeignSetting("train_on", {True: "turns", False: "everything"}),
    "optim": ForeignSetting(
        "optimizer", _OPTIMIZERS, "--optimizer takes adamw, adam, sgd, lion, adafactor and muon"
    ),
    "adam_beta1": _only(0.9, note="the betas are 0.9 and 0.999"),
    "adam_beta2": _only(0.999, note="the betas are 0.9 and 0.999"),
    "adam_epsilon": _only(1e-8, note="epsilon is 1e-8"),
    "data_seed": ForeignSetting("seed"),
    "torch_compile": ForeignSetting("compile", {True: "on", False: "off"}),
    "do_train": _only(True, note="to evaluate without training, use --test"),
    "do_eval": _left_out("validation follows from the data"),
    "loss_type": ForeignSetting(
        "objective",
        {"nll": None, "sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo", "kto": "kto"},
        "--objective takes sft, dpo, ipo, orpo, simpo and kto",
    ),
    "ref_model": _refused("--reference base or start names the reference"),
    "precompute_ref_log_probs": _left_out("the reference is always computed before training"),
    "max_prompt_length": _refused("--max-seq-length limits the prompt and the answer together"),
    "max_completion_length": _refused("--max-seq-length limits the prompt and the answer together"),
    "desirable_weight": _only(1, note="--kto-weights takes both, the desirable one first"),
    "undesirable_weight": _only(1, note="--kto-weights takes both, the desirable one first"),
    "padding_free": _only(False, note="--pack packs short rows"),
    "eval_packing": _left_out("validation rows are not packed"),
    "gradient_checkpointing_kwargs": _left_out("checkpointing has no options here"),
    "logging_dir": _left_out("history.jsonl is in --adapter-path; see --report-to"),
    **dict.fromkeys(("bf16", "fp16", "tf32", "torch_dtype"), _left_out(_PRECISION)),
    "attn_implementation": _left_out("the kernels are chosen here"),
    "use_liger_kernel": _left_out("the kernels are chosen here"),
    "group_by_length": _left_out("batches are of similar length"),
    "remove_unused_columns": _left_out("columns without a use are reported"),
    **dict.fromkeys(
        ("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory"),
        _left_out("rows are encoded once, and read while the model trains"),
    ),
    "disable_tqdm": _left_out("--log-format plain has no live display"),
    "logging_first_step": _left_out("the first step is always reported"),
    "eval_on_start": _left_out("the first validation is before the first step"),
    "neftune_noise_alpha": _only(None, 0, note="noise on embeddings does not exist here"),
    "label_smoothing_factor": _only(0, note="labels are not smoothed"),
    "group_by_prompt": _refused("--valid-split keeps rows with one prompt together"),
    "push_to_hub": _only(False, note="upload afterwards: mlx_loraplus export --to hub"),
    "hub_model_id": _refused("upload afterwards: mlx_loraplus export --to hub"),
    "run_name": _refused("a run has the name of its folder, --adapter-path"),
    "loraplus_weight_decay": ForeignSetting("weight_decay"),
}

UNSLOTH: Mapping[str, ForeignSetting] = {
    "model_name": ForeignSetting("model"),
    "load_in_4bit": _only(False, note="give a quantized model: --list-models, or a hub id"),
    "load_in_8bit": _only(False, note="give a quantized model: --list-models, or a hub id"),
    "full_finetuning": ForeignSetting("adapter", {True: "full", False: None}),
    "dtype": _only(None, "None", note=_PRECISION),
    "use_gradient_checkpointing": ForeignSetting(
        "grad_checkpoint", {True: "on", "unsloth": "on", "mlx": "on", False: "off"}
    ),
    "random_state": ForeignSetting("seed"),
    "finetune_language_layers": _only(True, note="only language layers train"),
    "finetune_vision_layers": _only(False, note="only language layers train"),
    "finetune_attention_modules": _only(True, note="name the modules: --target-modules"),
    "finetune_mlp_modules": _only(True, note="name the modules: --target-modules"),
}

AXOLOTL: Mapping[str, ForeignSetting] = {
    "base_model": ForeignSetting("model"),
    "datasets": _refused("--data takes folders, files and hub ids, and --fields their columns"),
    "test_datasets": _refused("put a file valid.jsonl beside train.jsonl"),
    "sequence_len": ForeignSetting("max_seq_length"),
    "micro_batch_size": ForeignSetting("batch_size"),
    "eval_batch_size": _left_out("validation uses --batch-size"),
    "num_epochs": ForeignSetting("epochs"),
    "lora_target_linear": _only(True, None, note="name the modules: --target-modules"),
    "lora_modules_to_save": ForeignSetting("train_modules"),
    "lora_model_dir": ForeignSetting("resume_adapter_file"),
    "peft_use_dora": ForeignSetting("adapter", {True: "dora", False: None}),
    "peft_use_rslora": ForeignSetting("rslora", _SWITCH),
    "val_set_size": ForeignSetting("valid_split"),
    "sample_packing": ForeignSetting("pack", _SWITCH),
    "eval_sample_packing": _left_out("validation rows are not packed"),
    "pad_to_sequence_len": _left_out("rows are padded as little as possible"),
    "train_on_inputs": ForeignSetting("train_on", {True: "everything", False: "turns"}),
    "lr_scheduler": ForeignSetting(
        "schedule",
        {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant"},
        "--schedule takes cosine, linear and constant",
    ),
    "evals_per_epoch": _refused("give --steps-per-eval"),
    "saves_per_epoch": _refused("give --steps-per-save"),
    "early_stopping_patience": ForeignSetting("patience"),
    "rl": ForeignSetting(
        "objective",
        {"dpo": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"},
        "--objective takes dpo, ipo, orpo, simpo and kto",
    ),
    "rl_beta": ForeignSetting("beta"),
    "orpo_alpha": ForeignSetting("orpo_lambda"),
    "chat_template": _only(None, "tokenizer_default", note="the model's own template is used"),
    "special_tokens": _only(*_NONE, note="the tokenizer of the model is used as it is"),
    **dict.fromkeys(("model_type", "tokenizer_type"), _left_out("the model's config says it")),
    "strict": _left_out("unknown names are always reported"),
    "dataset_prepared_path": _left_out("tokens are kept on disk"),
    "flash_attention": _left_out("MLX chooses the attention"),
    "wandb_project": _left_out("--report-to wandb reads WANDB_PROJECT"),
    "deepspeed": _only(*_NONE, note="--launch and --parallel train in several processes"),
    "fsdp": _only(*_NONE, note="--launch and --parallel train in several processes"),
}

LLAMA_FACTORY: Mapping[str, ForeignSetting] = {
    "dataset": ForeignSetting("data"),
    "dataset_dir": _refused("--data takes the path itself"),
    "stage": ForeignSetting(
        "objective",
        {"sft": "sft", "dpo": "dpo", "kto": "kto"},
        "--objective takes sft, dpo and kto",
    ),
    "finetuning_type": ForeignSetting(
        "adapter", {"lora": "lora", "full": "full"}, "--adapter takes lora, dora, vera and full"
    ),
    "lora_rank": ForeignSetting("rank"),
    "lora_target": ForeignSetting("target_modules", note="all is all-linear here"),
    "cutoff_len": ForeignSetting("max_seq_length"),
    "val_size": ForeignSetting("valid_split"),
    "pref_beta": ForeignSetting("beta"),
    "pref_loss": ForeignSetting(
        "objective",
        {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"},
        "--objective takes dpo, ipo, orpo, simpo and kto",
    ),
    "template": _refused("the model's own chat template is used"),
    "quantization_bit": _refused("give a model of 4 bits: --list-models, or a hub id"),
    "preprocessing_num_workers": _left_out("tokens are kept on disk"),
    "overwrite_cache": _left_out("tokens are kept on disk"),
}

OTHER_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("steps", "num_steps", "num_iters", "max_iters", "train_steps"), "iters"),
    **dict.fromkeys(("epoch", "n_epochs"), "epochs"),
    **dict.fromkeys(("lambda", "loraplus_ratio", "lora_plus_ratio", "ratio"), "lr_ratio"),
    **dict.fromkeys(("eta", "learningrate"), "learning_rate"),
    **dict.fromkeys(("context_length", "seq_len", "seq_length", "max_tokens"), "max_seq_length"),
    **dict.fromkeys(("bs", "batch", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("train_data", "train_file", "data_path", "data_dir", "rows"), "data"),
    **dict.fromkeys(("columns", "column_mapping"), "fields"),
    **dict.fromkeys(("num_processes", "nproc_per_node", "num_gpus"), "launch"),
    **dict.fromkeys(("quiet", "silent", "verbose", "debug"), "verbosity"),
    **{"scheduler": "schedule", "epochs": "iters", "system_prompt": "system"},
    **{"quantize": "bits", "q_bits": "bits", "trackers": "report_to", "train_dataset": "data"},
    **dict.fromkeys(("base", "model_path", "model_id"), "model"),
    **dict.fromkeys(("adapter_file", "init_from", "checkpoint"), "resume_adapter_file"),
    **dict.fromkeys(("time_limit", "max_time", "timeout", "max_hours", "minutes"), "max_minutes"),
}
"""Words that none of these programs uses → the setting that is probably meant."""

OUTPUT_WORDS = ("output", "out", "o", "output_path", "output_folder", "save_path", "save_dir")
"""Words for the folder that a command writes: save_path, or adapter_path of a run."""

PROGRAMS: Mapping[str, Mapping[str, ForeignSetting]] = {
    "mlx-lm": MLX_LM,
    "PEFT": PEFT,
    "TRL": TRL,
    "Unsloth": UNSLOTH,
    "axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
}
"""Program → its settings that have another name here, or none."""

FOREIGN_NAMES = frozenset(name for each in PROGRAMS.values() for name in each) - {"test"}
"""The settings of all programs, except the one that is only a flag here."""

NESTED = (
    "lora_parameters", "optimizer_config", "lr_schedule", "loftq_config", "hf_dataset",
    "rank_pattern", "alpha_pattern", "datasets", "test_datasets", "special_tokens", "fsdp",
)  # fmt: skip
"""Settings whose values are settings themselves."""


def find_foreign(name: str) -> ForeignSetting | None:
    """Return a setting of another program, or None if no program has this name."""
    return next((settings[name] for settings in PROGRAMS.values() if name in settings), None)


def foreign_hint(name: str) -> str:
    """Return what another program's setting means here, in parentheses; "" if it is unknown.

    Args:
        name: The name of a setting or a flag.
    """
    name = name.lstrip("-").replace("-", "_")
    for program, settings in PROGRAMS.items():
        for known in (name, name.removeprefix("no_")):
            if known not in settings:
                continue
            found = settings[known]
            here = f"--{found.ours.replace('_', '-')}" if found.ours else ""
            meaning = "; ".join(part for part in (here, found.note) if part)
            return f" ({program}'s {known}: {meaning})"
    return ""


def meant_setting(name: str, known: Collection[str]) -> str:
    """Return the setting that is probably meant by another word; "" if none is known.

    Args:
        name: The word, with _ for -.
        known: The settings and options of the command.
    """
    meant = OTHER_WORDS.get(name, "")
    if name in OUTPUT_WORDS and "overwrite" in known:
        meant = "save_path" if "save_path" in known else "adapter_path"
    return meant if meant in known else ""
