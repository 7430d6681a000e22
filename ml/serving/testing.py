"""A champion source made of a folder, for tests and for serving one ONNX file without a registry.

Unlike a mock it is real across processes: a test crowns a model in the folder while a server follows it.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ml.errors import RegistryError, RegistryUnavailable
from ml.files import write_whole
from ml.serving.hot_swap import Champion
from ml.traffic import Mode, Traffic


class FolderSource:
    """Reads champion.json, challenger.json and traffic.json in `folder`.

    A missing folder plays a registry that is away.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def crown(
        self,
        onnx_path: Path,
        version: int,
        *,
        name: str = "cifar10-classifier",
        data: str = "SYNTHETIC",
        architecture: str = "baseline",
        weights: str = "none",
        engine: Literal["fp32", "int8"] = "fp32",
    ) -> None:
        """Makes `onnx_path` the champion, in one step."""
        fingerprint = _fingerprint(onnx_path)
        self._write("champion", onnx_path, Champion(name, version, data, architecture, weights, fingerprint, engine))

    def name_challenger(self, onnx_path: Path, version: int) -> None:
        """Makes `onnx_path` the challenger, in one step. It gets traffic only while `send` has set some for it."""
        champion = Champion("cifar10-classifier", version, "SYNTHETIC", "baseline", "none", _fingerprint(onnx_path))
        self._write("challenger", onnx_path, champion)

    def send(self, version: int, mode: Mode, share: float) -> None:
        """Sets traffic for a version, from now on."""
        written = {"version": version, "mode": mode, "share": share, "since": datetime.now(UTC).isoformat()}
        write_whole(self._folder / "traffic.json", json.dumps(written))

    def end_traffic(self) -> None:
        """Takes the traffic away; no harm where none is set."""
        (self._folder / "traffic.json").unlink(missing_ok=True)

    def champion(self) -> Champion | None:
        """Who it is; see `ChampionSource`."""
        if not self._folder.is_dir():
            raise RegistryUnavailable(f"{self._folder} is not there.", fix="make the folder.")
        record = self._read("champion")
        return None if record is None else record[0]

    def challenger(self) -> tuple[Champion, Traffic] | None:
        """Who it is and what is set; see `ChampionSource`."""
        record = self._read("challenger")
        try:
            written = json.loads((self._folder / "traffic.json").read_text())
            traffic = Traffic(**{**written, "since": datetime.fromisoformat(written["since"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise RegistryError(f"traffic.json cannot be read: {error}.", fix="set it anew.") from error
        return None if record is None else (record[0], traffic)

    def fetch(self, champion: Champion) -> Path:
        """Path of its ONNX file; see `ChampionSource`."""
        for record in (self._read("champion"), self._read("challenger")):
            if record is not None and record[0].version == champion.version:
                return record[1]
        raise RegistryUnavailable("The alias has moved meanwhile.", fix="ask again.")

    def _write(self, role: str, path: Path, champion: Champion) -> None:
        write_whole(self._folder / f"{role}.json", json.dumps({"champion": asdict(champion), "path": str(path)}))

    def _read(self, role: str) -> tuple[Champion, Path] | None:
        try:
            record = json.loads((self._folder / f"{role}.json").read_text())
        except FileNotFoundError:
            return None
        return Champion(**record["champion"]), Path(record["path"])


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
