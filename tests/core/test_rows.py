"""Whose rows are whose, where sizes alone would mislead."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from inrun import Attributor, InrunError
from inrun.oracle import per_example_gradients
from inrun.rows import Rows, find_rows, shuffled
from tests.models import CASES, Case, class_losses, vectors
from tests.reference import contracted, reference_direction

ORDER = shuffled(4)


def test_the_second_run_has_every_example_out_of_place_and_one_more() -> None:
    assert ORDER.tolist() == [3, 0, 1, 2, 0]
    assert shuffled(1).tolist() == [0, 0]


def test_rows_are_found_by_growth_not_by_size() -> None:
    """[4, 4] of four examples: the dimension that grew is theirs."""
    x = torch.randn(4, 4)
    assert find_rows(x, x[ORDER], ORDER, 4, "unit") == Rows(2, 0)
    assert find_rows(x, x[:, ORDER], ORDER, 4, "unit") == Rows(2, 1)
    assert find_rows(x, x, ORDER, 4, "unit") == Rows(2, None)


def test_merged_rows_are_told_apart_by_their_values() -> None:
    x = torch.randn(4, 3, 2)
    blocks, strided = x.reshape(12, 2), x.transpose(0, 1).reshape(12, 2)
    again = x[ORDER]
    assert find_rows(blocks, again.reshape(15, 2), ORDER, 4, "unit") == Rows(2, 0, merged=True)
    found = find_rows(strided, again.transpose(0, 1).reshape(15, 2), ORDER, 4, "unit")
    assert found == Rows(2, 0, merged=True, blocks=False)
    torch.testing.assert_close(Rows(2, 0, merged=True).per_example(blocks, 4), x.reshape(4, -1))
    torch.testing.assert_close(found.per_example(strided, 4), x.reshape(4, -1))


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(InrunError, match=r"unit: .*merges.*order"):
        find_rows(torch.zeros(12, 2), torch.zeros(15, 2), ORDER, 4, "unit")
    x = torch.randn(4, 3)
    with pytest.raises(InrunError, match=r"unit: cannot tell.*mixed, reordered"):
        find_rows(x, x[ORDER].flip(0), ORDER, 4, "unit")


def attribute(model: nn.Module, examples: int = 4, steps: int = 1) -> Attributor:
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())
    for step in range(steps):
        with attributor.batch(range(examples)):
            class_losses(model, vectors(examples, step)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return attributor


class SharedNoise(nn.Module):
    """Drops out a tensor that all examples share: giving every example its own would change the training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.offset, self.drop = nn.Linear(6, 3), nn.Embedding(1, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.drop(self.offset(torch.zeros(1, dtype=torch.long)))
        logits: Tensor = self.layer(x) + shared
        return logits


def test_where_an_expansion_would_change_training_the_module_around_it_is_the_unit(float64: None) -> None:
    model = SharedNoise()
    optimizer = SGD(model.parameters(), lr=0.1)
    case = Case(SharedNoise, vectors, class_losses)
    with Attributor(model, optimizer, {"t": vectors(3, 1)}, case.loss, scheme="first") as attributor:
        for step in range(3):
            torch.manual_seed(step)
            g = per_example_gradients(model, case.parts(vectors(4, step), 4))
            torch.manual_seed(step)
            optimizer.zero_grad()
            with attributor.batch(range(4)):
                case.loss(model, vectors(4, step)).backward()
            q = reference_direction(model, optimizer, case.at(vectors(3, 1)), "first", 1)
            optimizer.step()
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-9, atol=1e-12)


def test_a_unit_called_outside_of_the_models_forward_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, lambda m, b: class_losses(m, b).mean())
    with (
        pytest.raises(InrunError, match=r"^0 was called outside of the model's own forward"),
        attributor.batch(range(4)),
    ):
        class_losses(model[0], vectors(4, 0)).mean().backward()


class TimeMajor(nn.Module):
    """Takes its batch in the second dimension, as PyTorch's recurrent layers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 5), nn.Linear(5, 3)

    def forward(self, x_TBD: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x_TBD)[0][-1])
        return logits


def test_another_batch_dimension_can_be_said() -> None:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return class_losses(model, (batch[0].expand(3, -1, -1), batch[1]))

    case = Case(TimeMajor, vectors, losses)
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Attributor(model, optimizer, {"t": vectors(3, 1)}, case.loss, batch_dim=1) as attributor:
        with attributor.batch(range(4)):
            case.loss(model, vectors(4, 0)).backward()
        optimizer.step()
    assert attributor.last is not None
    assert len(attributor.last.values["t"]) == 4
    model.zero_grad()
    attributor = Attributor(model, optimizer, {"t": vectors(3, 1)}, case.loss)
    with pytest.raises(InrunError, match=r"batch_dim="), attributor.batch(range(4)):
        case.loss(model, vectors(4, 0)).backward()


def test_batches_may_change_their_size() -> None:
    """What was found for one size holds for others: a last, smaller batch, a single example, other lengths."""
    case = CASES["repeated"]
    model = case.build()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Attributor(model, optimizer, {"t": case.batch(3, 1)}, case.loss) as attributor:
        for n in (1, 4, 6, 2):
            with attributor.batch(range(n)):
                case.loss(model, case.batch(n, n)[:, : 8 - n // 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert attributor.last is not None
            assert attributor.last.values["t"].shape == (n,)
