"""What the studies' reports share."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import results, study


def test_a_result_is_read_as_it_was_written() -> None:
    rows = [{"by": "path", "auroc": [0.5, 0.4, 0.6]}, {"by": "first", "auroc": [1, 1, 1]}]
    assert results.table_rows(json.loads(results.as_text({"methods": rows}))["methods"]) == rows


def test_equal_values_count_half() -> None:
    values, bad = np.array([0.1, 0.1, 0.3, 0.0]), np.array([True, False, False, False])
    assert results.auroc(values, bad) == pytest.approx((0.5 + 1 + 0) / 3)


def test_a_study_tells_its_line_and_no_other(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "| [one](experiments/one/README.md) | why? | old |\n| [two](experiments/two/README.md) | what? | |\n", "utf-8"
    )
    study.tell("one", "new", page)
    assert page.read_text("utf-8").splitlines() == [
        "| [one](experiments/one/README.md) | why? | new |",
        "| [two](experiments/two/README.md) | what? | |",
    ]
    with pytest.raises(ValueError, match="unpack"):
        study.tell("three", "new", page)
