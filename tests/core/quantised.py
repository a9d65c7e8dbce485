"""Adapters on a base whose weights are quantised by torchao; run by test_adapters.py."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from inrun.kernels import Kernel
from tests.core.test_adapters import LLAMA, adapted, by_autograd, lora, relative, values_of
from tests.zoo.check import Scheme


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("kernel", ["auto", "tangent"])
def test_a_quantised_base(kernel: Kernel) -> None:
    """LoRA on weights in int8: as by per-example autograd, and as on the same weights written out in float32."""
    torch.manual_seed(0)
    base = LLAMA().requires_grad_(False)
    for block in base.get_submodule("model.layers").children():
        quantize_(block, Int8WeightOnlyConfig())
    written = copy.deepcopy(base)
    for m in written.modules():
        if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter:
            m.weight = nn.Parameter(m.weight.dequantize(), requires_grad=False)
    both = []
    for model in (base, written):
        torch.manual_seed(1)
        both.append(adapted(lora(), partial(copy.deepcopy, model))())
    quantised, plain = both
    kinds = {type(p.data).__name__ for p in quantised.parameters() if not p.requires_grad}
    assert "Int8Tensor" in kinds
    schemes: tuple[Scheme, ...] = ("first", "path")
    for scheme in schemes:
        values = values_of(copy.deepcopy(quantised), scheme, kernel)
        assert relative(values, values_of(copy.deepcopy(plain), scheme, kernel)) < 1e-3
    assert relative(values_of(copy.deepcopy(quantised), "first", kernel), by_autograd(quantised)) < 1e-4
