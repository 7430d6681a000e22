"""The gate's report: nothing of the evidence is left out, whatever is missing is said, the page stands on its own."""

import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import jsonschema
import numpy as np
import pytest

from ml.datasets.labels import CLASS_NAMES
from ml.evaluation.comparison import compare
from ml.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from ml.evaluation.engine_choice import EngineChoice, Latency, choose_engine, compare_engines
from ml.evaluation.gate import Champion, Check, Contender, absolute_checks, decide
from ml.evaluation.gate_policy import load_policy
from ml.evaluation.gate_report import GateReport, as_html, as_json, power_statement
from ml.evaluation.measurement import measure
from ml.evaluation.robustness import Robustness
from ml.settings import PROJECT_ROOT

POLICY = load_policy(PROJECT_ROOT / "policies" / "gate.toml")
CHAMPION = Champion(1, "baseline", "ds-a")
MECHANICAL = (
    Check("same answers", "mechanical", True, "2.1e-06, at most 0.001 wanted", 2.1e-6, bound=0.001),
    Check("p95 latency", "mechanical", False, "142 ms, at most 100 wanted", 141.7, 120.0, 160.0, 100.0, "ms"),
)
SHADOW = (Check("agreement", "shadow", True, "0.9100 of 500 users' images", 0.91, 0.88, 0.93, 0.8),)


def answers(accuracy: float, seed: int, n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities of a model that is right so often and says so."""
    rng, labels = np.random.default_rng(seed), np.arange(n) % 10
    predicted = np.where(rng.random(n) < accuracy, labels, (labels + 1) % 10)
    sure = rng.uniform(accuracy - 0.1, accuracy + 0.1, (n, 1))
    return labels, (1 - sure) / 9 + (sure - (1 - sure) / 9) * np.eye(10)[predicted]


def robust(accuracy: float) -> Robustness:
    cells = {(name, severity): accuracy - 0.05 * severity for name in CORRUPTIONS for severity in SEVERITIES}
    means = dict.fromkeys(CORRUPTIONS, accuracy - 0.15)
    mean = accuracy - 0.15
    return Robustness(100, mean, mean - 0.04, mean + 0.04, means, cells, np.linspace(0.2, 2 * mean - 0.2, 100))


LABELS, MINE = answers(0.82, 1)
_, THEIRS = answers(0.70, 2)
CANDIDATE_MEASURED, CHAMPION_MEASURED = measure(LABELS, MINE, robust(0.8)), measure(LABELS, THEIRS, robust(0.71))
COMPARISON = compare(
    LABELS,
    MINE,
    THEIRS,
    version=1,
    level=POLICY.champion.level,
    power=POLICY.champion.power,
    class_margin=POLICY.champion.class_margin,
    corrupted=(robust(0.8).accuracy_per_image, robust(0.71).accuracy_per_image),
)


ENGINE = choose_engine(
    compare_engines(LABELS, MINE, MINE, (Latency(8.5, 9.75), Latency(4.25, 5.5)), confidence=POLICY.int8.confidence),
    POLICY.int8,
)


def report(champion: Champion | None = CHAMPION, extra: tuple[Check, ...] = (), **changes) -> GateReport:
    """As the gate judges it; `changes` are of the contender, or of the report."""
    own = {key: changes.pop(key) for key in ("checks", "comparison", "error") if key in changes}
    usual = {"checks": absolute_checks(CANDIDATE_MEASURED, POLICY), "comparison": COMPARISON}
    contender = Contender(2, "vgg16", "ds-a", 0.81, **(usual | own))
    verdict = decide([contender], champion, POLICY).verdicts[0]
    made = GateReport(
        at=datetime(2025, 3, 1, 12, 30, tzinfo=UTC),
        dataset_id="ds-a",
        data="cifar-10",
        weights="imagenet",
        candidate=contender,
        verdict=replace(verdict, checks=verdict.checks + extra),
        champion=champion,
        measured=CANDIDATE_MEASURED,
        champion_measured=CHAMPION_MEASURED if champion else None,
        policy=POLICY,
        engine=ENGINE,
    )
    return replace(made, **changes)


BLESSED = report(extra=SHADOW)
BROKEN = report(
    checks=(),
    error="its file cannot be loaded",
    comparison=None,
    measured=None,
    engine=EngineChoice("fp32", "the version has no int8 form."),
)
FAILED = report(checks=MECHANICAL + absolute_checks(CANDIDATE_MEASURED, POLICY))
ALONE = report(champion=None, comparison=None)
WAITING = report(champion=replace(CHAMPION, error="its file is gone"), comparison=None, champion_measured=None)
ELSEWHERE = report(champion=replace(CHAMPION, dataset_id="ds-b"), comparison=None, champion_measured=None)
ALL = {
    "blessed": BLESSED,
    "broken": BROKEN,
    "failed": FAILED,
    "alone": ALONE,
    "waiting": WAITING,
    "new data": ELSEWHERE,
}


class Page(HTMLParser):
    """A page's elements, its text, its headings and the rows of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass  # elements without an end of their own

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._texts.append(data)
        if {"th", "td"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(as_html(each)) for name, each in ALL.items()}


def test_every_check_stands_on_the_page_with_outcome_figure_interval_threshold_and_sentence(pages):
    for name in ("blessed", "failed"):
        rows = {tuple(row[:2]): row for row in pages[name].rows if len(row) == 6}
        checks = ALL[name].verdict.checks
        assert len(checks) > 4
        for check in checks:
            found = rows[check.name, "✓ holds" if check.holds else "✗ fails"]
            assert found[5] == check.says
            for text, value in ((found[2], check.figure), (found[4], check.bound)):
                assert text == "–" if value is None else float(text.split()[0]) == pytest.approx(value, abs=6e-5)
            if check.low is not None:
                low, high = (float(end.split()[0]) for end in found[3].split(" to "))
                assert (low, high) == pytest.approx((check.low, check.high), abs=6e-5)
    assert ["p95 latency", "✗ fails", "141.7 ms", "120 to 160 ms", "100 ms"] in [
        row[:5] for row in pages["failed"].rows
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blessed", ("Version 2 (vgg16): blessed", "is better than champion version 1", "All 17 checks hold.")),
        ("failed", ("Version 2 (vgg16): refused", "Why it was refused", "Of 5 checks, 1 fails: p95 latency.")),
        (
            "broken",
            ("Version 2 (vgg16): refused", "could not be measured: its file cannot be loaded", "No check was made."),
        ),
        ("alone", ("blessed", "There was no champion", "There is no measurement of a champion")),
        (
            "waiting",
            ("not judged", "gave nothing to compare with: its file is gone", "No champion was measured on the"),
        ),
        ("new data", ("not judged", "belongs to ds-b", "No check against a champion was made.")),
    ],
)
def test_outcome_and_reason_are_said_in_words_and_so_is_what_is_missing(pages, name, words):
    for each in words:
        assert each in pages[name].text
    assert ALL[name].verdict.reason in pages[name].text


def test_what_was_not_measured_is_said(pages):
    assert pages["broken"].text.count("could not be measured: its file cannot be loaded") >= 3
    assert not pages["broken"].all("img")
    unmeasured = replace(BLESSED, measured=replace(CANDIDATE_MEASURED, robustness=None))
    assert "Accuracy under corruption was not measured." in Page(as_html(unmeasured)).text
    assert "No check on users' predictions was made." in pages["failed"].text
    compared_with_another = report(comparison=replace(COMPARISON, champion=7))
    assert "was not compared with the champion, version 1" in Page(as_html(compared_with_another)).text


def test_the_champion_is_compared_overall_and_in_each_class_with_what_the_test_could_see(pages):
    rows = {row[0]: row for row in pages["blessed"].rows if len(row) == 7}
    assert rows["overall: accuracy"][2:5] == [
        str(COMPARISON.pairs.gained), str(COMPARISON.pairs.lost), f"{COMPARISON.accuracy.value:+.4f}",
    ]  # fmt: skip
    assert {f"{name}: recall" for name in CLASS_NAMES} < set(rows)
    assert power_statement(COMPARISON, POLICY) in pages["blessed"].text
    assert f"a true difference of {COMPARISON.smallest_seen:.4f} with a probability of 80%" in pages["blessed"].text
    assert "may exist and go unseen" in pages["blessed"].text


def test_where_the_test_cannot_see_anything_that_is_said():
    same = compare(LABELS, MINE, MINE, version=1, level=0.05, power=0.8, class_margin=0.05)
    assert "no difference, whatever its size, could be seen" in power_statement(same, POLICY)
    assert "whatever its size" in Page(as_html(report(comparison=same))).text
    few = compare(LABELS[:20], MINE[:20], THEIRS[:20], version=1, level=0.05, power=0.8, class_margin=0.05)
    assert few.pairs.disagreement > 0
    hardly = replace(few, pairs=replace(few.pairs, gained=1, lost=0), smallest_seen=0.05)
    assert "does not reach a probability of 80% for any true difference" in power_statement(hardly, POLICY)


def test_confusion_and_all_75_cells_are_there_with_their_difference_to_the_champion(pages):
    rows = [row for row in pages["blessed"].rows if row and row[0] in {name.replace("_", " ") for name in CORRUPTIONS}]
    assert len(rows) == 30
    fog, fog_difference = (row[1:] for row in rows if row[0] == "fog")
    assert fog == ["0.750", "0.700", "0.650", "0.600", "0.550", "0.650"]
    assert fog_difference == ["+0.090"] * 6
    confusion = [row for row in pages["blessed"].rows if len(row) == 11 and row[0] in CLASS_NAMES]
    assert [[int(cell) for cell in row[1:]] for row in confusion] == [
        list(r) for r in CANDIDATE_MEASURED.metrics.confusion
    ]
    assert all(f"absolute.{key}" in pages["blessed"].text for key in POLICY.absolute.model_dump())


@pytest.mark.parametrize("name", ALL)
def test_the_page_needs_nothing_else_and_can_be_heard(pages, name):
    page = pages[name]
    addresses = [
        str(value) for _, each in page.elements for key, value in each.items() if key in ("src", "srcset", "href")
    ]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not page.all("script")
    assert not page.all("link")
    texts = [image.get("alt") for image in page.all("img")]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(set(ids)) == len(ids)
    labels = [each["aria-labelledby"] for _, each in page.elements if "aria-labelledby" in each]
    assert set(labels) <= set(ids)


def test_what_comes_from_elsewhere_cannot_become_part_of_the_page():
    evil = "<script>alert(1)</script>\"'&"
    made = report(
        champion=replace(CHAMPION, architecture=evil, error=evil),
        comparison=None,
        checks=(Check(evil, "absolute", True, evil, 0.5, 0.4, 0.6, 0.3, evil),),
        data=evil,
        weights=evil,
        dataset_id=evil,
    )
    page = as_html(replace(made, verdict=replace(made.verdict, reason=evil)))
    assert "<script" not in page
    assert evil in Page(page).text
    assert not Page(page).all("script")


def test_stand_ins_are_called_what_they_are(pages):
    page = Page(as_html(replace(BROKEN, data="SYNTHETIC", weights="RANDOM WEIGHTS")))
    assert "SYNTHETIC, RANDOM WEIGHTS. Figures made with such data or weights say nothing" in page.text
    assert [each for each in page.all("div") if each.get("class") == "note"]
    assert not [each for each in pages["blessed"].all("div") if each.get("class") == "note"]


def test_the_same_report_gives_the_same_bytes(pages):
    first = as_html(BLESSED)
    assert as_html(replace(BLESSED)) == first
    assert json.dumps(as_json(BLESSED)) == json.dumps(as_json(replace(BLESSED)))


NUMBER = {"type": ["number", "null"]}
DIFFERENCE = {"type": "object", "required": ["value", "low", "high"], "additionalProperties": NUMBER}
MEASURED = {
    "type": ["object", "null"],
    "required": ["metrics", "calibration_low", "calibration_high", "reliability", "robustness"],
    "properties": {
        "metrics": {"type": "object", "required": ["n", "accuracy", "loss", "classes", "confusion"]},
        "robustness": {
            "type": ["object", "null"],
            "properties": {"cells": {"type": "object", "minProperties": 15}},
            "required": ["n", "mean_accuracy", "cells"],
        },
        "reliability": {"type": "array", "items": {"type": "object", "additionalProperties": NUMBER}},
    },
    "additionalProperties": {"type": "number"},
}
SCHEMA = {
    "type": "object",
    "required": ["schema", "at", "dataset_id", "data", "weights", "outcome", "reason", "candidate", "engine",
                 "champion", "checks", "comparison", "measured", "champion_measured", "policy"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": 1},
        "at": {"const": "2025-03-01T12:30:00+00:00"},
        "dataset_id": {"type": "string"},
        "data": {"type": "string"},
        "weights": {"type": "string"},
        "outcome": {"enum": ["promoted", "refused", "pending"]},
        "reason": {"type": "string", "minLength": 1},
        "candidate": {"type": "object", "required": ["version", "architecture", "validation_accuracy", "error"]},
        "engine": {
            "type": "object",
            "required": ["engine", "reason", "comparison"],
            "additionalProperties": False,
            "properties": {
                "engine": {"enum": ["fp32", "int8"]},
                "reason": {"type": "string", "minLength": 1},
                "comparison": {
                    "type": ["object", "null"],
                    "required": ["pairs", "accuracy", "largest_fall", "calibration_error", "agreement", "fp32", "int8"],
                    "properties": {"fp32": {"type": "object", "required": ["median_ms", "p95_ms"]}},
                },
            },
        },
        "champion": {"type": ["object", "null"], "required": ["version", "architecture", "dataset_id", "error"]},
        "checks": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "group", "holds", "says", "figure", "low", "high", "bound", "unit"],
                "properties": {"holds": {"type": "boolean"}, "figure": NUMBER, "low": NUMBER, "high": NUMBER,
                               "bound": NUMBER, "group": {"enum": ["mechanical", "absolute", "champion", "shadow"]}},
            },
        },
        "comparison": {
            "type": ["object", "null"],
            "required": ["champion", "pairs", "accuracy", "p_value", "smallest_seen", "classes", "power"],
            "properties": {"accuracy": DIFFERENCE, "smallest_seen": NUMBER, "power": {"type": "string"}},
        },
        "measured": MEASURED,
        "champion_measured": MEASURED,
        "policy": {"type": "object", "required": ["mechanical", "absolute", "champion"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_json_is_what_its_schema_says_and_comes_back_as_it_went(name):
    content = as_json(ALL[name])
    jsonschema.validate(content, SCHEMA)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [check["name"] for check in content["checks"]] == [check.name for check in ALL[name].verdict.checks]
    assert content["policy"] == POLICY.model_dump()


def test_the_json_holds_every_figure():
    content = as_json(BLESSED)
    assert content["measured"]["metrics"]["accuracy"] == CANDIDATE_MEASURED.metrics.accuracy
    assert content["measured"]["robustness"]["cells"]["fog"]["3"] == robust(0.8).cells["fog", 3]
    assert sum(each["n"] for each in content["champion_measured"]["reliability"]) == 1000
    assert content["comparison"]["smallest_seen"] == COMPARISON.smallest_seen
    assert [each["label"] for each in content["comparison"]["classes"]] == list(CLASS_NAMES)
    assert content["checks"][0]["low"] == CANDIDATE_MEASURED.metrics.accuracy_low


def test_figures_that_are_none_are_said_on_the_page_and_null_in_json():
    checks = (
        Check("broken", "absolute", False, "nothing to see", math.nan, -math.inf, math.inf, np.float64(0.5)),
        Check("absent", "absolute", False, "was not measured", bound=0.3),
    )
    made = report(checks=checks)
    broken, *_ = as_json(made)["checks"]
    assert (broken["figure"], broken["low"], broken["high"], broken["bound"]) == (None, None, None, 0.5)
    json.dumps(as_json(made), allow_nan=False)
    rows = Page(as_html(made)).rows
    assert ["broken", "✗ fails", "not a number", "-∞ to ∞", "0.5000", "nothing to see"] in rows
    assert ["absent", "✗ fails", "–", "–", "0.3000", "was not measured"] in rows


def test_the_form_that_serves_is_told_with_its_figures_or_with_why_there_are_none(pages):
    shown = pages["blessed"].text
    for figure in ("2.00 times as fast", "8.50 ms to 4.25 ms", "5.50 ms", "float32 9.75 ms", "below 0.003"):
        assert figure in shown, figure
    assert as_json(BLESSED)["engine"]["comparison"]["int8"] == {"median_ms": 4.25, "p95_ms": 5.5}
    assert "fp32: the version has no int8 form." in pages["broken"].text
    assert "int8 less float32" not in pages["broken"].text
