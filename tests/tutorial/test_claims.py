"""The ledger's entries: what the reader sees and what the README's table is built from."""

import pytest

from ghostlib.tutorial import claims


def shown(monkeypatch, *args, **kwargs):
    seen = []
    monkeypatch.setattr(claims, "display", seen.append)
    claims.record(*args, **kwargs)
    return seen[0]._repr_mimebundle_()


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"holds": True}, "holds"),
        ({"holds": False}, "does not hold here"),
        ({"holds": True, "condition": "if N > C"}, "holds with a condition (if N > C)"),
    ],
)
def test_an_entry_shows_a_line_and_carries_its_facts(monkeypatch, options, verdict):
    bundle = shown(monkeypatch, 5, "ghost 0.45, symmetric 0.60", **options)
    assert bundle["text/plain"] == f"Claim 5 {verdict}: ghost 0.45, symmetric 0.60"
    facts = {"claim": 5, "figure": "ghost 0.45, symmetric 0.60", "verdict": verdict}
    assert bundle[claims.MIME] == facts


def test_bad_entries_are_refused():
    with pytest.raises(ValueError, match="no claim 99"):
        claims.record(99, "1", holds=True)
    with pytest.raises(ValueError, match="takes no condition"):
        claims.record(1, "1", holds=False, condition="never")


def test_the_papers_claims_come_first_and_are_all_there():
    sources = [claim.source for claim in claims.CLAIMS.values()]
    assert list(claims.CLAIMS) == list(range(1, len(sources) + 1))
    assert all(source.startswith("paper") for source in sources[:12])
    assert set(sources[12:]) == {"ours"}
