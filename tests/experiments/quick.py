"""Carrying out a study at its smallest, as its command does."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def carried_out(run: ModuleType, folder: Path) -> tuple[dict[str, Any], str]:
    """The result and the page of tables of a study's quick version; its figure, too, is there where matplotlib is."""
    figure = find_spec("matplotlib") is not None
    arguments = ["--quick", "--workers", "1", "--store", str(folder / "store"), "--out", str(folder / "out")]
    run.main([*arguments, *([] if figure else ["--no-figure"])])
    assert (folder / "out" / "figure.svg").exists() == figure
    result: dict[str, Any] = json.loads((folder / "out" / "result.json").read_text("utf-8"))
    return result, (folder / "out" / "README.md").read_text("utf-8")


def gone_on(run: ModuleType, folder: Path, lost: str) -> dict[str, Any]:
    """The result of a study that lost a piece: that one is computed again, and no other."""
    (piece,) = folder.glob(f"store/*/{lost}")
    pieces = {path: path.stat().st_mtime_ns for path in folder.glob(f"store/*/*{piece.suffix}")}
    piece.unlink()
    result, _ = carried_out(run, folder)
    again = {path: path.stat().st_mtime_ns for path in folder.glob(f"store/*/*{piece.suffix}")}
    assert [path for path in pieces if pieces[path] != again[path]] == [piece]
    return result
