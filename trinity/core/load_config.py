"""Reading a configuration: TOML files, ``extends``, dotted overrides, helpful errors."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from trinity.core.config import Config, RunConfig
from trinity.core.errors import ConfigError
from trinity.core.image_run_config import ImageRunConfig

IMAGES = "images"
"""The table that a run on images has, and no other."""


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``extends`` and then ``overrides`` such as ``optim.muon.lr=2e-3``.

    Values of overrides are TOML; what is not valid TOML is taken as a string.
    Raises ConfigError naming the file or key, the value and the remedy.
    """
    path = Path(path)
    values = _read_toml(path, seen=())
    for override in overrides:
        _apply_override(values, override)
    return validate_config(values, origin=str(path))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The same for a run that trains a language model; ConfigError for one on images."""
    config = load_any_config(path, overrides)
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: [images] trains no language model, which is asked for here")
    return config


def load_image_config(path: str | Path, overrides: Sequence[str] = ()) -> ImageRunConfig:
    """The same for a run that trains on images; ConfigError for a language model."""
    config = load_any_config(path, overrides)
    if not isinstance(config, ImageRunConfig):
        raise ConfigError(f"{path}: without [images], it trains no diffusion transformer")
    return config


def validate_config(values: Mapping[str, Any], *, origin: str) -> RunConfig:
    """Turn plain values into a configuration: with ``[images]``, of a diffusion transformer.

    ``origin`` is the file named in error messages.
    """
    kind = ImageRunConfig if IMAGES in values else Config
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin, kind)) from None


def dump_config(config: RunConfig) -> str:
    """The effective configuration as TOML; :func:`load_config` reads it back to an equal one."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _read_toml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(p) for p in (*seen, resolved))
        raise ConfigError(f"{path}: `extends` goes round in a circle: {chain}; remove one link")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; see configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    base_name = values.pop("extends", None)
    if base_name is None:
        return values
    if not isinstance(base_name, str):
        raise ConfigError(f"{path}: extends={base_name!r} must be the path of a TOML file")
    return _merge(_read_toml(path.parent / base_name, (*seen, resolved)), values)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"override {override!r} is not of the form key=value, for instance optim.muon.lr=2e-3"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = values
    for part in parents:
        node = _descend(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _descend(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, override)]
    else:
        child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: `{part}` holds {child!r}, which has no keys")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: `{part}` must be an index from 0 to {len(node) - 1}"
        )
    return int(part)


def _explain(error: ValidationError, origin: str, kind: type[RunConfig]) -> str:
    lines = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"]) or "(top level)"
        if detail["type"] == "extra_forbidden":
            near = _nearest(detail["loc"], kind)
            hint = f"; did you mean `{near}`?" if near else ""
            lines.append(f"{origin}: unknown key `{key}`{hint}")
        elif detail["type"] == "missing":
            lines.append(f"{origin}: key `{key}` is missing")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            given = detail["input"]
            shown = "" if isinstance(given, dict | list) else f" (got {given!r})"
            lines.append(f"{origin}: `{key}`: {message}{shown}")
    return "\n".join(lines)


def _nearest(location: tuple[int | str, ...], kind: type[RunConfig]) -> str | None:
    """The valid key that resembles the unknown one most, with its full dotted name."""
    table: type[BaseModel] = kind
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        child = _table_of(table.model_fields[part].annotation)
        if child is None:
            return None
        table = child
    close = difflib.get_close_matches(str(location[-1]), table.model_fields, n=1, cutoff=0.4)
    parents = [str(part) for part in location[:-1]]
    return ".".join([*parents, close[0]]) if close else None


def _table_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _table_of(argument)
        if found is not None:
            return found
    return None


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is absent means None, which is every such key's default."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
