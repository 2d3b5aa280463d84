"""
`cluster.yaml`: the facts of a cluster that all its jobs share, such as partition, modules, container and network. No torch.

It is read from the file given with --site, else from the working directory, else from ~/.config/shoal/cluster.yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml

from shoal.errors import ConfigError, LaunchError, Problem
from shoal.system.output import on_one_line

FILE: Final = "cluster.yaml"
PERSONAL: Final = Path("~/.config/shoal") / FILE
RUNTIMES: Final = ("pyxis", "apptainer", "singularity")
FABRICS: Final = ("ethernet", "infiniband", "efa")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # of an environment variable


def _key(help: str, kind: str = "text", one_of: tuple[str, ...] = ()) -> Any:
    """Declare a key of the file. kind: text, count, texts (a list) or variables (a mapping of names to values)."""
    default: Any = {"texts": (), "variables": {}}.get(kind)
    meta = {"help": help, "kind": kind, "one_of": one_of}
    if kind == "variables":
        return dataclasses.field(default_factory=dict, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Site:
    """The keys of `cluster.yaml`. All are optional: what a key leaves unset, the cluster's own defaults decide."""

    partition: str | None = _key("partition of the jobs")
    account: str | None = _key("account that pays for the jobs")
    qos: str | None = _key("quality of service of the jobs")
    constraint: str | None = _key("features that the nodes must have, such as a100&nvlink")
    reservation: str | None = _key("reservation of nodes to use")
    gpus_per_node: int | None = _key("GPUs of each node, unless --gpus-per-node is given", "count")
    gpu_type: str | None = _key("type of GPU to ask for, such as a100")
    cpus_per_node: int | None = _key("CPU cores of each node to ask for; unset: whole nodes (--exclusive)", "count")
    memory_per_node: str | None = _key("host memory of each node to ask for, such as 200G; unset: all of a whole node")
    modules: tuple[str, ...] = _key("environment modules to load, such as cuda/12.4", "texts")
    setup: tuple[str, ...] = _key("further shell lines before the training, such as conda activate shoal", "texts")
    container: str | None = _key("image in which to train: a file, or what the runtime accepts")
    container_runtime: str = dataclasses.field(
        default="pyxis",
        metadata={"help": "program that starts the container", "kind": "text", "one_of": RUNTIMES},
    )
    container_mounts: tuple[str, ...] = _key("further folders to mount in the container, each FROM:TO", "texts")
    container_shoal: str = dataclasses.field(
        default="shoal", metadata={"help": "the shoal command inside the container", "kind": "text", "one_of": ()}
    )
    interface: str | None = _key("network interface of the traffic between nodes, such as ib0 or eth1")
    fabric: str | None = _key("network between nodes", one_of=FABRICS)
    environment: Mapping[str, str] = _key("environment variables of the training", "variables")
    scratch: str | None = _key("folder on a node's own disk for --stage; unset: $SLURM_TMPDIR, or else /tmp")
    sbatch: tuple[str, ...] = _key("further options of sbatch, such as --mail-type=END", "texts")

    @classmethod
    def read(cls, given: Path | None) -> Self:
        """
        Return the site's facts; the defaults if there is no file.

        given: the file named with --site, which must exist. Raises `ConfigError` with all problems of the file.
        """
        path = given or next((p for p in (Path(FILE), PERSONAL.expanduser()) if p.is_file()), None)
        if path is None:
            return cls()
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LaunchError(f"--site {on_one_line(path)}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(
                f"{on_one_line(path)} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise LaunchError(f"{on_one_line(path)} is not valid YAML: {' '.join(str(error).split())}") from None
        if found is None:
            return cls()
        if not isinstance(found, dict):
            raise LaunchError(
                f"{on_one_line(path)} is not a mapping of keys to values; its keys are {', '.join(_keys())}"
            )
        values, problems = {}, []
        for name, value in found.items():
            good, why = _value(name, value)
            if why:
                problems.append(Problem(on_one_line(path), why))
            elif value is not None:
                values[name] = good
        if problems:
            raise ConfigError(problems)
        return cls(**values)


def _keys() -> dict[str, Mapping[str, Any]]:
    return {f.name: f.metadata for f in dataclasses.fields(Site)}


def _value(name: Any, value: Any) -> tuple[Any, str]:
    """Return the value of a key as `Site` has it, and "" or why it is invalid."""
    key = _keys().get(name) if isinstance(name, str) else None
    if key is None:
        near = difflib.get_close_matches(str(name), _keys(), 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_keys())}"
        return None, f"{on_one_line(name)} is not a key of {FILE}; {hint}"
    if value is None:
        return None, ""
    match key["kind"]:
        case "count":
            good, expected = type(value) is int and value > 0, "an integer of at least 1"
        case "texts":
            value = [value] if isinstance(value, str) else value
            good, expected = isinstance(value, list) and all(map(_is_line, value)), "a list of texts of one line each"
            value = tuple(value) if good else value
        case "variables":
            good = isinstance(value, dict) and all(_is_variable(*item) for item in value.items())
            expected = "a mapping of names of variables to values"
            value = {n: _text(v) for n, v in value.items()} if good else value
        case _:
            value = _text(value)
            good, expected = _is_line(value) and value != "", "a text of one line"
            if good and key["one_of"]:
                good, expected = value in key["one_of"], f"one of {', '.join(key['one_of'])}"
    return value, "" if good else f"{name} is {value!r}, not {expected}"


def _text(value: Any) -> Any:
    """Return a number as text, since `account: 1234` is a text that YAML reads as a number; True is left unchanged."""
    return str(value) if type(value) in (int, float) else value


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and "\n" not in value


def _is_variable(name: Any, value: Any) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and _is_line(_text(value))


def describe_keys() -> Iterator[str]:
    """Yield a line for each key: its name, its valid values and its meaning."""
    for name, key in _keys().items():
        values = f" ({', '.join(key['one_of'])})" if key["one_of"] else ""
        yield f"{name}{values}: {key['help']}"
