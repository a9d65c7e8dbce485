"""The two checks: a use of a parameter that was not seen is an error that names it, and the accounts add up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor, ConservationError, InrunError, Ledger
from inrun.kernels import Kernel
from inrun.units import Units, groups_of
from tests.models import CASES, GPT, VOCABULARY, class_losses, mlp, tokens, vectors


class Hidden(nn.Module):
    """Uses the weight of a layer without calling it, as some attention and state-space modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.as_tensor(self.seen(x)))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return class_losses(model, batch).mean()


def hidden_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """With two parameters read outside of the model's forward."""
    unseen: Any = model.unseen
    return F.cross_entropy(F.linear(model(batch[0]), unseen.weight, unseen.bias), batch[1])


def attributed_step(
    model: nn.Module, loss: Callable[[], Tensor], target: Callable[[nn.Module, Any], Tensor] = mean_loss
) -> None:
    optimizer = SGD(model.parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": vectors(3, 1)}, target) as attributor:
        with attributor.batch(range(4)):
            loss().backward()
        optimizer.step()


def test_a_parameter_read_outside_of_the_model_is_named() -> None:
    model = Hidden()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ConservationError, match=r"unseen\.weight, unseen\.bias.*F\.linear.*freeze"):
        attributed_step(model, lambda: hidden_losses(model, vectors(4, 0)), hidden_losses)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # before any harm


def used_twice(model: GPT, batch: Tensor, unseen: bool) -> Tensor:
    """A loss that reads two weights once more, past their modules, among as many others as in a real model."""
    logits = model(batch[:, :-1]).float()
    if unseen:
        mlp: Any = model.h[0].mlp
        x = F.pad(logits, (0, 64 - VOCABULARY))
        for weight in (mlp[0].weight, mlp[2].weight):
            x = torch.tanh(F.linear(x, weight.float()))
        logits = logits + x[..., :VOCABULARY]
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])


@pytest.mark.parametrize(("kernel", "kind"), [("tangent", AdamW), ("perexample", AdamW), ("ghost", SGD)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unseen_use_stands_out_of_half_precisions_rounding(
    dtype: torch.dtype, kernel: Kernel, kind: type[Optimizer]
) -> None:
    """Within a few steps; and with no unseen use none is found."""
    for unseen in (False, True):
        torch.manual_seed(0)
        model = GPT(width=64, heads=4, positions=40).to(dtype)
        # eps: the default is zero in float16
        settings: dict[str, Any] = {"eps": 1e-4} if kind is AdamW else {}
        optimizer = kind(model.parameters(), lr=1e-3, **settings)  # type: ignore[call-arg]
        scheme: Any = "first" if kind is SGD else "path"
        attributor = Attributor(model, optimizer, {"t": tokens(4, 90, 33)}, float_loss, scheme=scheme, kernel=kernel)
        problem = None
        for step in range(5):
            with attributor.batch(range(8)):
                used_twice(model, tokens(8, step, 33), unseen).backward()
            try:
                optimizer.step()
            except ConservationError as error:
                problem = problem or error
                attributor.discard()
            optimizer.zero_grad()
        assert (problem is not None) == unseen
        assert not unseen or "mlp" in str(problem)


def float_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.as_tensor(F.cross_entropy(model(batch[:, :-1]).float().transpose(1, 2), batch[:, 1:]))


def test_a_gradient_whose_square_is_no_number_of_float16() -> None:
    model = nn.Linear(6, 3).half()
    optimizer = SGD(model.parameters(), lr=1e-6)
    batch = vectors(4, 0)[0].half()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.as_tensor((1000 * model(batch).float()).mean())

    kernels: list[Kernel] = ["tangent", "perexample"]
    for kernel in kernels:
        attributor = Attributor(model, optimizer, {"t": batch}, loss, scheme="first", kernel=kernel)
        with attributor.batch(range(4)):
            loss(model, batch).backward()
        assert model.weight.grad is not None
        assert float(model.weight.grad.norm(dtype=torch.float32)) > 256
        optimizer.step()
        optimizer.zero_grad()
        attributor.close()


def test_a_penalty_on_the_weights_in_the_loss_is_named() -> None:
    model = mlp()
    with pytest.raises(ConservationError, match=r"\b0\.weight.*penalty"):
        attributed_step(
            model, lambda: class_losses(model, vectors(4, 0)).mean() + 0.1 * next(model.parameters()).square().sum()
        )


def test_gradients_that_were_not_zeroed_are_found() -> None:
    model = mlp()
    class_losses(model, vectors(4, 5)).mean().backward()
    with pytest.raises(ConservationError, match="not zeroed"):
        attributed_step(model, lambda: class_losses(model, vectors(4, 0)).mean())


def test_noise_on_the_gradient_is_refused() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())
    with attributor.batch(range(4)):
        class_losses(model, vectors(4, 0)).mean().backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(torch.randn_like(p.grad))
    with pytest.raises(InrunError, match="more than clipping or scaling"):
        optimizer.step()


def test_a_batch_overwritten_before_the_step_is_refused() -> None:
    """A loop that loads the next batch into the same memory would have its values computed on the wrong inputs."""
    case = CASES["gpt"]
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss)
    memory = case.batch(4, 0)
    with attributor.batch(range(4)):
        case.loss(model, memory).backward()
    memory.copy_(case.batch(4, 1))
    with pytest.raises(InrunError, match=r"^wte: an input of this module was changed in place"):
        optimizer.step()


def test_tied_weights_are_one_group_and_others_stand_alone() -> None:
    model = GPT()
    units = Units(model, {p: n for n, p in model.named_parameters()}).all
    tied = [g for g in groups_of(units) if len(g.units) > 1]
    assert [sorted(u.name for u in g.units) for g in tied] == [["lm_head", "wte"]]
    assert sum(len(g.units) for g in groups_of(units)) == len(units)


def test_the_accounts_add_up_to_the_real_loss_drop(tmp_path: Path) -> None:
    """Audited at every step on one fixed target batch, the drops are the target's loss from first to last."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.5)
    target = case.batch(6, 99)
    with torch.no_grad():
        first = float(case.loss(model, target))
    with Attributor(model, optimizer, {"t": target}, case.loss, nodes=3, ledger=tmp_path, audit_every=1) as attributor:
        for step in range(30):
            with attributor.batch(range(8)):
                case.loss(model, case.batch(8, step % 3)).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        last = float(case.loss(model, target))
    books = Ledger(tmp_path).steps("t")
    assert books["loss_before"][0] == pytest.approx(first, abs=1e-6)
    assert books["loss_after"][-1] == pytest.approx(last, abs=1e-6)
    assert books["loss_after"][:-1].to_list() == pytest.approx(books["loss_before"][1:].to_list(), abs=1e-6)
    total = {name: float(books[name].sum()) for name in ("value", "momentum", "decay", "unexplained")}
    assert sum(total.values()) == pytest.approx(first - last, abs=1e-5)
    assert abs(total["unexplained"]) < 0.05 * abs(first - last)
    assert all(abs(total[name]) > 1e-4 for name in ("momentum", "decay"))
    assert books["conservation"].max() < 1e-6  # type: ignore[operator]


def test_a_move_other_than_the_displacement_is_found() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())

    def also_shrink(*_: object) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(0.9)

    # a hook that runs between the attributor's two, as another library's would
    optimizer.register_step_pre_hook(also_shrink)
    with attributor.batch(range(4)):
        class_losses(model, vectors(4, 0)).mean().backward()
    with pytest.raises(InrunError, match=r"^0\.weight: the optimizer moved this parameter otherwise"):
        optimizer.step()
