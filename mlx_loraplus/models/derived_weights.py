"""Arrays that a model of mlx-lm computes from its weights once and keeps.

They are out of date as soon as a weight changes: after a step of training, or when an adapter is
loaded. Only Kimi K3 has such arrays: products of weights, and a compiled step of decoding that
contains the weights.
"""

import mlx.nn as nn

_DERIVED = ("_attn_res_w_eff", "_mlp_res_w_eff", "_output_res_w_eff", "_step")


def start_inference(model: nn.Module) -> None:
    """Switch a model to inference, with derived arrays that match its present weights."""
    forget_derived(model)
    model.eval()


def forget_derived(model: nn.Module) -> None:
    """Make a model compute its derived arrays again when it is called next."""
    for module in model.modules():
        for name in _DERIVED:
            if hasattr(module, name):
                setattr(module, name, None)
