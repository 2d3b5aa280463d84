"""What lies beside the weights in a folder: tokenizer, generation config, licence. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from shoal.disk import sync
from shoal.hub.folder import CONFIG

GENERATION: Final = "generation_config.json"
TOKENIZER: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tekken.json",
    GENERATION,  # names tokens
)  # fmt: skip
LICENSES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
OF_MODEL: Final = (CONFIG, *LICENSES)


def keep(folder: Path, names: tuple[str, ...], copy: Path) -> None:
    """Copy those of `names` that `folder` has, so that an export needs it no more. A copy made before stands."""
    if copy.is_dir():
        return
    aside = copy.with_name(f".{copy.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    copy_files(folder, aside, names)
    sync(aside)
    aside.rename(copy)


def copy_files(folder: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of `names` that `folder` has; which they were."""
    found = [name for name in names if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, target / name)
    return found
