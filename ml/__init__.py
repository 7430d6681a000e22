"""The library behind the DAGs, the command line and the prediction server.

It knows neither Airflow nor Flask: `dags/` and `deploy/` are thin shells over `ml.workflows` and `ml.serving`.
"""
