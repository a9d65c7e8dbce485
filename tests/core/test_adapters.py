"""Fine-tuning: adapters on a frozen model, and models that are frozen in part.

Values are held against <g_i, q>, with g_i by one backward pass each and q from the optimizer's real moves
(tests/zoo/check.py).
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import VOCABULARY
from tests.reference import contracted, reference_direction
from tests.zoo.check import PAIRED, Scheme, largest_error
from tests.zoo.entry import SIZES, Entry, Inputs, but, hugging_face, mean_over_tokens, padded, texts

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"),
]

LLAMA = hugging_face("llama", "CausalLM", **SIZES)
GPT2 = hugging_face(
    "gpt2", "CausalLM", vocab_size=VOCABULARY, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip
SOME = ["q_proj", "v_proj", "down_proj"]
EXAMPLES = 4


def adapted(config: peft.PeftConfig, base: Callable[[], nn.Module] = LLAMA) -> Callable[[], nn.Module]:
    """The frozen base with an adapter that has been trained for a while: nothing in it is zero."""

    def build() -> nn.Module:
        model: nn.Module = peft.get_peft_model(base(), copy.deepcopy(config)).train()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        return model

    return build


def lora(**settings: Any) -> peft.LoraConfig:
    defaults: dict[str, Any] = {"r": 3, "target_modules": SOME, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(defaults | settings))


def after_the_prompt(model: nn.Module, batch: Inputs) -> Tensor:
    """Each example's loss, where virtual tokens may stand before its own: [examples]. What is random repeats itself."""
    torch.manual_seed(0)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    logits = model(**batch, use_cache=False).logits[:, -ids.shape[1] : -1]
    return mean_over_tokens(logits, ids[:, 1:], None if mask is None else mask[:, 1:])


def entry(build: Callable[[], nn.Module], batch: Callable[[int, int], Inputs] = texts) -> Entry:
    return Entry(build, batch, after_the_prompt, "adapter", EXAMPLES)


LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "LoRA": entry(adapted(lora())),
    "LoRA, padded batches": entry(adapted(lora()), batch=padded),
    "LoRA, rank-stabilised, on every layer": entry(adapted(lora(target_modules="all-linear", use_rslora=True))),
    "LoRA on GPT-2's Conv1D": entry(adapted(lora(target_modules=["c_attn"], fan_in_fan_out=True), GPT2)),
    "LoRA with biases": entry(adapted(lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"), GPT2)),
    "LoRA, dropout": entry(adapted(lora(lora_dropout=0.3))),
    "LoRA, the head trained whole": entry(adapted(lora(modules_to_save=["lm_head"]))),
    "LoRA, embedding and norm trained whole": entry(adapted(lora(modules_to_save=["embed_tokens", "norm"]))),
    "LoRA on the embedding": entry(adapted(lora(target_modules=["embed_tokens", "q_proj"]))),
    "LoRA, some tokens trained": entry(adapted(lora(trainable_token_indices=[3, 5]))),
    "DoRA": entry(adapted(lora(use_dora=True))),
    "OFT": entry(adapted(peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], **LM))),
    "norms": entry(adapted(peft.LNTuningConfig(target_modules=["ln_1", "ln_2"], **LM), GPT2)),
    "prompt tuning": entry(adapted(peft.PromptTuningConfig(num_virtual_tokens=3, **LM))),
    "p-tuning": entry(
        adapted(peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **LM)),
    ),
    "prefix tuning": entry(adapted(peft.PrefixTuningConfig(num_virtual_tokens=3, **LM))),
    "LLaMA-Adapter": entry(adapted(peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **LM))),
    "IA3": entry(
        adapted(peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **LM)),
    ),
    "VeRA": entry(adapted(peft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"], **LM))),
    "AdaLoRA": entry(adapted(peft.AdaLoraConfig(total_step=100, init_r=4, target_r=2, target_modules=SOME, **LM))),
    "LoHa": entry(adapted(peft.LoHaConfig(r=3, target_modules=SOME, **LM))),
    "LoKr": entry(adapted(peft.LoKrConfig(r=3, target_modules=SOME, **LM))),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("scheme", "kind", "kernel"), PAIRED)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, scheme: Scheme, kind: type[Optimizer], kernel: Kernel) -> None:
    # what makes virtual tokens is lifted to the whole model, whose norms compute in single precision
    assert largest_error(ADAPTERS[name], scheme, kind, kernel) < (
        1e-6 if name in ("prompt tuning", "p-tuning") else 1e-8
    )


def trained_alone(*parts: str, base: Callable[[], nn.Module] = LLAMA) -> Callable[[], nn.Module]:
    """Only the parameters are trained whose names hold one of these strings."""

    def build() -> nn.Module:
        model = base()
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in parts))
        return model

    return build


FROZEN_IN_PART = {
    "all but the embedding": but(LLAMA, "embed_tokens"),
    "all but the first block": but(LLAMA, "layers.0."),
    "the head": trained_alone("lm_head"),
    "the last block": trained_alone("layers.1."),
    "the first block": trained_alone("layers.0."),
    "biases": trained_alone("bias", base=GPT2),
    "a norm in the middle": trained_alone("layers.1.input_layernorm"),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("scheme", "kind", "kernel"), PAIRED)
@pytest.mark.parametrize("name", FROZEN_IN_PART)
def test_frozen_in_part(name: str, scheme: Scheme, kind: type[Optimizer], kernel: Kernel) -> None:
    assert largest_error(entry(FROZEN_IN_PART[name]), scheme, kind, kernel) < 1e-8


@pytest.mark.usefixtures("float64")
def test_what_the_optimizer_does_not_hold_does_not_count() -> None:
    """All parameters have a gradient, and those of the last block alone are moved: they are what the values are of."""
    found = entry(LLAMA)
    torch.manual_seed(0)
    model, target, batch = found.build(), found.batch(3, 90), found.batch(EXAMPLES, 0)
    optimizer = SGD(model.get_submodule("model.layers.1").parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": target}, found.loss, scheme="first") as attributor:
        g = per_example_gradients(model, found.parts(batch, EXAMPLES))
        with attributor.batch(range(EXAMPLES)):
            found.loss(model, batch).backward()
        assert all(p.grad is not None for p in model.parameters())
        moved = reference_direction(model, optimizer, found.at(target), "first", 1)
        everything = reference_direction(model, SGD(model.parameters(), lr=0.1), found.at(target), "first", 1)
        optimizer.step()
    assert attributor.last is not None
    torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, moved), rtol=1e-8, atol=0)
    assert not torch.allclose(contracted(model, g, everything), contracted(model, g, moved), rtol=0.1)


@pytest.mark.parametrize("kernel", ["auto", "tangent"])
@pytest.mark.parametrize("name", ["LoRA", "LoRA, the head trained whole", "prefix tuning"])
def test_nothing_is_captured_of_what_is_frozen(name: str, kernel: Kernel) -> None:
    """Hooks are on the model and on the modules that own trained parameters, and calls of these alone are kept."""
    found = ADAPTERS[name]
    torch.manual_seed(0)
    model = found.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-2)
    owners = {m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
    assert 0 < len(owners) < sum(1 for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with Attributor(model, optimizer, {"t": found.batch(3, 90)}, found.loss, kernel=kernel) as attributor:
        with attributor.batch(range(EXAMPLES)) as microbatch:
            found.loss(model, found.batch(EXAMPLES, 0)).backward()
            hooked = {m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks}
            assert hooked == {*owners, model}
            assert not any(p._backward_hooks for p in model.parameters() if not p.requires_grad)
        kept = {call.unit.module for call in microbatch.captured.calls}
        assert kept == owners if kernel == "tangent" else kept <= owners
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def by_autograd(model: nn.Module) -> Tensor:
    """What the values of the first step are by plain autograd, with `first` under SGD at 0.1: [EXAMPLES]."""
    found = entry(lambda: model)
    batch, target = found.batch(EXAMPLES, 0), found.batch(3, 90)
    g = per_example_gradients(model, found.parts(batch, EXAMPLES))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found.loss(model.eval(), target), trained)
    return contracted(model, g, {p: 0.1 * of for p, of in zip(trained, gradients, strict=True)})


def values_of(model: nn.Module, scheme: Scheme, kernel: Kernel) -> Tensor:
    """The values of the first step: [EXAMPLES]."""
    found = entry(lambda: model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=0.1) if scheme == "first" else AdamW(trained, lr=1e-3)
    with Attributor(
        model, optimizer, {"t": found.batch(3, 90)}, found.loss, scheme=scheme, kernel=kernel
    ) as attributor:
        with attributor.batch(range(EXAMPLES)):
            found.loss(model, found.batch(EXAMPLES, 0)).backward()
        optimizer.step()
    assert attributor.last is not None
    return attributor.last.values["t"]


@pytest.mark.parametrize("kernel", ["auto", "tangent"])
def test_a_base_in_bfloat16(kernel: Kernel) -> None:
    """Adapters in float32 on a frozen base in bfloat16: within 5% of the same weights in float32, by autograd."""
    torch.manual_seed(0)
    rounded = LLAMA().to(torch.bfloat16)
    build = adapted(lora(), lambda: copy.deepcopy(rounded))
    torch.manual_seed(1)
    mixed = build()
    assert {p.dtype for p in mixed.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in mixed.parameters() if not p.requires_grad} == {torch.bfloat16}
    whole = copy.deepcopy(mixed).float()
    assert relative(values_of(mixed, "first", kernel), by_autograd(whole)) < 0.05


def test_a_quantised_base() -> None:
    """tests/core/quantised.py, in a process of its own: torchao, in a folder of its own, warns wherever it is seen."""
    apart = Path(sys.prefix) / "apart"
    if not (apart / "torchao").exists():
        pytest.skip("torchao is not installed: make setup")
    path = os.pathsep.join([str(apart), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/core/quantised.py"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
