"""### Train the baseline CNN

3x3 convolutions from 32 filters, batch normalisation, max pooling, dropout, dense layers; Adam and categorical
cross-entropy. Runs after each new dataset, by hand, or when the monitor asks for a retraining. The model is registered
as a candidate; `cifar10_promote` judges it.
"""

from datetime import timedelta

from dags.cifar10_shared import BASELINE_CANDIDATE
from dags.cifar10_training import training_dag

# Airflow finds a DAG file by the words "airflow" and "dag" in it.
training_dag("cifar10_train_baseline", "baseline", BASELINE_CANDIDATE, timeout=timedelta(hours=3), doc_md=__doc__ or "")
