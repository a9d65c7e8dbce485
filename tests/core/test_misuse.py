"""Bad input gets a clear error before any harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from inrun import Attributor, InrunError, Ledger, LedgerError, NonFiniteError
from tests.models import class_losses, mlp, vectors


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return class_losses(model, batch).mean()


def setting(**settings: Any) -> tuple[nn.Module, Optimizer, Attributor]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, Attributor(model, optimizer, {"t": vectors(3, 1)}, loss, **settings)


def step(
    model: nn.Module,
    optimizer: Optimizer,
    attributor: Attributor,
    ids: Any = range(4),
    seed: int = 0,
    scale: float = 1.0,
) -> None:
    optimizer.zero_grad()
    with attributor.batch(ids):
        (loss(model, vectors(4, seed)) * scale).backward()
    optimizer.step()


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_ids_than_of_examples(count: int) -> None:
    model, optimizer, attributor = setting()
    with pytest.raises(InrunError, match=rf"{count} ids were given.*\(4, 6\)"):
        step(model, optimizer, attributor, range(count))
    step(model, optimizer, attributor)  # and the run goes on
    assert attributor.step == 1


@pytest.mark.parametrize(
    "ids", [[], [1, "a", 2, 3], [1.5, 2, 3, 4], "abcd", 7, [True, False, True, True], [[1], [2], [3], [4]]]
)
def test_ids_of_no_use(ids: Any) -> None:
    model, optimizer, attributor = setting()
    with pytest.raises(InrunError, match="ids must be"):
        step(model, optimizer, attributor, ids)


def test_ids_of_every_useful_kind() -> None:
    useful: list[Any] = [[0, 1, 2, 3], torch.arange(4), torch.arange(4).numpy(), range(4), ("a", "b", "c", "d")]
    for ids in useful:
        model, optimizer, attributor = setting()
        step(model, optimizer, attributor, ids)
        assert attributor.last is not None
        assert attributor.last.ids == (list(ids) if isinstance(ids, tuple) else [0, 1, 2, 3])


def test_the_same_id_twice_adds_up(tmp_path: Path) -> None:
    model, optimizer, attributor = setting(ledger=tmp_path)
    step(model, optimizer, attributor, ["a", "b", "a", "c"])
    attributor.close()
    assert attributor.last is not None
    values = attributor.last.values["t"]
    found = {row["id"]: row for row in Ledger(tmp_path).values("t").to_dicts()}
    assert found["a"]["value"] == pytest.approx(float(values[0] + values[2]))
    assert (found["a"]["count"], found["b"]["count"]) == (2, 1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_stops_the_run_before_it_moves(scale: float, tmp_path: Path) -> None:
    model, optimizer, attributor = setting(ledger=tmp_path)
    step(model, optimizer, attributor)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient is not finite.*nonfinite='skip'"):
        step(model, optimizer, attributor, scale=scale)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    attributor.discard()
    step(model, optimizer, attributor)
    attributor.close()
    assert Ledger(tmp_path).steps()["step"].to_list() == [1, 2]


def test_or_is_booked_as_skipped(tmp_path: Path) -> None:
    model, optimizer, attributor = setting(ledger=tmp_path, nonfinite="skip")
    step(model, optimizer, attributor)
    good = {n: w.clone() for n, w in model.state_dict().items()}
    step(model, optimizer, attributor, scale=float("nan"))
    assert attributor.last is not None
    assert attributor.last.skipped
    model.load_state_dict(good)
    step(model, optimizer, attributor)
    attributor.close()
    rows = Ledger(tmp_path).steps()
    assert rows["skipped"].to_list() == [False, True, False]
    assert rows["value"].is_null().to_list() == [False, True, False]
    assert Ledger(tmp_path).values("t")["count"].to_list() == [2, 2, 2, 2]


def test_a_target_whose_loss_is_not_finite_is_named() -> None:
    model, optimizer = mlp(), None
    optimizer = SGD(model.parameters(), lr=0.1)
    bad = {"bad": (torch.full((2, 6), float("inf")), torch.zeros(2, dtype=torch.long))}
    with pytest.raises(NonFiniteError, match="target 'bad' is nan on its batch 0"):
        Attributor(model, optimizer, bad, loss)


def detached(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(model, batch).detach()


def constant(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.ones((), requires_grad=True) * 2


@pytest.mark.parametrize(
    ("targets", "of", "says"),
    [
        ({}, loss, "no targets"),
        ({"t": []}, loss, "target 't' has no batches"),
        ({"t": DataLoader([])}, loss, "target 't' has no batches"),  # type: ignore[arg-type]
        ({"t": 5}, loss, "target 't': expected one batch"),
        ({"t": vectors(3, 1)}, detached, "target 't': its loss does not depend"),
        ({"t": vectors(3, 1)}, constant, "target 't': its loss does not depend"),
        ({"t": vectors(3, 1)}, class_losses, "target 't'.*scalar.*shape \\(3,\\)"),
        ({"t": vectors(3, 1)}, lambda m, b: 0.5, "target 't'.*scalar"),
    ],
)
def test_targets_of_no_use(targets: dict[str, Any], of: Callable[..., Any], says: str) -> None:
    model = mlp()
    with pytest.raises(InrunError, match=says):
        Attributor(model, SGD(model.parameters(), lr=0.1), targets, of)


def test_parameters_that_are_not_the_models() -> None:
    model, other = mlp(), nn.Linear(2, 2)
    with pytest.raises(InrunError, match=r"group 1 .*shape \(2, 2\).*not the model's"):
        Attributor(
            model, Adam([{"params": model.parameters()}, {"params": other.parameters()}]), {"t": vectors(3, 1)}, loss
        )


def test_a_frozen_model() -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(InrunError, match="frozen"):
        Attributor(model, SGD(model.parameters(), lr=0.1), {"t": vectors(3, 1)}, loss)


def test_an_unsupported_optimizer() -> None:
    model = mlp()
    with pytest.raises(InrunError, match=r"LBFGS is not supported.*Adam, AdamW.*To add one"):
        Attributor(model, torch.optim.LBFGS(model.parameters()), {"t": vectors(3, 1)}, loss)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scheme": "third"}, "scheme 'third'"),
        ({"nodes": 0}, "nodes=0"),
        ({"scheme": "first", "nodes": 2}, "takes no nodes"),
        ({"momentum": "ignore"}, "momentum='ignore'"),
        ({"scheme": "second", "rule": "gauss"}, "takes no nodes and no rule"),
        ({"rule": "simpson"}, "rule 'simpson'"),
        ({"nodes": "many"}, "nodes='many'"),
        ({"nodes": "adaptive", "rule": "gauss"}, "midpoint rule"),
        ({"nodes": "adaptive", "tolerance": 0.0}, "tolerance=0"),
        ({"nodes": "adaptive", "max_nodes": 0}, "max_nodes=0"),
        ({"audit_permutations": 1}, "audit_permutations=1"),
        ({"memory": "8 GiB"}, "memory='8 GiB'"),
        ({"memory": -1}, "memory=-1"),
        ({"kernel": "magic"}, "kernel='magic'"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore'"),
        ({"audit_every": -1}, "audit_every=-1"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InrunError, match=says):
        setting(**settings)


def test_a_step_without_a_batch() -> None:
    model, optimizer, _ = setting()
    loss(model, vectors(4, 0)).backward()
    with pytest.raises(InrunError, match=r"without a `batch` before it"):
        optimizer.step()


def test_a_batch_without_a_step() -> None:
    model, optimizer, attributor = setting()
    with attributor.batch(range(4)):
        loss(model, vectors(4, 0)).backward()
    optimizer.zero_grad()
    with (
        pytest.raises(InrunError, match=r"no optimizer.step\(\), and the gradients changed"),
        attributor.batch(range(4)),
    ):
        pass
    with pytest.raises(InrunError, match=r"1 `batch` block\(s\) had no optimizer.step"):
        attributor.close()


def test_a_backward_pass_outside_of_the_batches() -> None:
    model, _, attributor = setting()
    with attributor.batch(range(4)):
        loss(model, vectors(4, 0)).backward()
    loss(model, vectors(4, 1)).backward()
    with pytest.raises(InrunError, match="outside of a `batch` block"), attributor.batch(range(4)):
        pass


def test_a_batch_without_a_backward_pass_and_a_step_inside_of_one() -> None:
    model, optimizer, attributor = setting()
    with pytest.raises(InrunError, match="no gradient reached the model"), attributor.batch(range(4)):
        loss(model, vectors(4, 0))
    with attributor.batch(range(4)):
        loss(model, vectors(4, 0)).backward()
        with pytest.raises(InrunError, match="inside the `batch` block"):
            optimizer.step()
    with pytest.raises(InrunError, match="inside of another"), attributor.batch(range(4)), attributor.batch(range(4)):
        pass


def test_a_closure() -> None:
    model, optimizer, attributor = setting()
    with attributor.batch(range(4)):
        loss(model, vectors(4, 0)).backward()
    with pytest.raises(InrunError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_folder_that_holds_another_run(tmp_path: Path) -> None:
    model, optimizer, attributor = setting(ledger=tmp_path)
    step(model, optimizer, attributor)
    attributor.close()
    with pytest.raises(LedgerError, match="another run"):
        setting(ledger=tmp_path)
    with pytest.raises(LedgerError, match="nodes"):
        setting(ledger=tmp_path, resume=True, nodes=3)
    assert Ledger(tmp_path).values("t").height == 4


def test_resuming_without_the_checkpoints_state_doubles_no_step(tmp_path: Path) -> None:
    model, optimizer, attributor = setting(ledger=tmp_path)
    step(model, optimizer, attributor)
    attributor.close()
    model, optimizer, attributor = setting(ledger=tmp_path, resume=True)
    with pytest.raises(LedgerError, match="load_state_dict"):
        step(model, optimizer, attributor)
    assert Ledger(tmp_path).values("t").height == 4


def test_no_disk_space_in_mid_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that is always full takes the place of a part's file; with space again, every row is there once."""
    import inrun.ledger.files as files

    model, optimizer, attributor = setting(ledger=tmp_path)
    step(model, optimizer, attributor)
    attributor.flush()
    step(model, optimizer, attributor, seed=1)
    with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as full:
        patch.setattr(files, "open_temp", lambda _: full)
        with pytest.raises(LedgerError, match="No space left on device"):
            attributor.flush()
    step(model, optimizer, attributor, seed=2)
    attributor.close()
    assert Ledger(tmp_path).values("t")["count"].to_list() == [3, 3, 3, 3]
