"""
Trains language models from scratch, on whatever hardware you have. See `shoal --help` and docs/API.md.

    from shoal import generate, load, read_config, train

    run = train(read_config("quickstart", steps=20))
    print(generate(load(run.folder), "def "))

`import shoal` imports neither torch nor numpy; each function imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from shoal.commands.worker import Trained
    from shoal.config.options import Config
    from shoal.infer.load import LoadedModel

__version__ = "0.1.0"
__all__ = ["Config", "generate", "load", "read_config", "train"]


def read_config(recipe: str | Path | None = None, /, **options: Any) -> Config:
    """
    Return a valid config: a recipe with `options` applied.

    recipe: a YAML file, or the name of a built-in recipe, such as "quickstart". None uses the one that `shoal init` writes.
    options: config options, named like flags of `shoal train`: `steps=20`, `name="first"`, or `**{"train.steps": 20}`.
    Raises `ConfigError`, which lists every problem, if the config is invalid.
    """
    from shoal.commands.recipes import config_of

    return config_of(recipe, options)


def train(config: Config) -> Trained:
    """
    Train in this process; return the run's `folder` and whether the run is `finished`. A run with a checkpoint resumes from it.

    Call it in a single process, or in each of the processes that torchrun or srun started.
    Call it from the main thread, which receives signals. The first Ctrl-C, SIGTERM or SIGUSR1 saves and stops; a second
    Ctrl-C raises `KeyboardInterrupt`. Raises `ShoalError` for any problem that the user can fix.
    """
    from shoal.commands.worker import train_here

    return train_here(config)


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """
    Load a model and its tokenizer from a run's folder (the last checkpoint), one checkpoint, or a Hugging Face folder.

    device: the device to compute on: "cpu", "cuda", or "auto" for CUDA if available. dtype: the compute dtype: "float32",
    "bfloat16", or "auto" for the model's own dtype, or float32 if the device is slow in that dtype. Raises `ShoalError` if
    there is no such model, or it cannot be loaded.
    """
    from shoal.infer.load import load_path

    return load_path(path, device=device, dtype=dtype)


def generate(
    model: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """
    Return the text that a model adds to `prompt`, up to an end-of-text token or `max_new_tokens`.

    temperature: the sampling temperature; 0 always takes the likeliest token. top_k: sample from this many of the likeliest
    tokens; top_p: sample from the fewest likeliest tokens that together have this probability; None disables the limit. The
    same seed gives the same text. Raises `GenerateError` if the prompt or an option is invalid, or `ModelError` if the model
    has no tokenizer.
    """
    from shoal.infer.stream import complete
    from shoal.models.sampling import Sampling

    return complete(model, prompt, max_new_tokens, Sampling(temperature, top_k, top_p, seed))


def __getattr__(name: str) -> Any:
    if name == "Config":
        from shoal.config.options import Config

        return Config
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "Config"]
