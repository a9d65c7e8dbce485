"""A small corpus of real text with two groups, for the tests that train."""

import json
from pathlib import Path

from inrun.lm.sources import demo_mixture


def write_corpus(path: Path, characters: int = 12_000) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for document in demo_mixture(characters, names=["scripture", "code"]):
            file.write(json.dumps({"id": document.id, "text": document.text, **document.columns}) + "\n")
    return path
