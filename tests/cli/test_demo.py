"""`inrun demo`: which folders it takes for an earlier demo's."""

from pathlib import Path

import pytest

from inrun.cli.demo import CORPUS, Demo, DemoError, _clear, _write_corpus


def test_a_demo_that_broke_off_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / CORPUS).write_text("the user's own")
    with pytest.raises(DemoError, match="holds something other than an earlier demo"):
        _clear(mine)
    assert (mine / CORPUS).read_text() == "the user's own"
    broken = tmp_path / "broken"
    _clear(broken)
    _write_corpus(Demo(out=broken, characters=12_000))  # and no further: no config.json
    _clear(broken)
    assert not broken.exists()
