"""What several processes do that values cannot follow is refused, and nothing is sent before the first batch.

The processes are torch's fake ones: this is the first of two, and the other is not there.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import inrun
from inrun import Attributor, InrunError
from tests.models import CASES

case = CASES["mlp"]


@pytest.fixture(autouse=True)
def two_processes() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def attach(model: nn.Module, optimizer: Any = None, **settings: Any) -> Attributor:
    optimizer = torch.optim.AdamW(model.parameters()) if optimizer is None else optimizer
    return Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss, **settings)


def sharded() -> Any:
    return fully_shard(case.build(), mesh=init_device_mesh("cpu", (2,)))


def test_a_model_that_nobody_wrapped() -> None:
    with pytest.raises(
        InrunError, match="2 processes, but the model is neither in DistributedDataParallel nor sharded"
    ):
        attach(case.build())


def test_tensor_parallel_weights() -> None:
    model = parallelize_module(case.build(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(InrunError, match=r"0\.weight is laid out as \(Shard\) .*tensor and pipeline parallel runs"):
        attach(model)


def test_shards_of_tensor_parallel_weights() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(case.build(), mesh["tensor"], {"0": ColwiseParallel(), "3": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(InrunError, match="tensor and pipeline parallel runs cannot be valued"):
        attach(model)


def test_shards_over_some_of_the_processes() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stages", "data"))
    model = case.build()
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(InrunError, match="is shared out over 1 of 2 processes: runs in which the processes differ"):
        attach(model)


def test_replicas_on_some_of_the_processes() -> None:
    model = DistributedDataParallel(case.build(), process_group=dist.new_group([0]))
    with pytest.raises(InrunError, match="in DistributedDataParallel over 1 of 2 processes"):
        attach(model)


def test_norms_over_all_processes() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    replicas = DistributedDataParallel(model)  # which takes the other kind on a GPU only
    model[1] = nn.SyncBatchNorm(9)
    with pytest.raises(InrunError, match="1: SyncBatchNorm mixes the examples of all processes"):
        attach(replicas)


def test_data_parallel() -> None:
    with pytest.raises(InrunError, match="a model in DataParallel cannot be valued"):
        attach(nn.DataParallel(case.build()))


def test_a_wrapper_that_does_not_hold_the_model() -> None:
    with pytest.raises(InrunError, match="within= is no DistributedDataParallel that holds the model"):
        attach(case.build(), within=DistributedDataParallel(case.build()))


def test_trained_parameters_beside_the_shards() -> None:
    model = case.build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model.get_parameter("3.bias")})
    with pytest.raises(InrunError, match=r"3\.bias: it is trained, but not sharded"):
        attach(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentum": "credit"}, "momentum='credit' is for one process"),
        ({"audit_every": 1, "audit_permutations": 10}, "audit_permutations= plays a step's game on one process"),
        ({"kernel": "ghost", "scheme": "first"}, "kernel='ghost' .* on one process"),
    ],
)
def test_settings_of_one_process(settings: dict[str, Any], said: str) -> None:
    model = DistributedDataParallel(case.build())
    with pytest.raises(InrunError, match=said):
        attach(model, torch.optim.SGD(model.parameters()), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "second"}, "scheme='second' needs whole weights"),
        ({"kernel": "perexample"}, "kernel='perexample' needs whole weights"),
    ],
)
def test_settings_of_whole_weights(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InrunError, match=said):
        attach(sharded(), **settings)


def test_an_optimizer_of_whole_matrices() -> None:
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(InrunError, match="Muon moves whole matrices, and fully_shard has cut the weights"):
        attach(model, torch.optim.Muon(model.parameters()))


def test_an_optimizer_in_the_backward_pass() -> None:
    model = sharded()
    model.get_parameter("3.bias").register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InrunError, match=r"3\.bias: a hook runs when its gradient is there"):
        attach(model)


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded()
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(InrunError, match=r"from torch 2\.13 on; this is 2\.12\.1"):
        attach(model)


def test_gradients_divided_in_two_ways() -> None:
    model = case.build()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.get_submodule("0"), mesh=mesh).set_gradient_divide_factor(1.0)
    fully_shard(model, mesh=mesh)
    with pytest.raises(InrunError, match="divided by different numbers"):
        _ = attach(model)._processes.share


@pytest.mark.parametrize(
    "wrap", [DistributedDataParallel, lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (2,)))]
)
def test_nothing_is_sent_by_constructor_close_and_destructor(
    wrap: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = wrap(case.build())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was sent")

    sends = [
        name for name in dir(dist) if re.match("all_|broadcast|reduce|barrier|new_group|gather|scatter|send|recv", name)
    ]
    assert "all_reduce" in sends
    for name in sends:
        monkeypatch.setattr(dist, name, refuse)
    attributor = attach(model, ledger=tmp_path / "run")
    attributor.close()
    del attributor


def test_torch_distributed_is_called_in_one_file() -> None:
    source = Path(inrun.__file__).parent
    found = [path.name for path in source.rglob("*.py") if re.search(r"torch\.distributed|\bdist\.", path.read_text())]
    assert found == ["parallel.py"]
