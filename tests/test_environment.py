"""What results say of the machine and of the code that they were made with."""

import shutil
import subprocess
from pathlib import Path

import pytest

import densely
from densely.environment import git_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_has_a_plus_where_its_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        who += ["-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(densely, "__file__", str(package / "__init__.py"))
    git("init", "-q")
    assert git_commit() is None  # of a repository that does not hold it
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    (package / "new.py").write_text("")
    assert git_commit() == commit
    (package / "__init__.py").write_text("changed = True")
    assert git_commit() == f"{commit}+"
