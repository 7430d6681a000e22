"""The DAG files. They declare only; what a task does lives in `ml.workflows`."""
