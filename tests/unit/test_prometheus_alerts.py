"""The rules shipped for Prometheus ask for figures that the server has."""

import re
from types import SimpleNamespace

import pytest
import yaml

from deploy.server.metrics import ServerMetrics
from ml.monitoring.batch_writer import LogState
from ml.serving.batcher import BatcherState
from ml.serving.hot_swap import FollowerState
from ml.settings import PROJECT_ROOT

RULES = [
    rule
    for group in yaml.safe_load((PROJECT_ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def having(state):
    return SimpleNamespace(state=lambda: state)


@pytest.fixture(scope="module")
def figures():
    log = having(LogState(1, 2, 3, True, 4, 5, 6, 7, 8, False))
    follower = having(FollowerState(model=None, failure=None, swaps=0, failed_swaps=0))
    batcher = having(BatcherState(queued=0, running=0, refused={"full": 0, "late": 0}, pace=0.0))
    metrics = ServerMetrics(follower, batcher, having(SimpleNamespace(counts={}, queued=0)), log, log)
    lines = metrics.exposition().decode().splitlines()
    return {
        line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("cifar10_") and "{" not in line
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_figures_that_there_are(rule, figures):
    asked = set(re.findall(r"cifar10_\w+", rule["expr"]))
    assert asked
    assert asked <= figures.keys()
    assert {name.split("_log_")[0] for name in asked} == {"cifar10_prediction", "cifar10_shadow"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]


def test_every_way_to_lose_predictions_has_a_rule():
    assert {rule["alert"] for rule in RULES} == {
        "PredictionsDropped",
        "PredictionsRefused",
        "PredictionSpoolHalfFull",
        "PredictionDatabaseAway",
        "PredictionSpoolFailing",
    }


def test_the_figures_are_the_states(figures):
    names = ["queued_rows", "written_rows_total", "dropped_rows_total", "database_up", "unspooled_rows_total",
             "refused_rows_total", "damaged_places_total", "spool_bytes", "spool_limit_bytes", "spool_up"]  # fmt: skip
    assert [figures[f"cifar10_prediction_log_{name}"] for name in names] == [1, 2, 3, 1, 4, 5, 6, 7, 8, 0]
