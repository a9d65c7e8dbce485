"""The demo's text: real, clean, clearly different, the same at every call."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from math import log

import pytest

from inrun.lm.documents import Document, TextError
from inrun.lm.held_out import held_out_ids
from inrun.lm.sources import LEAST, MOST, SOURCES, Source, cut, demo_mixture, documents, installed_file, without_markup


@pytest.fixture(scope="module")
def mixture() -> list[Document]:
    return list(demo_mixture(250_000, seed=3))


def by_domain(mixture: list[Document]) -> dict[str, list[Document]]:
    return {name: [d for d in mixture if d.columns == {"domain": name}] for name in SOURCES}


def test_the_mixture_is_balanced_and_whole(mixture: list[Document]) -> None:
    assert len({d.id for d in mixture}) == len(mixture) == sum(map(len, by_domain(mixture).values()))
    assert set(SOURCES) == {"scripture", "code", "news", "parliament", "tweets", "encyclopedia"}
    for name, of in by_domain(mixture).items():
        assert 250_000 <= sum(len(d.text) for d in of) < 250_000 + 1.5 * MOST, name
        assert all(LEAST <= len(d.text.strip()) <= 1.5 * MOST for d in of), name


def test_the_mixture_is_clean(mixture: list[Document]) -> None:
    marks = re.compile(r"\[\[|\]\]|\{\{|\}\}|<ref|&(amp|quot|lt|nbsp);|https?://|\ufffd|\x1f|Â£|â€|'''")
    for document in mixture:
        if document.columns["domain"] != "code":
            assert not marks.search(document.text), (document.id, marks.search(document.text))
            assert sum(c.isalpha() or c.isspace() for c in document.text) > 0.7 * len(document.text), document.id


def test_the_sources_are_clearly_different(mixture: list[Document]) -> None:
    """Naive Bayes on the words of half the documents tells where the other half comes from."""
    groups = by_domain(mixture)
    seen = {name: Counter(w for d in of[::2] for w in re.findall(r"\w+", d.text)) for name, of in groups.items()}
    totals = {name: seen[name].total() + 5_000 for name in groups}

    def guess(text: str) -> str:
        words = Counter(re.findall(r"\w+", text))
        return max(
            groups, key=lambda name: sum(n * log((seen[name][w] + 0.1) / totals[name]) for w, n in words.items())
        )

    for name, of in groups.items():
        right = sum(guess(d.text) == name for d in of[1::2])
        assert right >= 0.8 * len(of[1::2]), (name, right, len(of[1::2]))


def test_the_mixture_hangs_on_the_seed_alone(mixture: list[Document]) -> None:
    one, other = (list(demo_mixture(50_000, seed=seed, names=["parliament"])) for seed in (3, 4))
    assert one == by_domain(mixture)["parliament"][: len(one)]
    assert one != other


def test_a_share_held_out_of_the_mixture_is_that_share(mixture: list[Document]) -> None:
    """Choosing the mixture and holding out of it both go by hashes of ids: they must not be the same hash."""
    held = held_out_ids(mixture, "domain", 0.2, seed=3)
    assert set(held.values()) == set(SOURCES)
    assert len(held) == pytest.approx(0.2 * len(mixture), rel=0.3)


def test_asking_for_too_much_or_for_the_unknown() -> None:
    with pytest.raises(TextError, match=r"source 'parliament' has only 11[0-9]{5} characters, not 90000000"):
        list(demo_mixture(90_000_000, names=["parliament"]))
    with pytest.raises(TextError, match="no source 'recipes'; there are: scripture, code, news"):
        list(documents("recipes"))


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Iterator[tuple[str, str]]:
        yield "", installed_file("no-such-package-here", ".zip").name

    monkeypatch.setitem(SOURCES, "gone", Source("nothing", "pip install no-such-package-here", read))
    with pytest.raises(TextError, match=r"^source 'gone' is not there \(.*\); run: pip install no-such-package-here$"):
        list(documents("gone"))
    with pytest.raises(FileNotFoundError, match=r"pytest \S+ has no file \*\.zip"):
        installed_file("pytest", ".zip")


def test_code_compiles_when_it_is_a_whole_file() -> None:
    whole = [d for d in islice(documents("code"), 200) if d.id.endswith(".1")]
    compiled = 0
    for document in whole:
        try:
            compile(document.text, document.id, "exec", dont_inherit=True)
            compiled += 1
        except SyntaxError:  # a file's first piece may end inside a class
            pass
    assert compiled > 0.3 * len(whole) > 3


def test_cutting_loses_nothing_and_keeps_pieces_short() -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * (i * 37 % 1500) for i in range(40)) + "x" * (2 * MOST)
    pieces = cut(text, ("\n\n", " "))
    assert max(map(len, pieces)) <= MOST
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_wiki_markup_goes() -> None:
    long = "and so this paragraph is long enough to be kept as one of the paragraphs of the page"
    page = (
        "{{Infobox | a = {{nested|b}} }}\n'''Bold''' [[target|link]] [[plain]] text<ref name=x>note [[y]]</ref>"
        f"<ref name=z/> &ndash; [http://example.org outside], {long}.\n* a list item, {long}\n== Heading ==\n"
        f"{{| table\n| {long}\n|}}\n[[File:x.jpg|thumb|a [[nested]] caption, {long}]]\n"
        f"Second <b>paragraph</b>, {long}.\n== References ==\nGone with the rest, {long}."
    )
    assert without_markup(page) == (f"Bold link plain text \u2013 outside, {long}.\n\nSecond paragraph, {long}.")
