"""The study of curation, at its smallest, from text to result."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.curation import choice, mixture, report, run, training
from experiments.curation.config import ALL, NEGATIVES, QUICK, SHARE, Piece
from experiments.results import table_rows
from tests.experiments.quick import carried_out, gone_on

KEYS = ("rule", "by")


def test_quick(tmp_path: Path) -> None:
    result, page = carried_out(run, tmp_path)
    found = {tuple(row[key] for key in KEYS): row for row in table_rows(result["trainings"])}
    assert list(found) == [("", ALL), ("", f"{ALL} again"), *QUICK.curations]
    assert found["", ALL]["dropped"] == found["", ALL]["difference"] == found["", ALL]["saved"] == [0, 0, 0]
    assert found["", f"{ALL} again"]["difference"][0] != 0
    oracle = found[NEGATIVES, "oracle"]
    assert oracle["dropped"][0] == 0.5
    assert oracle["rubbish"][0] == 1
    assert oracle["difference"][0] < found[SHARE, "random"]["difference"][0]
    assert oracle["saved"][0] > 0.2
    shares = {row["dropped"][0] for (rule, by), row in found.items() if rule == SHARE or by == "path"}
    negative = {row["by"]: row for row in table_rows(result["negative"])}
    assert shares == {negative["path"]["all"][0]}
    gone = {tuple(row[key] for key in KEYS): row for row in table_rows(result["dropped"])}
    kinds = ("wanted", "other", "rubbish", *QUICK.kinds)
    assert all(gone[NEGATIVES, "path"][kind] == negative["path"][kind] for kind in kinds)
    auroc = {row["by"]: row["rubbish"][0] for row in table_rows(result["auroc"])}
    assert min(auroc[by] for by in ("path, at once", "path, by step", "replay")) > 0.6
    assert f"| {SHARE} | replay |" in page

    repeated = gone_on(run, tmp_path, "seed0-share-replay.npz")
    assert all(result[name] == repeated[name] for name in result if name != "seconds")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "text.npz"
    mixture.write_text(QUICK, path)
    return path


def test_the_mixture_is_what_it_says(text: Path) -> None:
    data = mixture.data_of(QUICK, text, 3)
    of = {name: data.blocks[data.kind == k] for k, name in enumerate(QUICK.kinds)}
    assert {name: len(blocks) for name, blocks in of.items()} == {**dict.fromkeys(QUICK.clean, 20), **{
        kind: 8 for kind, _ in QUICK.rubbish}}  # fmt: skip
    clean = {tuple(block) for source in QUICK.clean for block in of[source].tolist()}
    copies = {tuple(block) for block in of["copies"].tolist()}
    assert len(copies) == QUICK.originals
    assert copies < clean
    same = [[float(np.mean(np.equal(near, one))) for one in clean] for near in of["near copies"].tolist()]
    assert np.max(same, axis=1).mean() == pytest.approx(1 - QUICK.replaced, abs=0.04)
    trained = {tuple(block) for block in data.blocks.tolist()}
    held_out = [data.whole, *data.targets["broad"], data.tested, *data.tested_each.values()]
    assert not any(tuple(block) in trained for blocks in held_out for block in blocks.tolist())
    assert len({tuple(block) for blocks in held_out for block in blocks.tolist()}) == sum(map(len, held_out))
    assert np.array_equal(np.sort(data.orders, axis=1), np.tile(np.arange(QUICK.blocks), (QUICK.epochs, 1)))


def test_spoiled_text() -> None:
    random, plain = np.random.default_rng(0), "An example of text, which is long enough. " * 50
    shuffled = mixture.shuffled(plain, random)
    assert shuffled != plain
    assert [sorted(word) for word in shuffled.split()] == [sorted(word) for word in plain.split()]
    noisy = mixture.noise(0.3)(plain, random)
    assert np.mean([a != b for a, b in zip(plain, noisy, strict=True)]) == pytest.approx(0.3, abs=0.03)
    assert mixture.misread(plain, random).encode("latin-1").decode("cp500") == plain


def test_values_are_of_the_block_and_the_step_that_used_it(text: Path) -> None:
    found = training.valued(QUICK, text, Piece(0, "first"))
    data = mixture.data_of(QUICK, text, 0)
    steps = list(data.steps(QUICK))
    for epoch, block in ((0, 5), (1, 5), (1, 79)):
        at, places = steps[found["step"][epoch, block]]
        assert at == epoch
        assert block in places
    assert found["weights"] == training.valued(QUICK, text, Piece(0, "wide"))["weights"]
    sums = [np.abs(found["first, by step"][at, places]).sum() for at, places in steps]
    np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_what_is_dropped() -> None:
    path, values = np.array([-1.0, 2.0, -0.5, 1.0]), np.array([0.3, 0.1, 0.2, 0.4])
    assert choice.dropped(NEGATIVES, path, path).tolist() == [True, False, True, False]
    assert choice.dropped(SHARE, values, path).tolist() == [False, True, True, False]
    assert not choice.dropped(NEGATIVES, values, path).any()


def test_the_order_is_that_of_what_is_kept() -> None:
    study, some = replace(QUICK, blocks=24, epochs=3), np.arange(24) % 3 > 0
    batches = list(training.order_of(study, some, 0))
    assert [len(batch) for batch in batches] == [study.batch] * study.steps
    every = np.concatenate(list(training.order_of(study, np.ones(24, dtype=bool), 0)))
    kept = np.concatenate(batches)
    assert kept[: some.sum()].tolist() == every[:24][some[every[:24]]].tolist()
    assert set(np.bincount(kept[: 4 * 16], minlength=24)[some]) == {4}


def test_saved_steps() -> None:
    plain = np.array([6.0, 5.0, 4.0, 3.0])
    assert report.saved(plain, plain) == 0
    assert report.saved(np.array([6.0, 4.0, 2.0, 1.0]), plain) == pytest.approx(0.5)
    assert report.saved(np.array([6.0, 5.5, 5.0, 4.5]), plain) == pytest.approx(-0.5)
