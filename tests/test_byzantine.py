"""A mesh with one member that lies: nothing of it may hurt the others, and they find out who."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crdtstate import sync
from crdtstate.authors import Signed
from crdtstate.certificates import Certificate, decode_certificate
from crdtstate.change import CARD_HEAD, ID_BYTES
from crdtstate.document import Document
from crdtstate.errors import InvalidCertificate, Unproven
from crdtstate.simulation.byzantine import Fault, campaign, main, run
from crdtstate.standing import Standing
from crdtstate.sync import Sync

SEEDS, STEPS = 40, 700
MUTANT_SEEDS = 40


def test_the_honest_stay_equal_lose_nothing_and_name_the_culprit() -> None:
    tried, failed = campaign(range(SEEDS), STEPS)

    assert failed == []
    # It was no idle talk.
    assert len(tried) >= 20
    assert min(tried.values()) >= 20, tried


def test_one_seed_is_one_history() -> None:
    one, other = run(7, 300), run(7, 300)

    assert one.tried == other.tried and one.now == other.now


def test_the_liar_is_named() -> None:
    """Whoever was told a forgery by mallory says so, of mallory."""
    world = run(3, STEPS)

    for member in world.honest:
        assert {getattr(event, "agent", "") for event in member.events} >= {"mallory"}


def test_it_can_be_run_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--seeds", "2", "--steps", "100"]) == 0
    assert capsys.readouterr().out.startswith("2 seeds of 100 steps, 0 failed")


Plant = Callable[[pytest.MonkeyPatch], None]

MUTANTS: dict[str, Plant] = {}


def mutant(plant: Plant) -> Plant:
    MUTANTS[plant.__name__] = plant
    return plant


@mutant
def signatures_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    def check(self: Signed, change: Any, card: bytes) -> None:
        self.certificate(change.writer, change.card or card)

    patch.setattr(Signed, "check", check)


@mutant
def cards_are_believed(patch: pytest.MonkeyPatch) -> None:
    def certificate(self: Signed, writer: int, card: bytes) -> Certificate:
        try:
            return decode_certificate(card[CARD_HEAD:], self._root)
        except InvalidCertificate as exc:
            raise Unproven(str(exc)) from exc

    patch.setattr(Signed, "certificate", certificate)
    check = Signed.check
    patch.setattr(Signed, "check", lambda self, change, card: check(self, change, b""))


@mutant
def a_bad_proof_keeps_the_good_one_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sync, "_key", lambda change: change.data[1 : 1 + ID_BYTES])


@mutant
def a_proof_stays_with_who_found_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Standing, "_publish", lambda self, name, writer, proof: None)


@mutant
def a_closed_lane_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Document, "close_lane", lambda self, writer: None)
    patch.setattr(Document, "is_closed", lambda self, writer: self.hiding.hides_all(writer))


@mutant
def a_closed_lane_can_be_seen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Document, "hide", lambda self, writer, ceiling: [])


@mutant
def a_claim_makes_one_another(patch: pytest.MonkeyPatch) -> None:
    def on_same_writer(self: Sync, link: Any) -> None:
        self._reidentify("they say so")

    patch.setattr(Sync, "_on_same_writer", on_same_writer)


@mutant
def the_store_does_not_know_of_closed_lanes(patch: pytest.MonkeyPatch) -> None:
    def closed(self: Sync, name: str, writer: int, now: float) -> None:
        document = self.documents.find(name)
        if document is not None:
            self._commit(name, {writer: document.version[writer]})
            self._retry_pending(document)

    patch.setattr(Sync, "closed", closed)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_campaign_kills_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)

    for seed in range(MUTANT_SEEDS * (5 if name.startswith("the_store") else 1)):
        try:
            run(seed, STEPS)
        except (Fault, AssertionError) as exc:
            print(f"{name}: seed {seed}: {exc}")
            return
    pytest.fail(f"{name} survived")
