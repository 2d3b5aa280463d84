"""The part of docs/MODELS.md that needs no hub, run as a newcomer runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import Place, clean_environment
from tests.docs.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "MODELS.md"


@pytest.mark.slow
def test_all_of_it_without_a_hub(real_tokenizers: Path, tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## All of it without a hub")[2].partition("\n## ")[0]
    [python], [recipe], [setup, commands] = (blocks(page, language) for language in ("python", "yaml", "sh"))
    assert "python scripts/fetch_test_tokenizers.py" in setup
    place = Place(tmp_path)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "tokenizers").symlink_to(real_tokenizers)
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, env=clean_environment(), check=True)
    (tmp_path / "qwen.yaml").write_text(recipe, encoding="utf-8")
    said = {}
    for line in commands.splitlines():
        words = shlex.split(line)
        if "--chat" not in words:  # the chat has a separate test
            said[words[1]] = place.good(*words[1:])
    assert "held-out text" in said["train"]
    assert "exported to" in said["export"]
    assert "bits per byte" in said["eval"]
    assert "\ndef " in "\n" + said["generate"]  # on a slow machine, notes about slow phases come first
