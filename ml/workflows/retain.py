"""Removes the predictions that are older than they are kept."""

from typing import Any

from ml.monitoring.retention import remove_old
from ml.settings import Settings


def retain(settings: Settings) -> dict[str, Any]:
    """Removes whole days of predictions older than `prediction_retention_days`, with all that hangs on them.

    Returns:
        `before` (the first day that is kept), `days` (those removed), `requests` and `shadow_predictions` (how many
        went); JSON-able.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked, or somebody reads those days; run it again.
    """
    removed = remove_old(settings.database_url, settings.prediction_retention_days)
    return {
        "before": removed.before.isoformat(),
        "days": [day.isoformat() for day in removed.days],
        "requests": removed.requests,
        "shadow_predictions": removed.shadow_predictions,
    }
