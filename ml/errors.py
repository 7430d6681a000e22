"""Every error that this system raises on purpose.

    CifarError
    ├── ConfigurationError        a setting or a recipe cannot work
    ├── SourceError               the CIFAR-10 source
    │   ├── SourceNotFound        nothing lies there
    │   ├── SourceUnreachable     it could not be asked: network, timeout
    │   └── SourceCorrupt         it is there and is not what it should be
    ├── DatasetError              a stored dataset
    │   ├── DatasetNotFound       no dataset has this id
    │   └── DatasetInvalid        its content breaks a check
    ├── StorageError              a disk or an object store refused a write or a read
    ├── TrainingError             a training run cannot yield a model
    │   ├── TrainingDiverged      the loss is NaN or infinite
    │   └── NotReproduced         trained again, it came out otherwise
    ├── RegistryError             the registry answered, and the answer is no
    │   ├── ModelNotFound         no version, or no such alias
    │   ├── RunNotFound           no training run has this id
    │   └── ModelInvalid          the version's files are not a model that can be used
    ├── ServiceUnavailable        a service could not be asked; says nothing of what it would have answered
    │   ├── DatabaseUnavailable
    │   ├── RegistryUnavailable
    │   ├── OrchestratorUnavailable
    │   └── TooManyRequests       it answered that it is asked too often
    ├── RequestError              what a client sent
    │   ├── ImageUndecodable      not an image, or a broken one
    │   ├── ImageTooLarge         more bytes or pixels than allowed
    │   ├── ImageTypeUnsupported  an image or body of a type that is not accepted
    │   ├── ImageNotFound         no file has this path
    │   ├── ImageUnreadable       there is a file, and this user cannot read it
    │   ├── InputInvalid          the wrong shape, range or label
    │   └── PredictionNotFound    feedback for a prediction that was never logged
    └── StackError                the local stack
        ├── PortTaken             somebody else listens there
        └── ComponentFailed       a component ended or did not become ready

"There is none" and "could not ask" are never the same class, so that no caller can take one for the other.
"""


class CifarError(Exception):
    """Says what happened and what was expected (`message`), and how to mend it (`fix`)."""

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # Airflow and multiprocessing pickle exceptions; a keyword-only argument needs help to survive it.
        return (_rebuild, (type(self), self.message, self.fix))


def _rebuild(kind: type[CifarError], message: str, fix: str) -> CifarError:
    return kind(message, fix=fix)


class ConfigurationError(CifarError):
    """A setting or a recipe cannot work."""


class SourceError(CifarError):
    """The CIFAR-10 source."""


class SourceNotFound(SourceError):
    """Nothing lies there."""


class SourceUnreachable(SourceError):
    """It could not be asked: network, timeout."""


class SourceCorrupt(SourceError):
    """It is there and is not what it should be."""


class DatasetError(CifarError):
    """A stored dataset."""


class DatasetNotFound(DatasetError):
    """No dataset has this id."""


class DatasetInvalid(DatasetError):
    """Its content breaks a check."""


class StorageError(CifarError):
    """A disk or an object store refused a write or a read."""


class TrainingError(CifarError):
    """A training run cannot yield a model."""


class TrainingDiverged(TrainingError):
    """The loss is NaN or infinite."""


class NotReproduced(TrainingError):
    """Trained again, it came out otherwise."""


class RegistryError(CifarError):
    """The registry answered, and the answer is no."""


class ModelNotFound(RegistryError):
    """No version, or no such alias."""


class RunNotFound(RegistryError):
    """No training run has this id."""


class ModelInvalid(RegistryError):
    """The version's files are not a model that can be used."""


class ServiceUnavailable(CifarError):
    """A service could not be asked; says nothing of what it would have answered."""


class DatabaseUnavailable(ServiceUnavailable):
    """PostgreSQL could not be asked."""


class RegistryUnavailable(ServiceUnavailable):
    """MLflow could not be asked."""


class OrchestratorUnavailable(ServiceUnavailable):
    """Airflow could not be asked."""


class TooManyRequests(ServiceUnavailable):
    """It answered that it is asked too often."""


class RequestError(CifarError):
    """What a client sent."""


class ImageUndecodable(RequestError):
    """Not an image, or a broken one."""


class ImageTooLarge(RequestError):
    """More bytes or pixels than allowed."""


class ImageTypeUnsupported(RequestError):
    """An image or body of a type that is not accepted."""


class ImageNotFound(RequestError):
    """No file has this path."""


class ImageUnreadable(RequestError):
    """There is a file, and this user cannot read it."""


class InputInvalid(RequestError):
    """The wrong shape, range or label."""


class PredictionNotFound(RequestError):
    """Feedback for a prediction that was never logged."""


class StackError(CifarError):
    """The local stack."""


class PortTaken(StackError):
    """Somebody else listens there."""


class ComponentFailed(StackError):
    """A component ended or did not become ready."""
