"""Load adapters with vLLM's own code, on a CPU; ``check_vllm`` starts this in the judge's Python.

Of vLLM run: its config, its model class, its loader of weights, and ``WorkerLoRAManager``, which
checks, loads, packs and activates the adapter. No forward pass runs, so no kernel. The kernel that
a block of experts holds needs a GPU to be built; a placeholder stands for it.

What is compared are weights, in vLLM's own layout. vLLM loads the base, and the base with the
adapter merged by PEFT. In every parameter of the model, the difference of the two has to be B A of
the adapter that vLLM has loaded: a tensor that vLLM drops, or takes for another layer, is found.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest.mock import patch

import torch

try:
    import torchvision  # noqa: F401  vLLM and PEFT import it for image processors
except RuntimeError:  # if it was built for CUDA, and torch was not
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)

from peft import PeftModel
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import (
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import (
    LoRAExpertsMixin,
)
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEKernelModularImpl,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

PEFT = run_path(str(Path(__file__).with_name("check_peft")))
RANK = 32  # --max-lora-rank
TOWERS = ("vision", "visual", "multi_modal")  # weights that are left at zero
PACKAGES = ("vllm", "torch", "transformers", "peft")
# What the config.json of released checkpoints has, and that of our tiny models lacks.
FIELDS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"topk_method": "noaux_tc"},
    "lfm2": {"conv_dim": 64},
}


def make(work: Path) -> None:
    """Make the tiny models of check_peft that models.json names."""
    names = json.loads((work / "models.json").read_text())
    PEFT["judge_make"](work, {name: PEFT["TINY"][name] for name in names}, [])


def merge(work: Path) -> None:
    """Write each base with its adapter merged by PEFT."""
    for number, case in enumerate(json.loads((work / "cases.json").read_text())):
        base = PEFT["judge_load"](case["base"])

        # PEFT changes a tied head and its embeddings one after the other, so untie them meanwhile.
        head = base.get_output_embeddings()
        is_tied = head.weight is base.get_input_embeddings().weight
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        merged = PeftModel.from_pretrained(base, case["adapter"]).merge_and_unload()
        if is_tied:
            merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
        merged.save_pretrained(work / f"merged{number}")


class Placeholder:
    """A kernel of experts that is never run."""

    is_monolithic = False
    prepare_finalize = None

    def __init__(self, moe_config: Any) -> None:
        self.moe_config = moe_config
        self.impl = object.__new__(FusedMoEKernelModularImpl)
        self.fused_experts = LoRAExpertsMixin()

    def supports_lora(self) -> bool:
        """Return what vLLM's kernels for CUDA return."""
        return True


def load(work: Path) -> None:
    """Load each adapter into vLLM's model of its base, and write down what came of it."""
    with patch("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect()):
        rows = []
        for number, case in enumerate(json.loads((work / "cases.json").read_text())):
            row = {key: case[key] for key in ("model", "kind", "case", "notes")}
            row |= attempt(case, str(work / f"merged{number}"), mixed=False)
            if "enable_mixed_moe_lora_format" in (row["error"] or ""):
                found = attempt(case, str(work / f"merged{number}"), mixed=True)
                row["mixed"] = {key: found.get(key) for key in ("error", "difference")}
            rows.append(row)
    (work / "rows.json").write_text(json.dumps(rows))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    (work / "versions.json").write_text(json.dumps(versions))


def attempt(case: dict[str, Any], merged: str, *, mixed: bool) -> dict[str, Any]:
    """Return what came of loading one adapter."""
    config = vllm_config(case, mixed=mixed)
    plain = load_model(config, case["base"])
    found: dict[str, Any] = {"class": type(plain).__name__, "error": None}
    adapted, target = load_model(config, case["base"]), load_model(config, merged)
    worker = make_worker(config, adapted)
    found["modules"] = expected_modules(worker._adapter_manager)
    try:
        worker.add_adapter(LoRARequest("ours", 1, case["adapter"], is_3d_lora_weight=mixed))
    except (AssertionError, RuntimeError, ValueError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    return found | compare(plain, target, changes_in(worker))


def compare(
    plain: torch.nn.Module, target: torch.nn.Module, changes: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return how vLLM's changes of a model differ from those that PEFT merged."""
    merged = dict(target.named_parameters())
    wanted = {name: merged[name] - weight for name, weight in plain.named_parameters()}

    # A parameter can have several names, such as those of tied embeddings.
    first = {weight: name for name, weight in plain.named_parameters()}
    names = {name: first[weight] for name, weight in plain.named_parameters(remove_duplicate=False)}
    apart = dict(wanted)
    for name, change in changes.items():
        apart[names[name]] = wanted[names[name]] - change

    sizes = {name: change.abs().max().item() for name, change in apart.items()}
    largest = max(change.abs().max().item() for change in wanted.values())
    worst = max(sizes, key=sizes.__getitem__)
    found = {"difference": sizes[worst] / largest, "most_different": worst}
    return found | {"changed": len(changes), "parameters": len(wanted)}


def vllm_config(case: dict[str, Any], *, mixed: bool) -> Any:
    """Return vLLM's config to serve a model with LoRA."""
    arguments = EngineArgs(
        model=case["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=RANK,
        enable_mixed_moe_lora_format=mixed,
        hf_overrides=FIELDS.get(case["model"], {}),
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        cleanup_dist_env_and_memory()
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        initialize_model_parallel()
    return config


def load_model(config: Any, folder: str) -> torch.nn.Module:
    """Build vLLM's model and load the weights of a folder into it."""
    config.compilation_config.static_forward_context.clear()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    tensors = {
        name: tensor for name, tensor in tensors.items() if not any(part in name for part in TOWERS)
    }

    with set_current_vllm_config(config), set_default_torch_dtype(torch.float32), torch.no_grad():
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.zero_()
        model.load_weights(iter(tensors.items()))
    return model


def make_worker(config: Any, model: torch.nn.Module) -> Any:
    """Return vLLM's loader of adapters for a model."""
    for module in model.modules():
        if isinstance(module, MoERunner):
            module.routed_experts.quant_method.moe_kernel = Placeholder(module.moe_config)
    with set_current_vllm_config(config):
        worker = WorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        worker.create_lora_manager(model, config)
    return worker


def expected_modules(manager: Any) -> list[str]:
    """Return the last parts of the names of the layers, except experts, that vLLM adapts."""
    expected: set[str] = set()
    for module in manager.supported_lora_modules:
        expected |= set(manager.packed_modules_mapping.get(module, [module]))
    return sorted(name for name in expected if not name.startswith("experts"))


def changes_in(worker: Any) -> dict[str, torch.Tensor]:
    """Return parameter → B A of the adapter that vLLM has loaded."""
    changes: dict[str, torch.Tensor] = {}
    for path, module in worker._adapter_manager.modules.items():
        # When the base is loaded, vLLM splits this weight, and decodes with the parts.
        if not path.endswith(".kv_b_proj"):
            changes |= changes_of(path, module)
    return changes


def changes_of(path: str, module: Any) -> dict[str, torch.Tensor]:
    """Return parameter → B A for the parameters of a layer that an adapter changes."""
    if isinstance(module, FusedMoEWithLoRA):
        experts = f"{path}.routed_experts"
        found = {
            f"{experts}.w13_weight": products(module.w13_lora_a_stacked, module.w13_lora_b_stacked),
            f"{experts}.w2_weight": products(module.w2_lora_a_stacked, module.w2_lora_b_stacked),
        }
    elif isinstance(module, VocabParallelEmbeddingWithLoRA):
        found = {f"{path}.weight": module.lora_a_stacked[0] @ module.lora_b_stacked[0, 0].T}
    elif isinstance(module, LogitsProcessorWithLoRA):
        found = {f"{path}.weight": module.lora_b_stacked[0, 0] @ module.lora_a_stacked[0, 0]}
    else:
        found = {f"{path}.weight": products(module.lora_a_stacked, module.lora_b_stacked)[0]}
    return {name: change for name, change in found.items() if change.any()}


def products(all_a: Any, all_b: Any) -> torch.Tensor:
    """Return B A of the adapter in the first slot, for layers that vLLM has joined by their rows."""
    return torch.cat([b[0] @ a[0] for a, b in zip(all_a, all_b, strict=True)], dim=1)


if __name__ == "__main__":
    {"make": make, "merge": merge, "load": load}[sys.argv[1]](Path(sys.argv[2]))
