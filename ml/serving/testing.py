"""A champion source made of a folder, for tests and for serving one ONNX file without a registry.

Unlike a mock it is real across processes: a test crowns a model in the folder while a server follows it.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ml.errors import RegistryUnavailable
from ml.files import write_whole
from ml.serving.hot_swap import Champion


class FolderSource:
    """Reads the champion from `folder`/champion.json. A missing folder plays a registry that is away."""

    def __init__(self, folder: Path) -> None:
        self._record = folder / "champion.json"

    def crown(
        self,
        onnx_path: Path,
        version: int,
        *,
        name: str = "cifar10-classifier",
        data: str = "SYNTHETIC",
        architecture: str = "baseline",
        weights: str = "none",
    ) -> None:
        """Makes `onnx_path` the champion, in one step."""
        fingerprint = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
        champion = Champion(name, version, data, architecture, weights, fingerprint)
        write_whole(self._record, json.dumps({"champion": asdict(champion), "path": str(onnx_path)}))

    def champion(self) -> Champion | None:
        """Who it is; see `ChampionSource`."""
        if not self._record.parent.is_dir():
            raise RegistryUnavailable(f"{self._record.parent} is not there.", fix="make the folder.")
        if not self._record.exists():
            return None
        return Champion(**json.loads(self._record.read_text())["champion"])

    def fetch(self, champion: Champion) -> Path:
        """Path of its ONNX file; see `ChampionSource`."""
        record = json.loads(self._record.read_text())
        if record["champion"]["version"] != champion.version:
            raise RegistryUnavailable("The champion changed meanwhile.", fix="ask again.")
        return Path(record["path"])
