"""YAML as people mean it: 1.2's plain scalars, where `1e-3` is a number and the country code `no` is text.

PyYAML reads version 1.1, which has it the other way round, turns dates into objects and lets a repeated key win unseen.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from hfkit.settings import BadInput


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; one that cannot be read or understood is BadInput naming the line."""
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise BadInput(f"{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML: {error}") from None
    if content is None:  # only comments
        return {}
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold `key: value` lines, not {type(content).__name__}")
    return content


def read_value(text: str) -> Any:
    """Return what a word of the command line says: a number, text, a list or a mapping.

    Example:
        >>> read_value("1e-3"), read_value("no"), read_value("[1, {a: null}]")
        (0.001, 'no', [1, {'a': None}])

    Raises:
        BadInput: where it is none of these.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise BadInput(f"{text!r} is neither a number nor text, a list or a mapping") from None


def dump_yaml(content: dict[str, Any]) -> str:
    """Return a mapping as YAML, in the order of its keys; ``read_yaml`` gives an equal one back.

    Example:
        >>> print(dump_yaml({"code": "no", "learning_rate": 0.001}), end="")
        code: 'no'
        learning_rate: 0.001
    """
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: `1e-3` is a number; `no`, `on` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way; filled below)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping; PyYAML alone lets the second of two equal keys win without a word."""
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                problem = f"the key {key.value!r} stands here a second time"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` and readers of YAML 1.1 alike read back: text that either would misread is quoted."""

    def ignore_aliases(self, data: Any) -> bool:  # a list used twice is written twice, not as `*id001`
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Write text with line ends and controls escaped: left to itself PyYAML folds some of them (U+0085) into spaces."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)

_WHOLE = r"[-+]?(0|[1-9][0-9_]*)"
_SCALARS = {
    "null": (r"~|null|", "~n"),
    "bool": (r"true|false", "tf"),
    "int": (_WHOLE, "-+0123456789"),
    "float": (rf"({_WHOLE}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
}
for _class in (_Loader, _Dumper):
    for _name, (_pattern, _first) in _SCALARS.items():
        characters = [*_first, ""] if _name == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), characters)
