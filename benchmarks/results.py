"""Where benchmarks leave their figures: ``benchmarks/results/<name>.json``, with the machine and the versions."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from hfkit.files import write_json
from hfkit.passport import find_hardware, find_versions

FOLDER = Path(__file__).parent / "results"


def save_result(name: str, figures: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Print the figures and write them beside those of earlier runs."""
    print(json.dumps(figures, indent=2))
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(path, {"date": date, **figures, "hardware": find_hardware(), "versions": find_versions()})
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": round(median(values), 2), "least": round(min(values), 2), "most": round(max(values), 2)}
