"""Energy is counted where devices report it, over counters that begin anew, and nowhere else."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hfkit import energy
from hfkit.energy import EnergyMeter
from hfkit.loop import Progressed
from hfkit.recorder import Recorder


def write_zone(folder: Path, microjoules: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")


def test_processors_count_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "gpu_watts", lambda: 0.0)
    write_zone(tmp_path / "intel-rapl:0", 5_000_000)
    write_zone(tmp_path / "intel-rapl:1", 999_000_000)
    write_zone(tmp_path / "intel-rapl:0:0", 1)  # a part of the first one: counted already
    meter = EnergyMeter(tmp_path)
    write_zone(tmp_path / "intel-rapl:0", 7_000_000)
    write_zone(tmp_path / "intel-rapl:1", 2_000_000)
    write_zone(tmp_path / "intel-rapl:0:0", 10_000_000)
    assert meter.read() == pytest.approx(2 + 3)
    assert meter.read() == 0.0


@pytest.fixture(name="gpus")
def trained_on_one_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs, of which this process sees all and uses the first."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda index: 300_000 + index)  # milliwatts


def test_gpus_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(energy.time, "monotonic", lambda: next(clock))
    assert EnergyMeter(tmp_path).read() == pytest.approx(4 * 300)


def test_only_gpus_that_the_run_uses_are_counted(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert energy.gpu_watts() == pytest.approx(600.001)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process is shown one
    assert energy.gpu_watts() == 300
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # trained on the processor
    assert energy.gpu_watts() == 0.0


def test_a_gpu_that_does_not_report_its_power_is_no_error(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    class NVMLError(Exception):
        """As pynvml's: of no class that torch would name."""

    def refuse(index: int) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    assert energy.gpu_watts() == 0.0


def test_no_device_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zone(tmp_path / "intel-rapl:0", 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not for you")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert EnergyMeter(tmp_path).read() == 0.0  # torch without CUDA, or without the library that asks the driver


def test_result_tells_only_what_was_counted(tmp_path: Path) -> None:
    recorder = Recorder(Accelerator(cpu=True), tmp_path)
    assert "energy_kwh" not in recorder.final_figures()
    recorder.progress = Progressed(joules=1.8e6)
    assert recorder.final_figures()["energy_kwh"] == 0.5
