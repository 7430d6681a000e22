"""The MLflow tracking server and model registry; the only package that imports mlflow."""
