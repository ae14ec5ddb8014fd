"""TRL's preference objectives on one model: losses, rewards and gradients of A and B.

This runs with a Python that has torch, transformers, peft and trl, and is used by
``golden_preferences`` and ``check_preferences``. Pairs go one at a time through TRL's own trainers
and loss functions, labeled answers as one batch:

    dpo    DPOTrainer, loss_type sigmoid; with label smoothing aot, which is cDPO for a single pair
    ipo    DPOTrainer, loss_type ipo
    orpo   ORPOTrainer.odds_ratio_loss and the mean loss of the chosen answer
    simpo  CPOTrainer.cpo_loss, loss_type simpo
    kto    KTOTrainer, with the answer of the row before as the one for the KL

The reference of DPO, IPO and KTO is the model with its adapter off.
"""

import tempfile
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.kernels import chunked_logprob

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "dpo, beta 0.5": {"objective": "dpo", "beta": 0.5},
    "dpo, smoothed": {"objective": "dpo", "label_smoothing": 0.2},
    "ipo": {"objective": "ipo"},
    "ipo, beta 0.5": {"objective": "ipo", "beta": 0.5},
    "orpo": {"objective": "orpo"},
    "orpo, lambda 1": {"objective": "orpo", "orpo_lambda": 1.0},
    "simpo": {"objective": "simpo"},
    "simpo, beta 5, gamma 0.5": {"objective": "simpo", "beta": 5.0, "simpo_gamma": 0.5},
    "kto": {"objective": "kto"},
    "kto, beta 0.5, weights 1 and 1.5": {
        "objective": "kto",
        "beta": 0.5,
        "kto_weights": [1.0, 1.5],
    },
}
TEXT = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}  # trainers ask for texts at start
LABELED = [{"prompt": "w3 w4", "completion": " w5", "label": label} for label in (True, False)]

Rows = Sequence[Mapping[str, Any]]


def judged(model: Any, case: Mapping[str, Any], pairs: Rows, labeled: Rows) -> dict[str, Any]:
    """Return the losses, the rewards, and for KTO the KL, of one case; gradients are in the model.

    Args:
        model: A PEFT model. Its gradients are those of the sum over the pairs, or over the labeled
            answers.
        case: The objective and its settings.
        pairs: Token ids ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        labeled: Token ids ``prompt_ids`` and ``completion_ids``, and ``label``.
    """
    model.zero_grad()
    if case["objective"] == "kto":
        loss, found = with_kto_trainer(model, case, labeled)
        (loss * len(labeled)).backward()
        return found

    judge = with_dpo_trainer if case["objective"] in ("dpo", "ipo") else by_hand
    found = judge(model, case, pairs)
    sum(loss for loss, _ in found).backward()
    return {
        "losses": [loss.item() for loss, _ in found],
        "rewards": [rewards for _, rewards in found],
    }


def with_dpo_trainer(model: Any, case: Mapping[str, Any], pairs: Rows) -> list[tuple[Any, Any]]:
    """Return (loss, rewards) of each pair by DPOTrainer."""
    loss_type = "ipo" if case["objective"] == "ipo" else "sigmoid"
    smoothing = case.get("label_smoothing", 0.0)
    if smoothing:
        loss_type = "aot"
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, beta=case.get("beta", 0.1), loss_type=loss_type, label_smoothing=smoothing,
            use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=1, disable_dropout=True,
            gradient_checkpointing=False, max_length=None,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([TEXT]),
            processing_class=make_tokenizer(),
        )
        use_base_as_reference(model)

        found = []
        for pair in pairs:
            loss = trainer.compute_loss(model, trainer.data_collator([dict(pair)]))
            metrics = trainer._metrics["train"]
            rewards = [metrics[f"rewards/{name}"][-1] for name in ("chosen", "rejected")]
            found.append((loss, rewards))
    return found


def with_kto_trainer(
    model: Any, case: Mapping[str, Any], labeled: Rows
) -> tuple[Any, dict[str, Any]]:
    """Return the mean loss of labeled answers by KTOTrainer, and what it reports."""
    desirable, undesirable = case.get("kto_weights", (1.0, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        config = KTOConfig(
            output_dir=folder, beta=case.get("beta", 0.1), desirable_weight=desirable,
            undesirable_weight=undesirable, use_cpu=True, bf16=False, report_to=[],
            per_device_train_batch_size=2, disable_dropout=True, gradient_checkpointing=False,
            max_length=None,
        )  # fmt: skip
        trainer = KTOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(LABELED),
            processing_class=make_tokenizer(),
        )
        use_base_as_reference(model)

        rows = [
            {**row, "KL_completion_ids": labeled[index - 1]["completion_ids"]}
            for index, row in enumerate(labeled)
        ]
        loss = trainer.compute_loss(model, trainer.data_collator(rows))
        metrics = trainer._metrics["train"]
        return loss, {
            "losses": [loss.item()],
            "rewards": [metrics[f"rewards/{name}"][-1] for name in ("chosen", "rejected")],
            "kl": metrics["kl"][-1],
        }


def by_hand(model: Any, case: Mapping[str, Any], pairs: Rows) -> list[tuple[Any, Any]]:
    """Return (loss, rewards) of each pair by the loss functions of ORPOTrainer and CPOTrainer."""
    device = SimpleNamespace(device="cpu")
    found = []
    for pair in pairs:
        means = []
        for name in ("chosen_ids", "rejected_ids"):
            tokens = torch.tensor([pair["prompt_ids"] + pair[name]])
            labels = tokens.clone()
            labels[:, : len(pair["prompt_ids"])] = -100
            logits = model(tokens).logits
            means.append(ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
        if case["objective"] == "orpo":
            owner = SimpleNamespace(beta=case.get("orpo_lambda", 0.1), accelerator=device)
            ratio, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(owner, *means)
            loss = (-means[0] - ratio).mean()
        else:
            owner = SimpleNamespace(
                beta=case.get("beta", 2.0), simpo_gamma=case.get("simpo_gamma", 1.0), alpha=0.0,
                label_smoothing=0.0, loss_type="simpo", accelerator=device,
            )  # fmt: skip
            losses, chosen, rejected, *_ = CPOTrainer.cpo_loss(owner, *means)
            loss = losses.mean()
        found.append((loss, [chosen.item(), rejected.item()]))
    return found


class DoubleTorch:
    """The module ``torch`` for code that asks for float32, which gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def use_double(model: Any) -> None:
    """Make this process compute in float64 throughout.

    The norms and rotations of transformers' Llama and TRL's log-probabilities cast to float32,
    whatever the type of the model.
    """
    for module in (modeling_llama, chunked_logprob):
        vars(module)["torch"] = DoubleTorch()
    torch.Tensor.float = torch.Tensor.double

    model.double()
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRotaryEmbedding):
            module.inv_freq, _ = module.compute_default_rope_parameters(module.config)


def use_base_as_reference(model: Any) -> None:
    """Delete a trainer's copy of the adapter, so that its reference is the model with it off."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the trainers' start, whose texts are not used."""
    words = {f"w{number}": number for number in range(32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2"
    )
