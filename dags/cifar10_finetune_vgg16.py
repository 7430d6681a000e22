"""### Fine-tune VGG16

Stage 1 freezes the convolutional base and trains a new head; stage 2 unfreezes the top four layers (block5_conv1 to
block5_conv3 and the pool) at a lower learning rate. Both stages' metrics are kept. The model is registered as a
candidate; `cifar10_promote` judges it.
"""

from datetime import timedelta

from dags.cifar10_shared import VGG16_CANDIDATE
from dags.cifar10_training import training_dag

# Airflow finds a DAG file by the words "airflow" and "dag" in it.
training_dag("cifar10_finetune_vgg16", "vgg16", VGG16_CANDIDATE, timeout=timedelta(hours=12), doc_md=__doc__ or "")
