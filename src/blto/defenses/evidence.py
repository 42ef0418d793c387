"""Whether a defense may be relied on, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """What a defense has shown here. Without both tests it is experimental, and stays out of tables of results.

    A test on constructed images does not count where real encoders say otherwise, with options that one can choose
    without knowing the poisons.

    Attributes:
        said: what it did on real encoders, as a sentence.
        must_show: the test of what its paper promises, by file and name in tests/defenses: "test_decree::test_name".
        positive: the test of a case that it finds, filters or repairs.
    """

    said: str = "What it shows on real encoders has not been judged yet."
    must_show: str = ""
    positive: str = ""

    @property
    def status(self) -> str:
        """ "verified" or "experimental"."""
        return "verified" if self.must_show and self.positive else "experimental"
