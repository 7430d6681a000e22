"""The registry as the server, the gate and the monitor see it, against a real MLflow and against what is not one."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from ml.digests import file_digest
from ml.errors import ModelInvalid, ModelNotFound, RegistryError, RegistryUnavailable, StorageError
from ml.registry import versions
from ml.registry.versions import Registry
from tests.tiny_models import always
from tests.tiny_versions import empty_registry, register_tiny, small_dataset, take_alias


@pytest.fixture
def here(settings, mlflow_uri):
    empty_registry(mlflow_uri)
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


@contextmanager
def impostor(status: int, body: bytes, content_type: str):
    """Some other HTTP server at MLflow's address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_empty_registry_is_there_is_none(here):
    registry = Registry(here.tracking_uri)
    assert registry.by_alias("champion") is None
    assert registry.versions() == []
    with pytest.raises(ModelNotFound):
        registry.by_version(1)


def test_a_model_without_that_alias_is_there_is_none(here, tmp_path):
    register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    assert registry.by_alias("champion") is None


ANSWERS = {
    "another server's page": (404, b"<html>not here</html>", "text/html"),
    "another server's JSON": (404, b'{"detail": "Not Found"}', "application/json"),
    "a proxy without a backend": (502, b"bad gateway", "text/plain"),
    "a failing server": (
        500,
        json.dumps({"error_code": "INTERNAL_ERROR", "message": "x"}).encode(),
        "application/json",
    ),
    "a database that is away": (
        503,
        json.dumps({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "x"}).encode(),
        "application/json",
    ),
    "a database that broke off": (400, json.dumps({"error_code": "BAD_REQUEST"}).encode(), "application/json"),
    "a sign-in page": (200, b"<html>please log in</html>", "text/html"),
    "no permission": (403, json.dumps({"error_code": "PERMISSION_DENIED"}).encode(), "application/json"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_not_mlflows_answer_is_could_not_ask(answer):
    with impostor(*answer) as uri:
        registry = Registry(uri)
        for ask in (
            lambda: registry.by_alias("champion"),
            lambda: registry.by_version(1),
            registry.versions,
            lambda: registry.model_tag("x"),
        ):
            with pytest.raises(RegistryUnavailable, match="could not be asked"):
                ask()


def test_a_dead_port_is_could_not_ask(settings):
    registry = Registry("http://127.0.0.1:9")
    with pytest.raises(RegistryUnavailable, match="could not be asked"):
        registry.by_alias("champion")
    with pytest.raises(RegistryUnavailable):
        registry.set_alias("champion", 1)


def test_mlflows_limits_are_put_back(settings):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    before = (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get_raw(), MLFLOW_HTTP_REQUEST_TIMEOUT.get_raw())
    with pytest.raises(RegistryUnavailable):
        Registry("http://127.0.0.1:9").versions()
    assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get_raw(), MLFLOW_HTTP_REQUEST_TIMEOUT.get_raw()) == before


def test_versions_are_found_by_dataset_and_decision_newest_first(here, tmp_path):
    first, second = small_dataset(here, seed=1), small_dataset(here, seed=2)
    for number, manifest in enumerate((first, first, second), start=1):
        register_tiny(here, manifest, tmp_path / str(number))
    registry = Registry(here.tracking_uri)
    registry.set_tags(1, {"gate.decision": "refused"})
    assert [v.version for v in registry.versions()] == [3, 2, 1]
    assert [v.version for v in registry.versions(dataset_id=first.dataset_id)] == [2, 1]
    assert [v.version for v in registry.versions(first.dataset_id, "pending")] == [2]
    registry.set_alias("champion", 2)
    assert registry.by_alias("champion") == registry.by_version(2) == registry.versions()[1]
    assert registry.by_version(2).aliases == ("champion",)
    take_alias(registry, "champion")
    assert registry.by_alias("champion") is None


def test_an_alias_that_is_set_between_two_questions_is_found(here, tmp_path, monkeypatch):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    listed = Registry._aliases

    def later(self):
        self.set_alias("champion", version.version)
        return listed(self)

    monkeypatch.setattr(Registry, "_aliases", later)
    assert registry.by_alias("champion").version == version.version


def test_an_alias_that_is_there_and_refused_all_the_same_is_an_error(here, tmp_path):
    register_tiny(here, small_dataset(here), tmp_path)
    refusing = Registry(here.tracking_uri)

    def refuse(*_):
        raise MlflowException("no", error_code=INVALID_PARAMETER_VALUE)

    refusing._client.get_model_version_by_alias = refuse
    with pytest.raises(RegistryError, match="refused"):
        refusing.by_alias("challenger")


def test_the_address_is_told_without_its_password():
    registry = Registry("http://me:s3cret@127.0.0.1:9")
    with pytest.raises(RegistryUnavailable, match=r"http://127\.0\.0\.1:9") as error:
        registry.versions()
    assert "s3cret" not in str(error.value)


def test_fetch_brings_what_is_asked_for_once_and_whole(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    folder = registry.fetch(version, here.cache_dir, files=("model.onnx",))
    assert folder == here.cache_dir / "models" / version.name / "1"
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [
        "artifacts/model.onnx"
    ]
    assert (folder / "artifacts/model.onnx").read_bytes() == (tmp_path / "trained.onnx").read_bytes()

    born = (folder / "artifacts/model.onnx").stat().st_ino
    registry.fetch(version.version, here.cache_dir)
    assert (folder / "artifacts/model.onnx").stat().st_ino == born, "a file that is there was brought again"
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert names == ["card.md", "golden.npz", "model.keras", "model.onnx", "reference.parquet"]


def test_a_cached_file_that_was_altered_is_brought_again(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    onnx = registry.fetch(version, here.cache_dir, files=("model.onnx",)) / "artifacts/model.onnx"
    right = file_digest(onnx)
    onnx.write_bytes(onnx.read_bytes()[:-10])
    registry.fetch(version, here.cache_dir, files=("model.onnx",))
    assert file_digest(onnx) == right


def test_a_cached_file_that_cannot_be_read_is_the_disks_fault(here, tmp_path, monkeypatch):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    registry.fetch(version, here.cache_dir, files=("model.onnx",))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(versions, "file_digest", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        registry.fetch(version, here.cache_dir, files=("model.onnx",))


def test_a_file_in_the_cache_needs_no_registry(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    Registry(here.tracking_uri).fetch(version, here.cache_dir, files=("model.onnx",))
    away = Registry("http://127.0.0.1:9")
    assert away.fetch(version, here.cache_dir, files=("model.onnx",)).is_dir()
    with pytest.raises(RegistryUnavailable):
        away.fetch(version, here.cache_dir, files=("model.keras",))


def test_another_file_than_the_registered_one_is_refused_and_not_kept(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    registry.set_tags(1, {"sha256.model.onnx": "0" * 64})
    with pytest.raises(ModelInvalid, match="SHA-256"):
        registry.fetch(1, here.cache_dir, files=("model.onnx",))
    assert not [path for path in here.cache_dir.rglob("*") if path.is_file()]
    assert registry.fetch(version, here.cache_dir, files=("card.md",)).is_dir()


def test_a_lost_file_is_not_an_outage(here, tmp_path):
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    register_tiny(here, small_dataset(here), tmp_path, model=always(1))
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    root = client.get_model_version_download_uri("cifar10-classifier", "1")
    get_artifact_repository(root, tracking_uri=here.tracking_uri).delete_artifacts("artifacts/model.onnx")
    with pytest.raises(ModelInvalid, match=r"lost its file model\.onnx"):
        Registry(here.tracking_uri).fetch(1, here.cache_dir)


def test_a_version_that_something_else_registered_has_no_files_to_trust(here, tmp_path):
    import mlflow

    register_tiny(here, small_dataset(here), tmp_path)
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    theirs = client.create_logged_model("0", name="theirs")
    client.create_model_version("cifar10-classifier", f"models:/{theirs.model_id}", model_id=theirs.model_id)
    with pytest.raises(ModelInvalid, match="no record"):
        Registry(here.tracking_uri).fetch(2, here.cache_dir)


def attached(folder, content: bytes):
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_bytes(content)
    (folder / "plots" / "one.png").write_bytes(b"png")
    return folder


def test_what_is_attached_is_listed_read_back_and_replaced(here, tmp_path):
    import mlflow

    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    registry.attach(version, attached(tmp_path / "first", b"1"), "gate")
    registry.attach(version, attached(tmp_path / "second", b"22"), "gate")
    assert registry.read_attached(version, "gate/report.json") == b"22"
    assert registry.read_attached(registry.by_version(1), "gate/plots/one.png") == b"png"
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    listed = client.list_logged_model_artifacts(version.tags["logged_model"], "gate")
    assert [(item.path, item.is_dir) for item in listed] == [("gate/plots", True), ("gate/report.json", False)]
    assert registry.fetch(version, here.cache_dir).is_dir(), "the version's own files were touched"


def test_what_was_not_attached_is_there_is_none(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    registry.attach(version, attached(tmp_path / "files", b"1"), "gate")
    for path in ("gate/other.json", "nowhere/report.json", "report.json", "gate/plots", "gate"):
        with pytest.raises(ModelNotFound, match=f"no file {path} attached"):
            registry.read_attached(version, path)


def test_attaching_with_the_registry_away_is_could_not_ask(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    away = Registry("http://127.0.0.1:9")
    for ask in (
        lambda: away.attach(version, attached(tmp_path / "files", b"1"), "gate"),
        lambda: away.read_attached(version, "gate/report.json"),
        lambda: away.attachment_page(version, "http://mlflow"),
    ):
        with pytest.raises(RegistryUnavailable, match="could not be asked"):
            ask()


def test_nothing_is_attached_over_the_versions_own_files_nor_from_an_empty_folder(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    registry = Registry(here.tracking_uri)
    for under in ("artifacts", "artifacts/more", "", "/gate", "../gate"):
        with pytest.raises(ValueError, match="version's own"):
            registry.attach(version, attached(tmp_path / "files", b"1"), under)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="no file"):
        registry.attach(version, tmp_path / "empty", "gate")


def test_the_page_of_the_attachments_is_the_logged_models(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    page = Registry(here.tracking_uri).attachment_page(version, "http://mlflow.example/")
    assert page.startswith("http://mlflow.example/#/experiments/")
    assert page.endswith(f"/models/{version.tags['logged_model']}/artifacts")


def test_to_a_version_that_something_else_registered_nothing_is_attached(here, tmp_path):
    import mlflow

    register_tiny(here, small_dataset(here), tmp_path)
    client = mlflow.MlflowClient(here.tracking_uri, here.tracking_uri)
    theirs = client.create_logged_model("0", name="theirs")
    client.create_model_version("cifar10-classifier", f"models:/{theirs.model_id}", model_id=theirs.model_id)
    registry = Registry(here.tracking_uri)
    with pytest.raises(ModelInvalid, match="no record"):
        registry.attach(registry.by_version(2), attached(tmp_path / "files", b"1"), "gate")


def test_a_cache_that_cannot_be_written_is_a_storage_error(here, tmp_path):
    version = register_tiny(here, small_dataset(here), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be kept"):
        Registry(here.tracking_uri).fetch(version, tmp_path / "file")
