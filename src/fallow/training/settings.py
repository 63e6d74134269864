"""Recipe files and flags -> checked `Recipe` objects, one per arm.

Order of precedence: defaults < file < the arm's own settings < flags. Values from YAML and from the command line go
through the same coercion by the field's annotation, so `--lr 1e-4` (which YAML reads as text) and `lr: 1.0e-4` agree.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from fallow.errors import ConfigError
from fallow.training.recipe import Recipe, method_class

_HIDDEN = ("method_settings",)


def load_file(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file. Raises ConfigError when it is missing, no YAML, or no mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"recipe {path} must be a mapping of `setting: value` lines")
    return {str(key): value for key, value in found.items()}


def parse_flags(flags: list[str]) -> dict[str, Any]:
    """`["--lr", "1e-4", "--compile", "--no-compile", "--seed=3"]` as settings.

    Raises:
        ConfigError: a stray word, or a flag without a value.
    """
    settings: dict[str, Any] = {}
    position = 0
    while position < len(flags):
        flag = flags[position]
        position += 1
        if not flag.startswith("--") or len(flag) == 2:
            raise ConfigError(f"unexpected {flag!r}; settings are given as --name value")
        name, has_value, text = flag[2:].partition("=")
        name = name.replace("-", "_")
        values: list[str] = [text] if has_value else []
        while not has_value and position < len(flags) and not flags[position].startswith("--"):
            values.append(flags[position])
            position += 1
        if values:
            read = [_read_scalar(value) for value in values]
            settings[name] = read[0] if len(read) == 1 else read
        elif name.startswith("no_"):
            settings[name[3:]] = False
        else:
            settings[name] = True
    return settings


def resolve(file: Mapping[str, Any], flags: Mapping[str, Any], *, arm: str | None = None) -> Recipe:
    """The recipe of one arm (or of a file without arms), every value coerced and checked.

    Settings of a method that stand outside `arms` apply to the arms whose method has them; inside an arm, and on a
    recipe without arms, a setting the method lacks is an error.

    Raises:
        ConfigError: unknown key (with the closest known one), wrong type, or a value out of range.
    """
    arms = file.get("arms") or {}
    if not isinstance(arms, Mapping) or not all(isinstance(a, Mapping | None) for a in arms.values()):
        raise ConfigError("recipe: arms must be a mapping of arm name → settings")
    own = dict(arms.get(arm) or {}) if arm is not None else {}
    shared = {k: v for k, v in file.items() if k != "arms"}
    if arms and "method" in flags:
        raise ConfigError("--method has no effect on a recipe with arms; change the arms in the file")
    if "equal_seconds_to" in shared or "equal_seconds_to" in flags:
        raise ConfigError("recipe: equal_seconds_to belongs inside an arm, and names another arm")
    method = str((own if arms else flags).get("method", shared.get("method", "none")))
    method_fields = set() if method == "none" else {f.name for f in dataclasses.fields(method_class(method))}
    of_some_arm = _fields_of_all_methods(file)
    values: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for layer, strict in ((shared, not arms), (own, True), (flags, not arms)):
        for key, value in layer.items():
            for_run, for_method = _meant_for(key, value, method, method_fields, of_some_arm)
            if for_run:
                values[key] = value
            if for_method:
                settings[key] = value
            elif key not in _recipe_fields() and (strict or key not in of_some_arm):
                known = [*_recipe_fields(), *(method_fields if strict else of_some_arm)]
                where = f"arm {arm}: " if own and layer is own else ""
                lacks = f" (method: {method})" if key in _fields_of_every_method() else ""
                raise ConfigError(f"recipe: {where}unknown setting {key!r}{lacks}{closest(key, known)}")
    hints = typing.get_type_hints(Recipe)
    coerced = {key: coerce(key, value, hints[key]) for key, value in values.items()}
    if method != "none":
        hints = _hints_of(method_class(method))
        settings = {key: coerce(key, value, hints.get(key, Any)) for key, value in settings.items()}
    recipe = Recipe(**coerced, method_settings=settings)
    recipe.method_config()
    if recipe.architecture:
        from fallow.training.scratch import check  # transformers takes a second to load

        check(recipe)
    return recipe


def _meant_for(key: str, value: Any, method: str, method_fields: set[str], of_some_arm: set[str]) -> tuple[bool, bool]:
    """Whether a setting is the run's, the method's, or both (`seed`). Where both have it with choices of their own, the
    value tells: `schedule: cosine` is the run's, `schedule: adaptive` SSD's."""
    in_run, in_method = key in _recipe_fields(), key in method_fields
    hint = typing.get_type_hints(Recipe).get(key)
    if not in_run or get_origin(hint) is not Literal or key not in of_some_arm | method_fields:
        return in_run, in_method
    for_run = value in get_args(hint)
    if not in_method:
        return for_run, False  # another arm's method may take it
    choices = get_args(_hints_of(method_class(method)).get(key))
    if not for_run and value not in choices:
        raise ConfigError(
            f"recipe: {key}: {value!r} is neither the run's ({', '.join(map(str, get_args(hint)))}) nor"
            f" {method}'s ({', '.join(map(str, choices))})"
        )
    return for_run, value in choices


def closest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'lr'?"`, or the list of what is known."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the type `annotation` says. Raises ConfigError naming the setting and what it should be."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(name, value, args)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"recipe: {name}: {value!r} is not one of {', '.join(map(str, args))}")
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if annotation is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [coerce(name, item, args[0]) for item in items]
    if origin is tuple and isinstance(value, list | tuple) and args[1:] == (...,):
        return tuple(coerce(name, item, args[0]) for item in value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        return tuple(coerce(name, item, arg) for item, arg in zip(value, args, strict=True))
    if origin is dict and args[1] is Any and isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if origin is dict and isinstance(value, Mapping):
        return {str(k): dict(v or {}) if isinstance(v, Mapping | None) else v for k, v in value.items()}
    if origin is Sequence and isinstance(value, list | tuple):
        return [coerce(name, item, args[0]) for item in value]
    if origin is Callable and callable(value):
        return value
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ConfigError(f"recipe: {name}: {value!r} must be of type {wanted}")


def _coerce_union(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    failure: ConfigError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return coerce(name, value, option)
        except ConfigError as error:
            failure = failure or error
    raise failure or ConfigError(f"recipe: {name}: {value!r} is of the wrong type")


def _read_scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _recipe_fields() -> list[str]:
    return [f.name for f in dataclasses.fields(Recipe) if f.name not in _HIDDEN]


def _hints_of(config_class: type) -> dict[str, Any]:
    """Type hints of a method's config; fields whose names only a type checker sees are left as they come."""
    try:
        return typing.get_type_hints(config_class)
    except NameError:
        return {}


def _fields_of_every_method() -> set[str]:
    import fallow.methods  # noqa: F401  joins every method to its config
    from fallow.method import method_names

    return {f.name for config in method_names().values() for f in dataclasses.fields(config)}


def _fields_of_all_methods(file: Mapping[str, Any]) -> set[str]:
    """Fields of the methods that the file's arms use."""
    arms = file.get("arms") or {}
    default = str(file.get("method", "none"))
    used = {str((arm or {}).get("method", default)) for arm in arms.values()} - {"none"}
    return {f.name for name in used for f in dataclasses.fields(method_class(name))}
