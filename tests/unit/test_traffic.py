"""Which requests are of the share, and what traffic can be."""

from datetime import UTC, datetime
from uuid import UUID, uuid4

import numpy as np
import pytest
from scipy.stats import binom

from ml.traffic import Mirrored, Traffic

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("ids", ["drawn", "counted up"])
def test_the_share_is_honoured(share, ids):
    n = 20_000
    requests = [uuid4() if ids == "drawn" else UUID(int=k) for k in range(n)]
    traffic = Traffic(2, "canary", share, NOW)
    chosen = sum(map(traffic.chooses, requests))
    # Both sides together: one run in a hundred million fails.
    assert binom.ppf(5e-9, n, share) <= chosen <= binom.ppf(1 - 5e-9, n, share)


def test_a_share_of_one_is_everything_and_a_request_is_always_or_never_chosen():
    requests = [uuid4() for _ in range(2000)]
    assert all(map(Traffic(2, "mirror", 1, NOW).chooses, requests))
    few, same, more = (Traffic(version, "canary", share, NOW) for version, share in [(2, 0.2), (3, 0.2), (2, 0.4)])
    for request in requests:
        assert few.chooses(request) == same.chooses(request)
        assert more.chooses(request) or not few.chooses(request)  # a larger share keeps those that it had


@pytest.mark.parametrize(
    ("challenger", "champion", "gets"), [(2, 1, True), (2, None, True), (3, 1, False), (2, 2, False), (3, 3, False)]
)
def test_it_is_for_its_own_version_while_that_is_the_challenger_and_not_the_champion(challenger, champion, gets):
    assert Traffic(2, "mirror", 1, NOW).is_for(challenger, champion) is gets


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0},
        {"share": 1.01},
        {"share": float("nan")},
        {"share": True},
        {"share": "1"},
        {"mode": "shadow"},
        {"version": 0},
        {"version": "2"},
        {"since": datetime(2026, 11, 23)},
    ],
)
def test_traffic_that_cannot_be_is_not_made(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Traffic(**({"version": 2, "mode": "mirror", "share": 0.5, "since": NOW} | wrong))


def test_disagreements_are_images_of_another_class_and_a_failure_is_none():
    answered = {
        "request_id": uuid4(),
        "created_at": NOW,
        "champion_version": 1,
        "challenger_version": 2,
        "champion_classes": np.array([3, 4, 5]),
        "champion_ms": 1.0,
    }
    probabilities = np.eye(10, dtype=np.float32)[[3, 0, 0]]
    assert Mirrored(**answered, probabilities=probabilities, challenger_ms=2.0, failure=None).disagreements == 2
    assert Mirrored(**answered, probabilities=None, challenger_ms=None, failure="it broke").disagreements == 0
