"""metrics.jsonl, progress, throughput, trackers."""

import io
import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from hfkit.progress import Progress
from hfkit.settings import BadInput, TrackingConfig
from hfkit.tracking import (
    MetricsLog,
    Throughput,
    compute_mfu,
    find_peak,
    flatten,
    log_to_trackers,
    read_metrics,
    start_trackers,
)

TOKEN = "hf_" + "PlantedPlantedPlanted123"


class Clock:
    """Seconds that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_resumed_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, start=0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0 / step})
        log.write({"step": step, "eval_loss": 2.0 / step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 20, "lo')  # torn by a crash
    resumed = MetricsLog(path, start=20)
    resumed.write({"step": 30, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [  # flushed, though not closed
        {"step": 10, "loss": 0.1},
        {"step": 10, "eval_loss": 0.2},
        {"step": 20, "loss": 0.05},
        {"step": 20, "eval_loss": 0.1},
        {"step": 30, "loss": 0.5},
    ]


def test_log_holds_one_line_per_step_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 5, "eval_loss": 3.0})
    log = MetricsLog(path, start=5)
    log.write({"step": 5, "eval_loss": 4.0})  # the evaluation of step 5, repeated after a resume
    log.write({"step": 5, "loss": 2.0})
    log.write({"step": 5, "loss": 2.5})
    assert read_metrics(path) == [{"step": 5, "eval_loss": 3.0}, {"step": 5, "loss": 2.0}]


def test_new_run_empties_the_log_and_keeps_the_evaluation_before_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 8.0}\n')
    MetricsLog(path, start=0)
    assert read_metrics(path) == [{"step": 0, "eval_loss": 9.0}]


def test_torn_last_line_without_resume_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 8.0}\n{"step": 2, "loss": 7.0}')  # whole, but its newline is missing
    MetricsLog(path, start=2).write({"step": 3, "loss": 6.0})
    assert [line["loss"] for line in read_metrics(path)] == [8.0, 7.0, 6.0]


def test_non_finite_figures_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "nested": [float("-inf"), 1]})
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "nested": [null, 1]}\n'


def test_missing_metrics_are_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_progress_in_a_log_file_writes_sparse_plain_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, "train", "step", start=40, stream=stream, clock=clock) as progress:
        for _ in range(20):  # steps 41 to 60, one a second
            clock.now += 1
            progress.update(1, loss=2.0, learning_rate=1e-3, tokens_per_second=1000.0)
    figures = "loss 2  lr 1.00e-03  1,000 tokens/s"
    assert stream.getvalue().splitlines() == [
        f"train 45/100 steps (45%)  {figures}  0:00:05 elapsed  0:00:55 remaining",
        f"train 50/100 steps (50%)  {figures}  0:00:10 elapsed  0:00:50 remaining",
        f"train 55/100 steps (55%)  {figures}  0:00:15 elapsed  0:00:45 remaining",
        f"train 60/100 steps (60%)  {figures}  0:00:20 elapsed  0:00:40 remaining",
    ]


def test_progress_of_a_day_stays_short() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(None, "read", "document", stream=stream, clock=clock) as progress:
        for _ in range(86_400):
            clock.now += 1
            progress.update()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "read 5 documents  0:00:05 elapsed"
    assert lines[-1] == "read 86,400 documents  24:00:00 elapsed"
    assert 500 < len(lines) < 700


def test_progress_on_a_terminal_is_a_bar_that_starts_at_the_resumed_step() -> None:
    stream = Terminal()
    with Progress(100, "train", "step", start=40, stream=stream) as progress:
        assert progress.bar is not None and progress.bar.n == 40
        progress.write("a sample")
        progress.update(60, loss=1.5)
    assert "40/100" in stream.getvalue()
    assert "a sample\n" in stream.getvalue()
    assert "100/100" in stream.getvalue().split("\r")[-1]
    assert "loss 1.5" in stream.getvalue().split("\r")[-1]


def test_progress_of_other_processes_is_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(10, "train", stream=stream, enabled=False) as progress:
            progress.update(10, loss=1.0)
            progress.write("text")
        assert stream.getvalue() == ""


def test_throughput_leaves_out_pauses() -> None:
    clock = Clock()
    speed = Throughput(seconds=50.0, clock=clock)
    speed.add(600)
    clock.now += 2
    with speed.pause():
        clock.now += 1000
        with speed.pause():  # a save during an evaluation
            clock.now += 1000
        clock.now += 1000
        assert speed.seconds == 52.0
    clock.now += 1
    assert speed.read() == 200.0
    assert speed.seconds == 53.0
    speed.add(40)
    clock.now += 4
    assert speed.read() == 10.0
    assert speed.read() is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert find_peak(name) == peak


def test_mfu_needs_a_peak_and_a_speed() -> None:
    assert compute_mfu(6e9, 50_000, 300e12, devices=2) == 0.5
    assert compute_mfu(6e9, 50_000, None, devices=2) is None
    assert compute_mfu(6e9, None, 300e12, devices=2) is None


def test_unknown_tracker_is_bad_input_that_lists_the_choices() -> None:
    with pytest.raises(BadInput, match=r"'tensorbord' is no tracker; there are aim, .*wandb; installed: .*tensorboard"):
        TrackingConfig(to=["tensorbord"])


def test_missing_tracker_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfkit.settings.find_spec", lambda name: name == "tensorboard")
    with pytest.raises(BadInput, match=r"'wandb' is not installed; .*; installed: tensorboard$"):
        TrackingConfig(to=["tensorboard", "wandb"])


def test_flattened_configuration_masks_tokens() -> None:
    assert flatten({"data": {"train_files": [f"https://x/{TOKEN}"]}, "seed": 1, "tokenizer": {"vocab_size": 300}}) == {
        "data.train_files": "['https://x/***']",
        "seed": 1,
        "tokenizer.vocab_size": 300,
    }


def test_tensorboard_gets_figures_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    accelerator = Accelerator(cpu=True)
    config = {"hub": {"note": f"{TOKEN} 0123456789secret"}, "optim": {"learning_rate": 0.5}}
    start_trackers(accelerator, TrackingConfig(to=["tensorboard"]), config, tmp_path)
    log_to_trackers(accelerator, {"step": 1, "loss": 2.0, "grad_norm": None})
    log_to_trackers(accelerator, {"step": 1, "eval_loss": 3.0})
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "trackers" / "hfkit")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval/eval_loss")] == [(1, 3.0)]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"optim.learning_rate" in written
    assert TOKEN.encode() not in written and b"0123456789secret" not in written
