"""Holding out: whole documents, from every group, on one side or the other."""

import pytest

from inrun.lm.documents import Document, TextError
from inrun.lm.held_out import held_out_ids

GROUPS = [Document(str(i), "text", {"domain": "abc"[i % 3]} if i % 7 else {}) for i in range(300)]


@pytest.mark.parametrize("per_group", [5, 0.1])
def test_every_group_gives_documents_and_keeps_some(per_group: float) -> None:
    held = held_out_ids(GROUPS, "domain", per_group)
    domains = {document.id: document.columns.get("domain") for document in GROUPS}
    assert {name: domains[name] for name in held} == held  # those without a group are kept
    groups = [group for group in domains.values() if group]
    for name in "abc":
        taken = list(held.values()).count(name)
        assert taken == 5 if per_group == 5 else 0 < taken < groups.count(name)
    assert held_out_ids(reversed(GROUPS), "domain", per_group) == held
    assert held_out_ids(GROUPS, "domain", per_group, seed=1) != held


def test_under_a_share_no_document_changes_sides_when_others_come() -> None:
    before, after = held_out_ids(GROUPS[:200], "domain", 0.2), held_out_ids(GROUPS, "domain", 0.2)
    assert before == {name: group for name, group in after.items() if int(name) < 200}
    assert len(after) == pytest.approx(0.2 * len([d for d in GROUPS if d.columns]), rel=0.35)


def test_groups_that_cannot_be_held_out() -> None:
    few = [Document("1", "text", {"domain": "rare"}), Document("2", "text", {"domain": "rare"})]
    assert len(held_out_ids(few, "domain", 0.01)) == len(held_out_ids(few, "domain", 0.99)) == 1
    with pytest.raises(TextError, match="group 'rare' of 'domain' has 2 documents: holding out 2 leaves none"):
        held_out_ids(few, "domain", 2)
    with pytest.raises(TextError, match="group 'rare' of 'domain' has 1 documents"):
        held_out_ids(few[:1], "domain", 0.5)
    with pytest.raises(TextError, match=r"no document has a value in column 'source'; there are: \['domain'\]"):
        held_out_ids(few, "source", 1)
    for wrong in (0, -1, 1.5, 0.0):
        with pytest.raises(TextError, match="give a count, or a share under 1"):
            held_out_ids(few, "domain", wrong)
