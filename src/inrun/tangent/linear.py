"""Units that are linear in their parameters: the tangent is the unit itself, run with q in place of its parameters.

y = f(a; W) is linear in W for a linear layer (a W^T + b), a convolution, an embedding (rows of W), and the affine part
of a norm (x^ * w + b with x^ the normalised input, which does not depend on w and b).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inrun.tangent.generic import run_again
from inrun.tangent.rules import register_tangent


@register_tangent(
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
)
def linear_in_parameters(
    module: nn.Module, direction: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The module with `direction` for its parameters (zero for those it does not name), on the same input."""
    some = next(iter(direction.values()))
    own = {
        name: direction[name] if name in direction else some.new_zeros(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        return run_again(module, own, args, kwargs)
