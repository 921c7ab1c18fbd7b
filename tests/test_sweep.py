"""A sweep: every combination is trained once, whatever stops it, and what is wrong is said before anything is."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hfkit.scaling import Law
from hfkit.sweep_report import summarize, tell_sweep, write_sweep_page
from runs import Server, Words, shared_server, tiny_run, wait_for, write_corpus
from test_bad_input import assert_nothing_written, assert_refused
from test_recipes import run_script
from test_report import read

SIZES = [8, 16]
STEPS = [3, 5]


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Four points of a fraction of a second each, in which settings of the base and of the grid meet in one mapping."""
    folder = tmp_path_factory.mktemp("sweep")
    base = tiny_run(write_corpus(folder / "corpus.jsonl"), folder / "cache", train__eval_every=0, train__save_every=2)
    del base["train.max_steps"]
    return base | {"grid.model.config_overrides.hidden_size": SIZES, "grid.train.max_steps": STEPS}


def points_of(output_dir: Path) -> list[dict[str, Any]]:
    """Return the points of sweep.json without what depends on the clock."""
    points = json.loads((output_dir / "sweep.json").read_text())["points"]
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points]


def when_trained(output_dir: Path) -> dict[str, int]:
    """Return when each point's weights were written."""
    return {path.parts[-3]: path.stat().st_mtime_ns for path in output_dir.glob("points/*/model/model.safetensors")}


@pytest.fixture(scope="module")
def straight(server: Server, settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a sweep that nothing disturbed."""
    ended = server.run("sweep", settings, tmp_path_factory.mktemp("straight") / "sweep")
    assert ended.code == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].split()[:2] == ["hidden_size", "max_steps"] and lines[5] == ""
    assert [line.split()[:2] for line in lines[1:5]] == [[str(n), str(d)] for n in SIZES for d in STEPS]
    assert lines[6].startswith("Best: ") and lines[7].startswith("A scaling law needs 3 sizes")
    return ended.output_dir


def test_every_combination_is_a_run_of_its_own(straight: Path) -> None:
    points = points_of(straight)
    key = "model.config_overrides.hidden_size"
    assert [(p["settings"][key], p["settings"]["train.max_steps"]) for p in points] == [
        (size, steps) for size in SIZES for steps in STEPS
    ]
    for point in points:
        folder = straight / "points" / point["name"]
        result = json.loads((folder / "result.json").read_text())
        assert point["state"] == "done" and result["steps"] == point["settings"]["train.max_steps"]
        assert {name: point[name] for name in ("parameters", "tokens", "eval_loss")}.items() <= result.items()
        shape = json.loads((folder / "model" / "config.json").read_text())
        assert (shape["hidden_size"], shape["num_hidden_layers"]) == (point["settings"][key], 1)
    best = min(points, key=lambda point: point["eval_loss"])
    page = read(straight / "sweep.html")
    assert json.loads((straight / "sweep.json").read_text())["best"] == best["name"]
    assert best["name"] in page.words and page.tags.count("svg") == 2  # the two settings


def test_a_point_is_the_run_that_pretrain_makes_of_its_settings(server: Server, straight: Path, tmp_path: Path) -> None:
    point = straight / "points" / points_of(straight)[2]["name"]
    again = server.run("pretrain", {"config": point / "config.yaml"}, tmp_path / "run")
    assert again.code == 0, again.stderr
    assert again.weights == (point / "model" / "model.safetensors").read_bytes()


def test_a_killed_sweep_goes_on_inside_the_point(
    server: Server, settings: Words, straight: Path, tmp_path: Path
) -> None:
    second = points_of(straight)[1]["name"]

    def kill(pid: int, output_dir: Path) -> None:
        checkpoints = output_dir / "points" / second / "checkpoints"
        wait_for(lambda: any(checkpoints.glob("step-*")), "the second point's first checkpoint")
        os.kill(pid, signal.SIGKILL)

    killed = server.run("sweep", settings, tmp_path / "sweep", during=kill)
    assert killed.code == -signal.SIGKILL
    before = when_trained(tmp_path / "sweep")
    assert 1 <= len(before) < 4 and not (tmp_path / "sweep" / "sweep.json").exists()
    ended = server.run("sweep", settings, tmp_path / "sweep")
    assert ended.code == 0, ended.stderr
    assert "Resuming from" in ended.stderr and "Point 1 of 4" not in ended.stderr
    assert before.items() <= when_trained(tmp_path / "sweep").items()
    assert points_of(tmp_path / "sweep") == points_of(straight)


@pytest.mark.slow
def test_two_processes_find_what_one_does(settings: Words, straight: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", "accelerate_configs/cpu_2proc.yaml"]
    two = run_script(launcher, "sweep", settings, tmp_path / "sweep")
    manifests = list(two.output_dir.glob("points/*/checkpoints/*/manifest.json"))
    assert manifests and all(json.loads(path.read_text())["world_size"] == 2 for path in manifests)
    for mine, theirs in zip(points_of(two.output_dir), points_of(straight), strict=True):
        assert mine.pop("eval_loss") == pytest.approx(theirs.pop("eval_loss"), rel=1e-5)
        assert mine.pop("bits_per_byte") == pytest.approx(theirs.pop("bits_per_byte"), rel=1e-5)
        assert mine == theirs


def test_a_grid_that_has_grown_trains_what_is_new(server: Server, settings: Words, straight: Path) -> None:
    before = when_trained(straight)
    ended = server.run("sweep", settings | {"grid.train.max_steps": [*STEPS, 2]}, straight)
    assert ended.code == 0, ended.stderr
    after = when_trained(straight)
    assert before.items() <= after.items() and len(after) == 6


def test_a_finished_point_of_other_settings_is_not_taken_for_this_one(
    server: Server, settings: Words, straight: Path
) -> None:
    ended = server.run("sweep", settings | {"seed": 1}, straight)
    assert ended.code == 2 and "holds another run: seed was 0, now 1" in ended.stderr


def test_a_point_that_diverges_is_a_result(server: Server, settings: Words, tmp_path: Path) -> None:
    rates = {"grid.optim.learning_rate": [0.01, 1e30]}
    base = {key: value for key, value in settings.items() if not key.startswith("grid.")}
    extra = {"train.max_steps": 4, "tracking.to": ["tensorboard"]}
    ended = server.run("sweep", base | rates | extra, tmp_path / "sweep", before="test_sweep.tell_closed_trackers")
    assert ended.code == 0, ended.stderr
    good, bad = points_of(tmp_path / "sweep")
    assert (good["state"], bad["state"], bad["eval_loss"]) == ("done", "diverged", None)
    assert "diverged at step" in ended.stderr and "learning_rate 0.01" in ended.stdout
    read(tmp_path / "sweep" / "sweep.html")
    assert ended.stderr.count("tracker closed") == 2
    again = server.run("sweep", base | rates | extra, tmp_path / "sweep")
    assert again.code == 0 and again.stdout == ended.stdout and "Point" not in again.stderr, again.stderr


def tell_closed_trackers() -> None:
    """Print a line where a tracker is closed."""
    from accelerate.tracking import TensorBoardTracker

    TensorBoardTracker.finish = lambda self: print("tracker closed", file=sys.stderr)  # type: ignore[method-assign]


def test_sizes_by_lengths_give_a_law_and_its_chart(tmp_path: Path) -> None:
    law, grid = Law(2.0, 300.0, 0.4, 200.0, 0.3), {"model.preset": ["a<b", "c", "d"], "train.max_steps": [10, 20, 40]}
    points = [
        {
            "name": f"{number}-{steps}",
            "settings": {"model.preset": preset, "train.max_steps": steps},
            "state": "done",
            "parameters": 10**number,
            "tokens": 1000 * steps,
            "eval_loss": law.loss(10**number, 1000 * steps),
            "bits_per_byte": 1.0,
            "seconds": 1.0,
        }
        for number, preset in enumerate(grid["model.preset"], 5)
        for steps in grid["train.max_steps"]
    ]
    sweep = summarize(grid, [*points, {**points[0], "name": "lost", "state": "diverged", "eval_loss": None}])
    assert sweep["scaling"]["law"] == pytest.approx({**vars(law), "exponent": 3 / 7}, rel=1e-3)
    told = tell_sweep(sweep)
    assert "L(N, D) = 2 + 300 / N^0.400 + 200 / D^0.300" in told and "95 % of the laws" in told
    assert "the law's best size is" in told
    write_sweep_page(sweep, tmp_path / "sweep.html")
    page = read(tmp_path / "sweep.html")
    assert (
        "Best size grows" in page.words
        and "a<b" in page.words
        and "diverged" in page.words
        and "100k parameters" in page.words
    )
    assert page.tags.count("svg") == 2  # the law, and the steps

    sweep["scaling"]["intervals"]["exponent"] = (0.1, 0.8)
    assert "do not settle the best size" in tell_sweep(sweep) and "the law's best size" not in tell_sweep(sweep)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid.optim.lerning_rate": [1, 2]}, ("grid", "optim.lerning_rate", "did you mean `optim.learning_rate`")),
        ({"grid.optim.learning_rate": [0.1, "fast"]}, ("grid", "optim.learning_rate takes a number, not 'fast'")),
        ({"grid.optim.learning_rate": [0.1, -1]}, ("optim.learning_rate must be above 0",)),
        ({"grid.seed.x": [1]}, ("there is no setting seed.x",)),
        ({"grid.train.precision": ["bf16"]}, ("train.precision is one for all points",)),
        ({"grid.train.max_steps": []}, ("grid.train.max_steps holds no value",)),
        ({"grid.model.config_overrides.hiden_size": [8]}, ("no field 'hiden_size'", "did you mean 'hidden_size'")),
        ({"grid.model.config_overrides.hidden_act": ["silu", "foo"]}, ("transformers knows no 'foo'",)),
        ({"grid.data.sequence_length": [16, 4096]}, ("sequence_length 4096", "2048")),
        ({"grid.model": [{"preset": "tiny"}]}, ("grid: model is a section; name a setting inside it",)),
        ({"grid.train.max_steps": [12, 4], "optim.warmup_steps": 8}, ("warmup_steps 8", "the run's 4 steps")),
        ({"grid.train.batch_stages": [[], [[99, 4]]]}, ("batch_stages take 99 steps", "has only")),
        ({"hub.repo_id": "me/model"}, ("a sweep publishes nothing", "push.py")),
        ({"resume": "hub"}, ("auto or never",)),
    ],
)  # fmt: skip
def test_mistakes_anywhere_in_the_grid_come_first(
    server: Server, settings: Words, tmp_path: Path, change: Words, words: tuple[str, ...]
) -> None:
    ended = server.run("sweep", settings | change, tmp_path / "sweep")
    assert_refused(ended, *words)
    assert_nothing_written(tmp_path / "sweep")


def test_the_folder_of_a_run_is_no_place_for_a_sweep(server: Server, settings: Words, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert_refused(server.run("sweep", settings, tmp_path / "run"), "holds a run", "--output_dir")
