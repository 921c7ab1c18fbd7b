"""YAML: whatever is written reads back equal, here and by readers of YAML 1.1."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hfkit.yaml12 import dump_yaml, read_yaml

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def read(text: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "file.yaml")
        path.write_text(text, "utf-8", newline="")
        return read_yaml(path)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_whatever_is_written_reads_back_equal(content: dict[str, Any]) -> None:
    assert read(dump_yaml(content)) == content
    assert yaml.safe_load(dump_yaml(content)) == content, "so it does with a reader of YAML 1.1"


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-3", 1e-3),
        ("3E4", 3e4),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("200_000_000", 200_000_000),
        ("-3", -3),
        ("012", "012"),
        ("1e", "1e"),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_are_what_people_mean(scalar: str, value: object) -> None:
    result = read(f"key: {scalar}")["key"]
    assert (type(result), result) == (type(value), value)
