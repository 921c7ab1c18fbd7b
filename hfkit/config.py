"""A recipe's configuration: dataclass defaults, then YAML files, then command-line flags; and back to YAML.

jsonargparse checks the types and writes ``--help``; the code here finds keys that do not exist, applies the sources in
that order wherever ``--config`` stands, and turns every mistake into one line with exit status 2. Nothing imported here
needs torch, so that a typo answers in a fraction of a second.
"""

import difflib
import json
import logging
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from hfkit.files import write_atomic
from hfkit.masking import mask_secrets
from hfkit.settings import BadInput
from hfkit.yaml12 import dump_yaml, read_value, read_yaml

Config = TypeVar("Config")
NOISY = ("torchao", "torch.utils._pytree")  # loggers: an installed torchao warns of kernels for other machines


def parse_config(config_class: type[Config], args: list[str] | None = None) -> Config:
    """Build a ``config_class`` from its defaults, ``--config FILE`` and ``--section.field VALUE`` flags.

    Later sources win; of several files, the later one. An unknown key, a value of the wrong type, an unreadable file
    or a value that a ``__post_init__`` refuses prints one ``error: …`` line and exits with status 2. ``--help`` and
    ``--print_config`` print and exit with 0.

    Args:
        config_class: A dataclass, possibly holding other dataclasses; its docstrings become ``--help``.
        args: Command-line words; ``None`` reads ``sys.argv``.
    """
    if sys.platform == "win32":  # no flock, no signals of schedulers
        fail("hfkit runs on Linux and macOS; on Windows, use it inside WSL")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    words = sys.argv[1:] if args is None else args
    try:
        hints = field_hints(config_class)
        flags, entries, files, switches = _split_words(words, hints)
        parser = _build_parser(config_class, with_docstrings="--help" in switches)
        if "--help" in switches:
            parser.print_help()
            raise SystemExit(0)
        values = parser.get_defaults()
        for path in files:
            content = read_yaml(path)
            _check_keys(content, config_class, where=str(path))
            with _in_plain_words(hints, where=f"{path}: "):
                values = parser.parse_object(content, namespace=values)
        with _in_plain_words(hints, where="--"):
            values = parser.parse_args(flags, namespace=values)
        for mapping, key, value in entries:
            values[mapping] = {**values[mapping], key: value}
        config = config_class(**vars(parser.instantiate(values)))
    except BadInput as error:
        fail(str(error))
    if "--print_config" in switches:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def parse_config_or_builtin(
    config_class: type[Config], builtin: Path, lacks: Callable[[Any], bool] = lambda config: config.data.is_builtin
) -> Config:
    """As `parse_config`; where something is not named, the built-in YAML comes before all that is given.

    Args:
        lacks: Whether it is not: by default the data.
    """
    words = sys.argv[1:]
    asked = parse_config(config_class, [word for word in words if word != "--print_config"])
    return parse_config(config_class, ["--config", str(builtin), *words] if lacks(asked) else words)


def replace_settings(config: Config, changes: dict[str, Any], where: str) -> Config:
    """Return ``config`` with other values under some dotted keys, checked like those of a file.

    Args:
        where: What a complaint begins with.

    Raises:
        BadInput: for a key that does not exist, or a value that it does not take.
    """
    content, config_class = config_dict(config), type(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise BadInput(f"{where}: there is no setting {key}{_suggest(key, field_hints(config_class))}")
        place[name] = value
    _check_keys(content, config_class, where)
    parser = _build_parser(config_class, with_docstrings=False)
    with _in_plain_words(field_hints(config_class), where=f"{where}: "):
        values = parser.parse_object(content)
    return config_class(**vars(parser.instantiate(values)))


def save_config(config: Any, path: Path) -> None:
    """Write ``config`` as YAML that ``parse_config`` reads back to an equal object."""
    write_atomic(path, to_yaml(config))


def to_yaml(config: Any) -> str:
    """Return ``config`` as the text of a YAML file, in the order of its fields."""
    return dump_yaml(config_dict(config))


def config_dict(config: Any) -> dict[str, Any]:
    """Return ``config`` as nested dictionaries and lists of JSON's types: paths become strings.

    Example:
        >>> from hfkit.settings import TrackingConfig
        >>> config_dict(TrackingConfig(to=["tensorboard"]))
        {'to': ['tensorboard']}
    """
    return _plain(asdict(config))


def fail(message: str) -> NoReturn:
    """Print ``error: message`` as one line on stderr and leave with status 2, the status of bad input."""
    print("error: " + mask_secrets(" ".join(message.split())), file=sys.stderr)
    raise SystemExit(2)


def field_hints(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting by its dotted key, sections opened up.

    Example:
        >>> from hfkit.settings import DataConfig
        >>> field_hints(DataConfig, "data.")["data.dedup.threshold"]
        <class 'float'>
    """
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            hints |= field_hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            hints[prefix + name] = hint
    return hints


def describe(hint: Any) -> str:
    """Return in words what a setting of this type accepts.

    Example:
        >>> describe(int | None), describe(Literal["stop", "skip"])
        ('a whole number or null', 'stop or skip')
    """
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if hint in names:
        return names[hint]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(describe, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list ({describe(get_args(hint)[0])} each)"
    if is_dataclass(hint):
        return "a mapping with keys among " + ", ".join(field.name for field in fields(hint))
    return {Path: "a path"}.get(hint, "a mapping (JSON on the command line)")


Entry = tuple[str, str, Any]  # a setting that is a mapping, one of its keys, and that key's value


def _split_words(words: list[str], hints: dict[str, Any]) -> tuple[list[str], list[Entry], list[Path], set[str]]:
    """Sort the command line into flags for the parser, entries of mappings, files and switches such as ``--help``."""
    flags: list[str] = []
    entries: list[Entry] = []
    files: list[Path] = []
    switches: set[str] = set()
    for key, values in _group_words(words):
        if key in ("help", "print_config"):
            switches.add(f"--{key}")
        elif key == "config":
            if len(values) != 1:
                raise BadInput("--config needs one YAML file (give it again for more)")
            files.append(Path(values[0]))
        elif mapping := _mapping_of(key, hints):  # --model.config_overrides.num_hidden_layers 4
            if not values:
                raise BadInput(f"--{key} needs a value")
            read = [read_value(value) for value in values]
            entries.append((mapping, key.removeprefix(f"{mapping}."), read if len(read) > 1 else read[0]))
        else:
            flags.append(f"--{key}={_flag_value(key, values, hints)}")
    return flags, entries, files, switches


def _mapping_of(key: str, hints: dict[str, Any]) -> str | None:
    """Return the setting, a mapping, of which ``key`` names an entry; the entry's own name may hold dots."""
    parts = key.split(".")
    parents = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((parent for parent in parents if get_origin(hints.get(parent)) is dict), None)


def _group_words(words: list[str]) -> Iterable[tuple[str, list[str]]]:
    """Return each flag, without dashes, with the words that follow it up to the next flag."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word == "-h":
            groups.append(("help", []))
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            groups.append((key, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise BadInput(f"{word!r} belongs to no flag: settings are given as --section.field value")
    return groups


def _flag_value(key: str, values: list[str], hints: dict[str, Any]) -> str:
    """Return the one word that the parser takes for a flag: a bare switch is true, several words are a list."""
    if key not in hints:
        raise BadInput(f"there is no setting --{key}{_suggest(key, hints, '--')}")
    hint = hints[key]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not values and bool in kinds:
        return "true"
    if not values:
        raise BadInput(f"--{key} needs a value: {describe(hint)}")
    is_list = any(get_origin(kind) is list for kind in kinds)
    if is_list and (len(values) > 1 or (str not in kinds and not values[0].startswith("["))):
        return json.dumps(values)
    if len(values) > 1:
        raise BadInput(f"--{key} takes one value, {describe(hint)}, not {len(values)}: {' '.join(values)}")
    return values[0]


def _build_parser(config_class: type, with_docstrings: bool) -> ArgumentParser:
    """Return the parser; field docstrings are read for ``--help`` only, since they double the time it takes."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=with_docstrings,
        instantiate_subclass_spec_in_any=False,  # a mapping that happens to hold `class_path` is only a mapping
    )
    usage = "%(prog)s [--config FILE] [--section.field VALUE …]"
    parser = ArgumentParser(usage=usage, description=config_class.__doc__, allow_abbrev=False, exit_on_error=False)
    if with_docstrings:  # only to be listed: `_split_words` takes them off the command line
        parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below; flags win over it.")
        parser.add_argument("--print_config", action="store_true", help="Print the resulting configuration as YAML.")
    parser.add_class_arguments(config_class, nested_key=None)
    for action in parser._actions:  # of jsonargparse's other ways to give a value, `--help` shows none
        action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
        if action.metavar == "CONFIG" or action.dest.endswith(".help"):
            action.help = SUPPRESS
    return parser


@contextmanager
def _in_plain_words(hints: dict[str, Any], where: str) -> Iterator[None]:
    """Turn jsonargparse's complaint about a value into a line with the key, the value and what is accepted."""
    try:
        yield
        return
    except ArgumentError as error:
        message = str(error)
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    for parent, hint in hints.items():
        if key.startswith(f"{parent}.") and get_origin(hint) is list:  # a list of mappings: their fields are keys, too
            hints = hints | field_hints(get_args(hint)[0], f"{parent}.")
    if key in hints and given:
        message = f"{key} takes {describe(hints[key])}, not {given[-1]!r}"
    raise BadInput(where + message)


def _check_keys(content: Any, config_class: type, where: str, prefix: str = "") -> None:
    """Refuse keys that ``config_class`` does not have, and sections that are not mappings."""
    if not isinstance(content, dict):
        raise BadInput(f"{where}: {prefix.rstrip('.')} takes {describe(config_class)}, not {content!r}")
    hints = get_type_hints(config_class)
    for key, value in content.items():
        if key not in hints:
            known = field_hints(config_class, prefix)
            raise BadInput(f"{where}: there is no setting {prefix}{key}{_suggest(f'{prefix}{key}', known)}")
        hint = hints[key]
        item = next(iter(get_args(hint)), None)
        if is_dataclass(hint):
            _check_keys(value, hint, where, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif is_dataclass(item) and isinstance(value, list):
            for entry in value:
                _check_keys(entry, item, where, f"{prefix}{key}.")  # type: ignore[arg-type]


def _suggest(key: str, known: Iterable[str], dashes: str = "") -> str:
    """Return the question after an unknown key: the nearest dotted key, or the nearest last part in any section."""
    keys = [*known, "config", "print_config", "help"] if dashes else list(known)
    last = {name.rsplit(".", 1)[-1]: name for name in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)]
    return f"; did you mean `{dashes}{near[0]}`?" if near else "; --help lists them all"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
