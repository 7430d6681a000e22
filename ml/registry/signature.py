"""What a version's `MLmodel` declares that it takes and gives. Reads the file; `ml.registry.versions` brings it.

Apart from it: MLflow's models need more than mlflow-skinny, which is all that the prediction server has.
"""

from pathlib import Path

import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from ml.errors import ModelInvalid

Form = tuple[str, tuple[int, ...]]
"""Of a tensor: numpy's name of its dtype, and its shape, -1 where any size will do."""


def read_signature(path: Path) -> tuple[Form, Form]:
    """The forms of the input and of the output, of which there must be one each.

    Raises:
        ModelInvalid: the file declares something else, nothing, or is no such file.
    """
    try:
        signature = Model.load(str(path)).signature
        sides = [list(signature.inputs), list(signature.outputs)]
        (given,), (made,) = sides
        return (str(given.type), tuple(given.shape)), (str(made.type), tuple(made.shape))
    except (MlflowException, yaml.YAMLError, OSError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise ModelInvalid(
            f"{path.name} declares no signature of one tensor to one tensor ({type(error).__name__}).",
            fix="register models with `cifar10 train`, which declares it.",
        ) from error
