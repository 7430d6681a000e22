"""The library behind the DAGs, the command line and the prediction server.

It knows neither Airflow nor Flask: `dags/` and `deploy/` are thin shells over `ml.workflows` and `ml.serving`.
"""

import os

# ONNX Runtime reports its use to its maker unless it finds this when it is imported; nothing here phones home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
