"""What is trained on and what is looked for: verses and other text, originals and their rewordings."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paraphrase.config import FAR, NEXT, OTHER, RUNGS, VERBATIM, Study, Trained
from experiments.results import Array
from experiments.sources import TRANSLATIONS, verses

BOOKS_CHAPTER = 1000  # a verse's number divided by this is its chapter's
SAME_NUMBERS = 0.2  # word Jaccard of a chapter's verses with KJV's below which BBE numbers them in another way
MARGIN = 0.03  # of a verse's likeness over that of its neighbours
CHARACTERS = 200_000  # that are read of each source of other text
Verses = dict[int, str]


@dataclass(frozen=True)
class Texts:
    """A seed's training examples, `verse` says which are verses, and by rung `targets` [K] and where their `originals`
    [K] stand.
    """

    examples: list[str]
    verse: Array
    originals: dict[str, list[int]]
    targets: dict[str, list[str]]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def jaccard(one: str, other: str) -> float:
    """Words that both have, as a share of those that either has."""
    a, b = set(words(one)), set(words(other))
    return len(a & b) / max(1, len(a | b))


def shared(one: str, other: str, n: int = 4) -> float:
    """The share of the n-grams of the words of `one` that `other` has, too."""
    a, b = ({tuple(of[i : i + n]) for i in range(len(of) - n + 1)} for of in (words(one), words(other)))
    return len(a & b) / max(1, len(a))


def write(study: Study, path: Path) -> None:
    """All text that a seed may choose from, in a file: translations by verse, and pieces of every other source."""
    from inrun.lm.sources import demo_mixture  # slow to import, and needed once

    bibles = made_up() if study.source == "made up" else {name: verses(name) for name in TRANSLATIONS}
    bibles["bbe"] = same_numbers(bibles[VERBATIM], bibles["bbe"])
    others = {
        name: [piece for d in demo_mixture(CHARACTERS, names=(name,)) for piece in pieces(study, d.text)]
        for name in study.others
    }
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps({"bibles": bibles, "others": others}), "utf-8")
    draft.replace(path)


def same_numbers(kjv: Verses, other: Verses) -> Verses:
    """The chapters of the other translation in which a number is the same verse as in KJV."""
    chapters: dict[int, list[int]] = {}
    for verse in other.keys() & kjv.keys():
        chapters.setdefault(verse // BOOKS_CHAPTER, []).append(verse)
    alike = (of for of in chapters.values() if np.mean([jaccard(kjv[v], other[v]) for v in of]) >= SAME_NUMBERS)
    return {verse: other[verse] for of in alike for verse in sorted(of)}


def pieces(study: Study, text: str) -> Iterator[str]:
    """The text cut between words, as long as verses may be; its lines as they are."""
    at, length = [match.start() for match in re.finditer(r"\S+", text)], (study.fewest + study.most) // 2
    for k in range(0, len(at) - length, length):
        yield text[at[k] : at[k + length]].strip()


def read(path: Path) -> tuple[dict[str, Verses], dict[str, list[str]]]:
    found = json.loads(path.read_text("utf-8"))
    return {name: {int(v): text for v, text in of.items()} for name, of in found["bibles"].items()}, found["others"]


def texts_of(study: Study, path: Path, model: Trained, seed: int) -> Texts:
    """Originals, other verses and other text, all at random, in a random order."""
    bibles, others = read(path)
    kjv, random = bibles[VERBATIM], np.random.default_rng(seed)
    usable = [v for v, text in kjv.items() if study.fewest <= len(text.split()) <= study.most]
    shuffled = [usable[i] for i in random.permutation(len(usable))]
    originals, unrelated, far = chosen(study, bibles, shuffled)
    share = (model.examples - model.examples // 2) if study.others else model.examples
    training = [*originals, *far]
    training += distractors(study, kjv, shuffled, {*training, *unrelated}, share - len(training))
    rows = [(kjv[v], v) for v in training]
    for k, name in enumerate(study.others):
        left, of = model.examples - share, len(study.others)
        take = random.choice(len(others[name]), left // of + (k < left % of), replace=False)
        rows += [(others[name][i], 0) for i in take]
    rows = [rows[i] for i in random.permutation(len(rows))]
    assert len(rows) == model.examples
    places = {verse: place for place, (_, verse) in enumerate(rows)}
    targets = {name: [bibles[name][v] for v in originals] for name in RUNGS if name in bibles}
    targets[FAR] = [bibles["bbe"][v] for v in far]
    targets[NEXT] = [bibles["bbe"][v + 1] for v in originals]
    targets[OTHER] = [bibles["bbe"][v] for v in unrelated]
    stand = {rung: [places[v] for v in (far if rung == FAR else originals)] for rung in targets}
    return Texts([text for text, _ in rows], np.array([verse > 0 for _, verse in rows]), stand, targets)


def chosen(study: Study, bibles: Mapping[str, Verses], shuffled: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The first verses, of a chapter each, that all translations have, and the next one too: originals, as many that
    belong to no original, and as many far originals.
    """
    found: dict[int, int] = {}
    far: dict[int, int] = {}
    for verse in shuffled:
        everywhere = all(verse in of and verse + 1 in of for of in bibles.values())
        if everywhere and len(words(bibles[VERBATIM][verse + 1])) >= study.fewest // 2:
            if len(found) < 2 * study.originals:
                found.setdefault(verse // BOOKS_CHAPTER, verse)
            elif verse // BOOKS_CHAPTER not in found and is_far(study, bibles, verse):
                far.setdefault(verse // BOOKS_CHAPTER, verse)
        if len(far) == study.originals:
            break
    both = list(found.values())
    return both[: study.originals], both[study.originals :], list(far.values())


def is_far(study: Study, bibles: Mapping[str, Verses], verse: int) -> bool:
    """Whether BBE's verse has few words in common with KJV's, but more than those before and after it have: it is
    no other verse.
    """
    kjv, bbe = bibles[VERBATIM][verse], bibles["bbe"]
    near = max(jaccard(kjv, bbe.get(other, "")) for other in (verse - 1, verse + 1))
    return near + MARGIN < jaccard(kjv, bbe[verse]) < study.far


def distractors(study: Study, kjv: Verses, shuffled: list[int], targets: set[int], number: int) -> list[int]:
    """Other verses: none next to a target, none that says nearly the same as one."""
    found: list[int] = []
    for verse in shuffled:
        near = any(abs(verse - target) <= study.apart for target in targets)
        if not near and all(jaccard(kjv[verse], kjv[target]) < study.alike for target in targets):
            found.append(verse)
        if len(found) == number:
            return found
    raise ValueError(f"there are {len(found)} verses, not {number}")


def made_up(chapters: int = 20, verses: int = 12, seed: int = 0) -> dict[str, Verses]:
    """Verses of words that nobody knows. From one translation to the next, more words are replaced by others."""
    random, bibles = np.random.default_rng(seed), dict[str, Any]()
    syllables = ["ba", "do", "ke", "lu", "mi", "no", "ra", "su", "ti", "ve"]
    lexicon = ["".join(random.choice(syllables, 3)) for _ in range(300)]
    kept = dict(zip(TRANSLATIONS, (1.0, 0.8, 0.65, 0.5, 0.4), strict=True))
    for chapter in range(1, chapters + 1):
        for verse in range(1, verses + 1):
            said = random.choice(lexicon, int(random.integers(10, 17)))
            for name, share in kept.items():
                other = [word if random.random() < share else word[::-1] for word in said]
                bibles.setdefault(name, {})[(1000 + chapter) * BOOKS_CHAPTER + verse] = " ".join(other) + "."
    return bibles
