"""Where the code came from, with git, without git, and without a repository."""

import subprocess

import pytest

from ml.registry import provenance
from ml.registry.provenance import code_state, hardware, package_versions


def git(root, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    sha = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return tmp_path, sha.stdout.strip()


def test_git_says_the_commit_and_whether_the_files_differ_from_it(repository):
    root, sha = repository
    assert code_state(root) == provenance.CodeState(sha, "false")
    (root / "code.py").write_text("a = 2\n")
    assert code_state(root) == provenance.CodeState(sha, "true")


@pytest.mark.parametrize("packed", [False, True])
def test_without_git_the_files_say_the_commit(repository, monkeypatch, packed):
    root, sha = repository
    if packed:
        git(root, "pack-refs", "--all")
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    assert code_state(root) == provenance.CodeState(sha, "unknown")


def test_without_git_a_worktree_and_a_detached_head_are_read_too(repository, monkeypatch):
    root, sha = repository
    git(root, "worktree", "add", "-q", str(root / "other"))
    git(root, "checkout", "-q", "--detach")
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    assert code_state(root).sha == sha
    assert code_state(root / "other").sha == sha


def test_no_repository_is_unknown_even_inside_anothers(repository):
    root, _ = repository
    (root / "image").mkdir()
    assert code_state(root / "image") == provenance.CodeState("unknown", "unknown")


def test_an_image_says_what_it_was_built_from_and_a_repository_is_asked_first(repository, tmp_path_factory):
    root, sha = repository
    image = tmp_path_factory.mktemp("image")
    assert code_state(image, "c0ffee") == provenance.CodeState("c0ffee", "unknown")
    assert provenance.as_tags(image, "c0ffee")["git.sha"] == "c0ffee"
    assert code_state(root, "c0ffee").sha == sha


def test_packages_and_hardware_are_named_without_importing_them():
    import sys

    before = "tensorflow" in sys.modules
    assert package_versions()["numpy"]
    assert ("tensorflow" in sys.modules) == before
    assert int(hardware()["cores"]) >= 1
    assert float(hardware()["memory_gib"]) > 0
