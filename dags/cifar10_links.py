"""Links on a task in the Airflow UI to what it made elsewhere."""

from typing import Any

from airflow.sdk import BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom


class GateReport(BaseOperatorLink):
    """The report of what a promotion judged: of the version that it promoted, else of the newest."""

    name = "Gate report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002 - Airflow's form
        """The page's address in MLflow's UI; empty where nothing was judged."""
        result = XCom.get_value(ti_key=ti_key, key="return_value") or {}
        judged = sorted(
            result.get("candidates", []), key=lambda item: (item["decision"] == "promoted", item["version"])
        )
        return next((item["report"] for item in reversed(judged) if item["report"]), "")
