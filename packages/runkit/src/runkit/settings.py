"""Settings: the leaves of a dataclass by their dotted names, and their values from files and options."""

from __future__ import annotations

import copy
import difflib
import types
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, get_loader
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from runkit.errors import SettingError

NEEDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    list: "a list such as [a, b]",
    tuple: "a list such as [a, b]",
    set: "a list such as [a, b]",
    dict: "settings such as {key: value}",
    Path: "a path",
    PositiveInt: "a whole number above 0",
    NonNegativeInt: "a whole number, 0 or more",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number, 0 or more",
    ClosedUnitInterval: "a number from 0 to 1",
    OpenUnitInterval: "a number above 0 and below 1",
}


@dataclass(frozen=True)
class Setting:
    """One leaf of a dataclass of settings.

    Args:
        name: dotted, as in "train.learning_rate"
        type: as the dataclass declares it
        default: its default, MISSING where it has none
        help: its line of the class's docstring
        group: the innermost dataclass it is in, as in "train"; "settings" for the outermost
        about: the first line of that dataclass's docstring
    """

    name: str
    type: Any
    default: Any
    help: str
    group: str
    about: str

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    def holds(self, kind: type) -> bool:
        """Whether values of the kind, as list or dict, are among those of its type."""
        return any((get_origin(one) or one) is kind for one in _members(self.type))

    def checked(self, value: Any, from_option: bool = False) -> Any:
        """Return the value as the setting's type; that of an option is text, or a list of texts.

        Raises:
            SettingError: if it is not of that type
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=self.type)
        # jsonargparse changes the list it is given.
        tries = [copy.deepcopy(value)]
        if from_option and isinstance(value, str) and self.holds(list):
            # One word may be a list in brackets, or the only entry of one.
            tries.append([value])
        for one in tries:
            try:
                if from_option and isinstance(one, str):
                    return parser.parse_args([f"--value={one}"]).value
                return parser.parse_object({"value": one}).value
            except (ArgumentError, ValueError, TypeError):
                continue
        raise SettingError(f"{self.name}: got {value!r}, needs {needs(self.type)}")


def settings_of(kind: type, default: Any = MISSING, prefix: str = "") -> dict[str, Setting]:
    """Return the settings of a dataclass, and of those in it, by name, in their order."""
    found: dict[str, Setting] = {}
    hints, text = get_type_hints(kind), parse_docstring(kind.__doc__ or "")
    # A setting that is inherited is explained where it was declared.
    explained = [*(parse_docstring(base.__doc__ or "") for base in reversed(kind.__mro__[1:])), text]
    helps = {one.arg_name: " ".join((one.description or "").split()) for each in explained for one in each.params}
    about, group = text.short_description or "", prefix.rstrip(".") or "settings"
    for one in fields(kind):
        name, value = f"{prefix}{one.name}", getattr(default, one.name, MISSING)
        if value is MISSING and one.default is not MISSING:
            value = one.default
        elif value is MISSING and one.default_factory is not MISSING:
            value = one.default_factory()
        if isinstance(hints[one.name], type) and is_dataclass(hints[one.name]):
            found |= settings_of(hints[one.name], value, f"{name}.")
        else:
            found[name] = Setting(name, hints[one.name], value, helps.get(one.name, ""), group, about)
    return found


def read(words: Sequence[str], settings: Mapping[str, Setting], presets: Path | None = None) -> dict[str, Any]:
    """Return the values that files and options give, checked; later files win, options win over files.

    Args:
        words: the command line after the command
        settings: of the command
        presets: folder of YAML files that ``--config`` knows by name

    Raises:
        SettingError: for a file that holds no settings, a word that is no option, a setting that is unknown or wrong
    """
    options = list(_options(words))
    given: dict[str, Any] = {}
    for option, values in options:
        if option == "config":
            given |= _read_file(_only(option, values, "a YAML file"), settings, presets)
    for option, values in options:
        if option != "config":
            name, value = _read_option(option, values, settings, given)
            given[name] = value
    return given


def build(kind: type, settings: Mapping[str, Setting], given: Mapping[str, Any]) -> Any:
    """Return the dataclass with the values that are given and the defaults of the rest.

    Raises:
        SettingError: if a setting without default is not given, or the dataclass refuses what it got
    """
    for one in settings.values():
        if one.required and one.name not in given:
            raise SettingError(f"{one.name}: got nothing, needs {needs(one.type)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config")
    try:
        return parser.instantiate(parser.parse_object({"config": _nested(given)})).config
    except (ArgumentError, ValueError, TypeError) as error:
        raise SettingError(" ".join(str(error).split())) from error


def needs(kind: Any) -> str:
    """Return in words what a type needs."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    members = _members(kind)
    if len(members) > 1:
        return " or ".join(dict.fromkeys(needs(one) for one in members))
    kind = get_origin(kind) or kind
    return NEEDS.get(kind) or " ".join((getattr(kind, "__doc__", None) or str(kind)).split("\n")[0].split())


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Give every option without its dashes, and the words that follow it."""
    at = 0
    while at < len(words):
        if not words[at].startswith("--") or words[at] == "--":
            raise SettingError(f"command line: got {words[at]!r}, needs settings such as --name value")
        option, equals, value = words[at][2:].partition("=")
        values = [value] if equals else []
        at += 1
        while not equals and at < len(words) and not words[at].startswith("--"):
            values.append(words[at])
            at += 1
        yield option, values


def _read_option(
    option: str, values: list[str], settings: Mapping[str, Setting], given: Mapping[str, Any]
) -> tuple[str, Any]:
    one = _resolved(option, settings)
    more = _resolved(option[:-1], settings) if option.endswith("+") else None
    if more is not None and more.holds(list):
        return more.name, [*(given.get(more.name, more.default) or []), *more.checked(values, from_option=True)]
    if one is not None:
        if one.is_switch and not values:
            return one.name, True
        if one.holds(list) and len(values) > 1:
            return one.name, one.checked(values, from_option=True)
        return one.name, one.checked(_only(one.name, values, needs(one.type)), from_option=True)
    off = _resolved(option[3:], settings) if option.startswith(("no-", "no_")) else None
    if off is not None and off.is_switch and not values:
        return off.name, False
    owner, _, key = option.rpartition(".")
    holder = _resolved(owner, settings)
    if holder is None or not holder.holds(dict):
        raise _unknown(f"--{option}", option.replace("-", "_"), settings)
    content = given.get(holder.name, {} if holder.required else holder.default)
    entry = _yaml(_only(option, values, "one value"), option)
    return holder.name, holder.checked({**(content or {}), key: entry})


def _resolved(option: str, settings: Mapping[str, Setting]) -> Setting | None:
    name = option.replace("-", "_")
    if name in settings:
        return settings[name]
    found = [full for full in settings if full.endswith(f".{name}")]
    if len(found) > 1:
        raise SettingError(f"--{option}: got the last part of several settings, needs one of {', '.join(found)}")
    return settings[found[0]] if found else None


def _only(name: str, values: list[str], what: str) -> str:
    if len(values) != 1:
        raise SettingError(f"{name}: got {' '.join(values) or 'nothing'}, needs {what}")
    return values[0]


def _read_file(file: str, settings: Mapping[str, Setting], presets: Path | None) -> dict[str, Any]:
    path = _found(file, presets)
    try:
        content = _yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"config: got {path}, needs a YAML file: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise SettingError(f"{path}: got {content!r}, needs settings such as `seed: 1`")
    return {name: settings[name].checked(value) for name, value in _flat(content, settings, path)}


def _found(file: str, presets: Path | None) -> Path:
    path = Path(file).expanduser()
    if path.is_file():
        return path
    names = {one.stem: one for one in sorted(presets.glob("*.yaml"))} if presets else {}
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if name not in names:
        known = f" or one of the presets {', '.join(names)}" if names else ""
        raise SettingError(f"config: got {file}, needs a YAML file{known}")
    return names[name]


def _yaml(text: str, where: str) -> Any:
    try:
        # As jsonargparse reads it: dates stay text, 1e-3 is a number.
        return get_loader("yaml")(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingError(f"{where}{line}: got no YAML ({error.problem}), needs settings such as `seed: 1`") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"{where}: got no YAML ({reason}), needs settings such as `seed: 1`") from None


def _flat(content: Mapping[Any, Any], settings: Mapping[str, Setting], path: Path, prefix: str = "") -> Any:
    """Give the settings a file names, and their values."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        inside = any(full.startswith(f"{name}.") for full in settings)
        if name in settings:
            yield name, value
        elif not inside:
            raise _unknown(f"{path}: {name}", name, settings)
        elif isinstance(value, dict):
            yield from _flat(value, settings, path, f"{name}.")
        elif value is not None:
            raise SettingError(f"{path}: {name}: got {value!r}, needs settings such as {{key: value}}")


def _unknown(shown: str, name: str, settings: Mapping[str, Setting]) -> SettingError:
    groups = {full.rpartition(".")[0] for full in settings} - {""}
    known = [*settings, *groups, *(full.rpartition(".")[2] for full in settings)]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    meant = f" such as {near[0]}" if near else ""
    return SettingError(f"{shown}: got a setting that is not known, needs one that --help lists{meant}")


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in given.items():
        place = result
        *groups, last = name.split(".")
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return result
