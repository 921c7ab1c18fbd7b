"""Sweep settings of pretraining: train every combination, compare them, and fit a scaling law to sizes × steps.

    python recipes/sweep.py                                      sizes × steps on the built-in corpus, minutes on a CPU
    python recipes/sweep.py --data.train_files 'corpus/*.jsonl'  the same on your text
    python recipes/sweep.py --config recipes/configs/pretrain/quickstart.yaml --output_dir runs/rates \
        --grid.optim.learning_rate 1e-3 3e-3 1e-2

Each combination is a run of `pretrain.py`, in points/. One that has its result, or diverged, is not trained again: a
sweep that was stopped goes on, inside a point too, and a grid that has grown trains what is new.
"""

import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

from hfkit.config import parse_config_or_builtin, replace_settings
from hfkit.files import digest_of
from hfkit.settings import BadInput, DataConfig, GenerationSettings, RunConfig

BUILTIN = Path(__file__).parent / "configs" / "sweep" / "builtin.yaml"
ONE = ("grid", "output_dir", "resume", "train.precision")  # what all points share; a process has one precision
DIVERGED = "diverged.json"  # what a point that diverged leaves in place of a result
LONGEST_NAME = 60  # characters of a point's settings in the name of its folder


@dataclass
class SweepConfig(RunConfig):
    """Pretrain with every combination of some settings, and compare."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which text, and how it is cleaned, deduplicated and packed."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How each point's samples are drawn."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted key, such as {"optim.learning_rate": [1e-3, 3e-3]}; a combination of all is a point."""
    output_dir: Path = Path("runs/sweep")
    """sweep.json, sweep.html, and points/ with a run in each folder."""

    def __post_init__(self) -> None:
        if self.hub.repo_id is not None:
            raise BadInput("hub.repo_id: a sweep publishes nothing; push the point that you choose with push.py")
        if self.resume not in ("auto", "never"):
            raise BadInput(f"resume {self.resume}: the points of a sweep take auto or never")
        self.grid = {key: values if isinstance(values, list) else [values] for key, values in self.grid.items()}
        for key, values in self.grid.items():
            if is_dataclass(reduce(lambda section, name: getattr(section, name, None), key.split("."), self)):
                raise BadInput(f"grid: {key} is a section; name a setting inside it")
            if key in ONE or key.startswith("hub."):
                raise BadInput(f"grid: {key} is one for all points")
            if not values:
                raise BadInput(f"grid.{key} holds no value to try")
        if self.grid and (self.output_dir / "checkpoints").exists():
            raise BadInput(f"{self.output_dir} holds a run; give the sweep an --output_dir of its own")
        list_points(self)  # a mistake in any of them is found before anything is trained


def list_points(config: SweepConfig) -> dict[str, tuple[dict[str, Any], SweepConfig]]:
    """Return the points by the name of their folder, each with the settings that make it and all of them together."""
    points = {}
    for values in product(*config.grid.values()) if config.grid else ():
        settings = dict(zip(config.grid, values, strict=True))
        words = "-".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in settings.items())
        name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:LONGEST_NAME].strip('-')}-{digest_of(settings)[:6]}"
        folder = str(config.output_dir / "points" / name)
        point = replace_settings(replace(config, grid={}), {**settings, "output_dir": folder}, where="grid")
        points[name] = settings, point
    return points


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config_or_builtin(SweepConfig, BUILTIN, lacks=lambda config: not config.grid)

import gc
import io
import os
from contextlib import redirect_stdout

import pretrain
import torch

from hfkit.config import config_dict, save_config
from hfkit.data.batches import plan_steps
from hfkit.data.prepare import prepare_data
from hfkit.files import read_json, write_json
from hfkit.launch import launch
from hfkit.loop import Diverged
from hfkit.model import build_causal_lm, set_length
from hfkit.optim import build_schedule
from hfkit.remote import resolve_model
from hfkit.status import is_main_process
from hfkit.sweep_report import FIGURES, summarize, tell_sweep, write_sweep_page
from hfkit.yaml12 import read_yaml


def main(config: SweepConfig) -> None:
    """Train what has no result yet, then compare all points."""
    points = list_points(config)
    runs = {name: as_pretraining(point) for name, (_, point) in points.items()}
    for run in runs.values():
        check_point(run)
    if is_main_process():
        save_config(config, config.output_dir / "config.yaml")
    for number, (name, run) in enumerate(runs.items(), 1):
        if is_finished(run):
            continue
        if is_main_process():
            print(f"Point {number} of {len(runs)}: {name}", file=sys.stderr)
        train(run)
    if not is_main_process():
        return
    found = [describe_point(name, *points[name]) for name in points]
    sweep = summarize(config.grid, found)
    write_json(config.output_dir / "sweep.json", sweep)
    write_sweep_page(sweep, config.output_dir / "sweep.html")
    print(tell_sweep(sweep))
    print(f"Curves and figures are in {config.output_dir / 'sweep.html'}.", file=sys.stderr)


def as_pretraining(point: SweepConfig) -> pretrain.PretrainConfig:
    """Return the settings of the run that is a point."""
    return pretrain.PretrainConfig(**{f.name: getattr(point, f.name) for f in fields(pretrain.PretrainConfig)})


def check_point(run: pretrain.PretrainConfig) -> None:
    """See that a point's model can be built and its steps be planned, before the points before it take their hours."""
    length = run.data.sequence_length
    base = resolve_model(run.model.path, run.model.revision) if run.model.path else None
    data = prepare_data(run.data, run.tokenizer, tokenizer_path=base)
    if base is None:
        with torch.device("meta"):  # neither memory nor random numbers
            set_length(build_causal_lm(run.model, data.tokenizer).config, length)
    rows = sum(stream.num_rows(length) for stream in data.train)
    plan = plan_steps(run.train, rows, length, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    build_schedule(run.optim, plan.max_steps)


def is_finished(run: pretrain.PretrainConfig) -> bool:
    """Whether a point has the outcome of just these settings; what else its folder holds, the run itself judges."""
    config, outcomes = run.output_dir / "config.yaml", ("result.json", DIVERGED)
    has_outcome = config.exists() and any((run.output_dir / name).exists() for name in outcomes)
    return has_outcome and run.resume == "auto" and read_yaml(config) == config_dict(run)


def train(run: pretrain.PretrainConfig) -> None:
    """Train one point; one that diverges is a result, too."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        (run.output_dir / DIVERGED).unlink(missing_ok=True)
    torch._dynamo.reset()  # other shapes' graphs would count against the limit of recompilations
    try:
        with redirect_stdout(io.StringIO()):  # its figures are in its folder; standard output gets the table
            pretrain.main(run)
    except Diverged as error:
        if is_main_process():
            print(f"{run.output_dir.name} diverged at {error}", file=sys.stderr)
            write_json(run.output_dir / DIVERGED, {"message": str(error)})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_point(name: str, settings: dict[str, Any], point: SweepConfig) -> dict[str, Any]:
    """Return what sweep.json says of a point."""
    result = read_json(point.output_dir / "result.json")
    figures = {figure: (result or {}).get(figure) for figure in FIGURES}
    return {"name": name, "settings": settings, "state": "diverged" if result is None else "done", **figures}


if __name__ == "__main__":
    launch(main, config)
