"""Where a result comes from: the code's commit, the packages, the machine.

Only reads; imports none of the packages that it names.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

UNKNOWN = "unknown"
PACKAGES = ("tensorflow", "keras", "jax", "onnxruntime", "numpy", "mlflow", "scikit-learn", "scipy", "evidently")
"""The distributions whose versions can change a result."""


@dataclass(frozen=True)
class CodeState:
    """The commit that the code was at. `dirty` is `true`, `false` or `unknown`: the files may differ from it."""

    sha: str
    dirty: str


def code_state(root: Path, built_from: str = "") -> CodeState:
    """Asks git in `root`; reads its files where there is no git; `built_from` where there is no repository (an image).

    Args:
        root: the folder that the code lies in.
        built_from: the commit that an image was built from; empty where nobody said.
    """
    sha = _git(root, "rev-parse", "HEAD")
    if sha is None:
        return CodeState(_sha_from_files(root / ".git") or built_from or UNKNOWN, UNKNOWN)
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return CodeState(sha, UNKNOWN if changes is None else str(bool(changes)).lower())


def package_versions() -> dict[str, str]:
    """The installed version of each of `PACKAGES`; those that are not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, str]:
    """Processor, usable cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": _cpu_model(), "cores": str(len(os.sched_getaffinity(0))), "memory_gib": f"{memory:.1f}"}


def as_tags(root: Path, built_from: str = "") -> Mapping[str, str]:
    """All of the above, under the names that runs carry them; arguments as of `code_state`."""
    code = code_state(root, built_from)
    return {
        # MLflow's own name: its UI shows the commit.
        "mlflow.source.git.commit": code.sha,
        "git.sha": code.sha,
        "git.dirty": code.dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"hardware.{key}": value for key, value in hardware().items()},
        **{f"version.{name}": version for name, version in package_versions().items()},
    }


def _git(root: Path, *arguments: str) -> str | None:
    if not (root / ".git").exists():
        # Not a parent folder's repository: that one says nothing of this code.
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _sha_from_files(git: Path) -> str | None:
    try:
        if git.is_file():  # a worktree: "gitdir: <folder>"
            git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        for line in (common / "packed-refs").read_text().splitlines():
            if line.endswith(f" {name}"):
                return line.split(" ", 1)[0]
    except OSError:
        pass  # nothing to read: said by the answer
    return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the next line knows less, and enough
    return platform.processor() or platform.machine() or UNKNOWN
