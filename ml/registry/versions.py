"""The model registry as the server, the gate and the monitor see it: versions, aliases, tags and files.

Imports nothing beyond mlflow-skinny, so that the prediction server needs no more. Making a version is
`ml.registry.packaging`'s; deciding which one serves is `ml.workflows.promote`'s.

A version's files, here and in MLflow:

    MLmodel, code/, requirements.txt ...   what `mlflow models serve` needs
    artifacts/model.onnx                   what is served and scored, in float32
    artifacts/model.keras                  what training goes on from
    artifacts/reference.parquet            held-out predictions that drift is measured against
    artifacts/golden.npz                   an image of each class that it has right, and what it says of it
    artifacts/card.md                      what it is, in words
    artifacts/model.int8.onnx              the same model in 8 bits, with a reference and golden images of its own; not
                                           all versions have it

Which of the two forms serves is the version's tag `engine`; one without the tag serves float32. Beside them lies what
was found out about it later, each in a folder of its own: see `Registry.attach`.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ml.digests import file_digest
from ml.errors import ModelInvalid, ModelNotFound, RegistryError, RegistryUnavailable, StorageError
from ml.registry.connection import BULK, Limits, asking

logger = logging.getLogger(__name__)

MODEL_NAME = "cifar10-classifier"
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"

ONNX_FILE, KERAS_FILE, REFERENCE_FILE, CARD_FILE = "model.onnx", "model.keras", "reference.parquet", "card.md"
GOLDEN_FILE = "golden.npz"
MODEL_FILES = (ONNX_FILE, KERAS_FILE, REFERENCE_FILE, GOLDEN_FILE, CARD_FILE)
"""Names under a version's artifacts/. Versions of before golden images lack theirs: callers name what they need."""
_DECLARATION = "MLmodel"


@dataclass(frozen=True, slots=True)
class Form:
    """One of the forms in which a version may serve, and the files that go with it."""

    engine: Literal["fp32", "int8"]
    onnx: str
    reference: str
    """Its own predictions: drift is measured against what this form says."""
    golden: str

    @property
    def files(self) -> tuple[str, ...]:
        """All that a version has of this form alone."""
        return (self.onnx, self.reference, self.golden)


FP32 = Form("fp32", ONNX_FILE, REFERENCE_FILE, GOLDEN_FILE)
INT8 = Form("int8", "model.int8.onnx", "reference.int8.parquet", "golden.int8.npz")
TAG_ENGINE, TAG_ENGINE_REASON = "engine", "engine.reason"
TAG_INT8 = "int8"
"""Whether a version has that form: `made`, or why not. Versions of before there was one lack the tag."""
MADE = "made"

TAG_ARCHITECTURE, TAG_DATASET, TAG_DATA, TAG_WEIGHTS = "architecture", "dataset_id", "data", "weights"
TAG_DECISION, TAG_REASON = "gate.decision", "gate.reason"
TAG_LOGGED_MODEL = "logged_model"
"""The id of MLflow's logged model, which holds the version's files."""
PENDING = "pending"
"""The decision on a version that waits for the gate; the others are `ml.evaluation.gate.Outcome`'s."""

VALIDATION_ACCURACY = "validation_accuracy"
"""The figure by which the gate chooses among candidates."""

_OWN_FOLDERS = ("", "artifacts", "code")


def metric_tag(name: str) -> str:
    """The tag of a version that holds a figure measured at its registration."""
    return f"metric.{name}"


def checksum_tag(file: str) -> str:
    """The tag that holds the SHA-256 of one of a version's files."""
    return f"sha256.{file}"


def form_of(engine: str) -> Form:
    """The form of that name.

    Raises:
        ModelInvalid: there is no such form.
    """
    for form in (FP32, INT8):
        if form.engine == engine:
            return form
    raise ModelInvalid(
        f"{engine!r} is no form in which a version serves.",
        fix=f"set the version's tag {TAG_ENGINE} with `cifar10 engine VERSION fp32`.",
    )


def served_form(tags: Mapping[str, str]) -> Form:
    """The form in which the version with these tags serves.

    Raises:
        ModelInvalid: its tag names none. Serving another than was chosen would be a guess.
    """
    return form_of(tags.get(TAG_ENGINE, FP32.engine))


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model, as it stood when it was asked for."""

    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str] = field(repr=False)
    created_at: datetime

    @property
    def architecture(self) -> str:
        """`baseline` or `vgg16`."""
        return self.tags.get(TAG_ARCHITECTURE, "")

    @property
    def dataset_id(self) -> str:
        """The dataset that it was trained on."""
        return self.tags.get(TAG_DATASET, "")

    @property
    def data(self) -> str:
        """`cifar-10` or `SYNTHETIC`, the word shown to users."""
        return self.tags.get(TAG_DATA, "")

    @property
    def weights(self) -> str:
        """What it started from."""
        return self.tags.get(TAG_WEIGHTS, "")

    @property
    def decision(self) -> str:
        """`pending`, `promoted` or `refused`; empty where the gate knows nothing of it."""
        return self.tags.get(TAG_DECISION, "")

    @property
    def form(self) -> Form:
        """What serves of it; see `served_form`."""
        return served_form(self.tags)

    @property
    def has_int8(self) -> bool:
        """Whether it was registered with an int8 form."""
        return checksum_tag(INT8.onnx) in self.tags

    @property
    def validation_accuracy(self) -> float | None:
        """As it was measured at the registration."""
        return self.figure(metric_tag(VALIDATION_ACCURACY))

    def figure(self, tag: str) -> float | None:
        """A tag's value as a number; None where there is none or it is not a number."""
        try:
            return float(self.tags[tag])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class RegisteredModel:
    """The registered model as a whole: which version bears which alias, and its tags.

    `created_at` tells it from one of the same name that was made anew, and counts its versions from 1 again.
    """

    aliases: Mapping[str, int]
    tags: Mapping[str, str] = field(repr=False)
    created_at: datetime


class Registry:
    """The versions of one registered model at one MLflow server. Holds no state; threads may share it.

    Every method raises RegistryUnavailable, within ten seconds, where MLflow could not be asked; that says nothing of
    what it would have answered. Only `fetch`, `attach` and `read_attached`, which move files, may take longer.
    """

    def __init__(self, tracking_uri: str, name: str = MODEL_NAME) -> None:
        self.tracking_uri = tracking_uri
        self.name = name
        with asking(tracking_uri):
            self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    def by_alias(self, alias: str) -> ModelVersion | None:
        """The version that bears `alias`; None where MLflow answered that there is none."""
        try:
            return self._bearer(alias)
        except ModelNotFound:
            return None
        except RegistryError:
            # MLflow reports a missing alias as an invalid parameter, as it does other things: ask what it has.
            if alias not in self._aliases():
                return None
        # It has it: set between the two questions, or something else is wrong and is said again.
        return self._bearer(alias)

    def by_version(self, version: int) -> ModelVersion:
        """One version by its number.

        Raises:
            ModelNotFound: where there is none of that number.
        """
        with asking(self.tracking_uri):
            return _version(self._client.get_model_version(self.name, str(version)))

    def versions(self, dataset_id: str | None = None, decision: str | None = None) -> list[ModelVersion]:
        """All versions, newest first; of one dataset, of one decision, where given. Empty where there is none."""
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            with asking(self.tracking_uri):
                page = self._client.search_model_versions(f"name = '{self.name}'", max_results=500, page_token=token)
            found += [_version(item) for item in page]
            token = page.token
            if not token:
                break
        # A search comes back without aliases: MLflow keeps them with the model.
        bearing: dict[int, list[str]] = {}
        for alias, number in self._aliases().items() if found else ():
            bearing.setdefault(number, []).append(alias)
        chosen = [
            replace(item, aliases=tuple(sorted(bearing.get(item.version, []))))
            for item in found
            if (dataset_id is None or item.dataset_id == dataset_id) and (decision is None or item.decision == decision)
        ]
        return sorted(chosen, key=lambda item: item.version, reverse=True)

    def set_alias(self, alias: str, version: int) -> None:
        """Points `alias` at `version`, wherever it pointed before."""
        with asking(self.tracking_uri):
            self._client.set_registered_model_alias(self.name, alias, str(version))

    def set_tags(self, version: int, tags: Mapping[str, object]) -> None:
        """Writes tags on a version, replacing those of the same key."""
        for key, value in tags.items():
            with asking(self.tracking_uri):
                self._client.set_model_version_tag(self.name, str(version), key, str(value))

    def model(self) -> RegisteredModel | None:
        """Aliases and tags in one question; None where there is no registered model yet."""
        try:
            with asking(self.tracking_uri):
                found = self._client.get_registered_model(self.name)
        except ModelNotFound:
            return None
        return RegisteredModel(
            aliases={alias: int(version) for alias, version in found.aliases.items()},
            tags=dict(found.tags),
            created_at=_time(found.creation_timestamp),
        )

    def model_tag(self, key: str) -> str | None:
        """A tag of the registered model as a whole; None where there is none."""
        model = self.model()
        return None if model is None else model.tags.get(key)

    def set_model_tag(self, key: str, value: str) -> None:
        """Writes a tag on the registered model as a whole."""
        with asking(self.tracking_uri):
            self._client.set_registered_model_tag(self.name, key, value)

    def delete_model_tag(self, key: str) -> None:
        """Takes a tag of the registered model away."""
        with asking(self.tracking_uri):
            self._client.delete_registered_model_tag(self.name, key)

    def fetch(
        self,
        version: ModelVersion | int,
        cache_dir: Path,
        files: Sequence[str] = MODEL_FILES,
        *,
        limits: Limits = BULK,
    ) -> Path:
        """Brings a version's files into `cache_dir`/models/<name>/<version>/artifacts/ and returns <version>'s folder.

        A file that lies there with the right SHA-256 is not asked for again, so `cache_dir` may hold a server's ONNX
        file alone and be completed later. Each file appears whole and verified, or not at all.

        Args:
            version: which one.
            cache_dir: a folder of the caller's; made where there is none.
            files: names out of `MODEL_FILES` or of `INT8`'s; those of `MODEL_FILES` where none are given.
            limits: how long the server may be silent; shorter for a file that something more urgent waits behind.

        Raises:
            ModelNotFound: where there is no such version.
            ModelInvalid: a file is missing, or is not the one that was registered.
            StorageError: `cache_dir` cannot be read or written.
        """
        wanted = self.by_version(version) if isinstance(version, int) else version
        folder = cache_dir / "models" / wanted.name / str(wanted.version)
        target = folder / "artifacts"
        try:
            missing = [file for file in files if not _holds(target / file, self._checksum(wanted, file))]
            if not missing:
                return folder
            target.mkdir(parents=True, exist_ok=True)
            # On the same file system as the target, so that the move at the end is one step.
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
                for file in missing:
                    self._download(wanted, file, Path(partial), target, limits)
        except RegistryUnavailable:
            raise
        except OSError as error:
            raise StorageError(
                f"The files of {wanted.name} version {wanted.version} could not be kept in {folder}: {error}.",
                fix="make room there, or see that the folder may be read and written.",
            ) from error
        return folder

    def attach(self, version: ModelVersion, folder: Path, under: str) -> None:
        """Puts the files of a local folder beside the version's own, under `under`/, where MLflow's page shows them.

        A file of the same name is replaced; others that lie there stay. Safe to repeat: each file appears whole.

        Args:
            version: which one.
            folder: what to upload, with its subfolders; holds one file or more.
            under: a relative path such as `gate`; not one that the version's own files lie in.

        Raises:
            ModelInvalid: it was registered by something else.
            ModelNotFound: its files were deleted in MLflow.
            StorageError: there is nothing in `folder`, or it cannot be read.
            ValueError: `under` is the version's own.
        """
        if under.split("/", maxsplit=1)[0] in (*_OWN_FOLDERS, ".", ".."):
            raise ValueError(f"Files cannot be attached under {under!r}: the version's own lie there.")
        if not any(path.is_file() for path in folder.rglob("*")):
            raise StorageError(f"There is no file in {folder} to attach.", fix="write the files there first.")
        store = self._files_of(self._logged_model(version))
        try:
            with asking(self.tracking_uri, BULK):
                store.log_artifacts(str(folder), under)
        except OSError as error:
            raise StorageError(
                f"The files of {folder} could not be read: {error}.", fix="see that they may be read, then try again."
            ) from error

    def read_attached(self, version: ModelVersion, path: str) -> bytes:
        """The content of an attached file; `path` is relative, such as `gate/report.json`.

        Raises:
            ModelInvalid: the version was registered by something else.
            ModelNotFound: MLflow answered that there is no such file.
        """
        store = self._files_of(self._logged_model(version))
        with asking(self.tracking_uri):
            # Listed first: MLflow reports a file that is missing and a server that is away alike.
            listed = store.list_artifacts(path.rpartition("/")[0] or None)
        if path not in {item.path for item in listed if not item.is_dir}:
            raise ModelNotFound(
                f"{version.name} version {version.version} has no file {path} attached.",
                fix="see its page in MLflow for what it has.",
            )
        with tempfile.TemporaryDirectory(prefix="attached-") as folder:
            with asking(self.tracking_uri, BULK):
                local = Path(store.download_artifacts(path, folder))
            return local.read_bytes()

    def attachment_page(self, version: ModelVersion, public_url: str) -> str:
        """The address at which a person sees the version's files, and what is attached to it, in MLflow's pages.

        Args:
            version: which one.
            public_url: MLflow's address as a browser reaches it.

        Raises:
            ModelInvalid: the version was registered by something else.
            ModelNotFound: its files were deleted in MLflow.
        """
        model = self._logged_model(version)
        page = f"experiments/{model.experiment_id}/models/{model.model_id}/artifacts"
        return f"{public_url.rstrip('/')}/#/{page}"

    def fetch_declaration(self, version: ModelVersion, folder: Path) -> Path:
        """Brings what MLflow wrote of a version, its `MLmodel`, into `folder` and returns the file's path.

        `ml.registry.signature` reads it. MLflow writes it, so there is no checksum to hold it to.

        Raises:
            ModelNotFound: where there is no such version.
            ModelInvalid: the file is missing.
        """
        self._bring(version, _DECLARATION, folder)
        return folder / _DECLARATION

    def _bearer(self, alias: str) -> ModelVersion:
        with asking(self.tracking_uri):
            return _version(self._client.get_model_version_by_alias(self.name, alias))

    def _aliases(self) -> Mapping[str, int]:
        model = self.model()
        return {} if model is None else model.aliases

    def _logged_model(self, version: ModelVersion) -> LoggedModel:
        try:
            model_id = version.tags[TAG_LOGGED_MODEL]
        except KeyError:
            raise ModelInvalid(
                f"{version.name} version {version.version} has no record of where MLflow keeps its files.",
                fix="it was registered by something else: register models with `cifar10 train`.",
            ) from None
        with asking(self.tracking_uri):
            return self._client.get_logged_model(model_id)

    def _files_of(self, model: LoggedModel) -> ArtifactRepository:
        # Not the client's methods: they keep for the whole process which server an id was first looked up at.
        with asking(self.tracking_uri):
            return get_artifact_repository(model.artifact_location, tracking_uri=self.tracking_uri)

    def _checksum(self, version: ModelVersion, file: str) -> str:
        try:
            return version.tags[checksum_tag(file)]
        except KeyError:
            raise ModelInvalid(
                f"{version.name} version {version.version} has no record of a file {file}.",
                fix="it was registered by something else: register models with `cifar10 train`.",
            ) from None

    def _download(self, version: ModelVersion, file: str, partial: Path, target: Path, limits: Limits) -> None:
        self._bring(version, f"artifacts/{file}", partial, limits)
        if not _holds(partial / file, self._checksum(version, file)):
            raise self._invalid(version, f"has another {file} than the one that was registered (SHA-256 differs)")
        (partial / file).replace(target / file)

    def _bring(self, version: ModelVersion, path: str, folder: Path, limits: Limits = BULK) -> None:
        """Downloads one file, by its path in the version, into `folder`."""
        *above, file = path.split("/")
        logger.info("Fetching %s of %s version %d", file, version.name, version.version)
        with asking(self.tracking_uri):
            root = self._client.get_model_version_download_uri(version.name, str(version.version))
        try:
            with asking(self.tracking_uri, limits):
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{root}/{path}", dst_path=str(folder), tracking_uri=self.tracking_uri
                )
        except (RegistryUnavailable, RegistryError) as error:
            # MLflow reports a file that is gone and a server that is gone alike: ask what is there.
            if self._stands("/".join([root, *above]), file):
                raise
            raise self._invalid(version, f"has lost its file {file}") from error

    def _stands(self, folder_uri: str, file: str) -> bool:
        with asking(self.tracking_uri):
            listed = mlflow.artifacts.list_artifacts(artifact_uri=folder_uri, tracking_uri=self.tracking_uri)
        return any(Path(item.path).name == file for item in listed)

    @staticmethod
    def _invalid(version: ModelVersion, what: str) -> ModelInvalid:
        return ModelInvalid(
            f"{version.name} version {version.version} {what}.",
            fix="train and register it anew; `cifar10 rollback` restores the previous champion if this one serves.",
        )


def _holds(path: Path, checksum: str) -> bool:
    return path.is_file() and file_digest(path) == checksum


def _version(item: MlflowVersion) -> ModelVersion:
    return ModelVersion(
        name=item.name,
        version=int(item.version),
        run_id=item.run_id or "",
        aliases=tuple(sorted(item.aliases)),
        tags=dict(item.tags),
        created_at=_time(item.creation_timestamp),
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
