"""The local stack: starts PostgreSQL, MLflow, Airflow, the prediction server and the reports, and stops all of it."""
