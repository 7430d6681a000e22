"""What the logs could not keep: how many rows are missing, from when to when, and why.

Owns the table `prediction_gaps`. The log that lost them writes a row (`ml.monitoring.batch_writer`), once PostgreSQL
can be asked; the monitor tells people, once.
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Gap:
    """Rows that are missing from a log. `reason` is said in words; the times are in UTC, by the server's clock."""

    id: str
    log: str
    began_at: datetime
    ended_at: datetime
    rows: int
    reason: str


def gaps_to_json(gaps: list[Gap]) -> str:
    """To be kept where PostgreSQL cannot be asked; empty for none."""
    return json.dumps([asdict(gap) for gap in gaps], default=datetime.isoformat) if gaps else ""


def gaps_from_json(text: str) -> list[Gap]:
    """What `gaps_to_json` wrote.

    Raises:
        ValueError: when it is none.
    """
    try:
        return [
            Gap(**{**found, **{name: datetime.fromisoformat(found[name]) for name in ("began_at", "ended_at")}})
            for found in (json.loads(text) if text else [])
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"no list of gaps: {error}") from error


def insert_gaps(cursor: Any, gaps: list[Gap]) -> None:
    """Writes rows; one that is there already stays as it is."""
    for gap in gaps:
        cursor.execute(
            "INSERT INTO prediction_gaps (id, log, began_at, ended_at, rows, reason) VALUES (%s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (id) DO NOTHING",
            (gap.id, gap.log, gap.began_at, gap.ended_at, gap.rows, gap.reason),
        )


def take_untold_gaps(cursor: Any) -> list[Gap]:
    """The gaps of which nobody has been told, oldest first; with the transaction's end they count as told."""
    cursor.execute(
        "UPDATE prediction_gaps SET told_at = now() WHERE told_at IS NULL "
        "RETURNING id, log, began_at, ended_at, rows, reason"
    )
    return sorted((Gap(*row) for row in cursor.fetchall()), key=lambda gap: gap.began_at)


def gap_message(gap: Gap) -> str:
    """The alert's text."""
    return (
        f"{gap.log}: {gap.rows} rows are missing from {gap.began_at:%Y-%m-%d %H:%M:%S} to {gap.ended_at:%H:%M:%S} UTC "
        f"({gap.reason}). The requests were answered; the monitor does not see these predictions."
    )
