"""accelerate_configs/: each file loads and passes the launcher's checks; the CPU ones really start their processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}

# Processes in all, machines, mixed precision, FSDP version.
EXPECTED = {
    "cpu": (1, 1, "no", None),
    "cpu_2proc": (2, 1, "no", None),
    "single_gpu": (1, 1, "bf16", None),
    "ddp": (8, 1, "bf16", None),
    "fsdp2": (8, 1, "bf16", 2),
    "fsdp2_zero2": (8, 1, "bf16", 2),
    "multi_node": (16, 2, "bf16", None),
}

# The launcher does not pass `use_cpu` on to several processes: like hfkit.launch, the script asks for the CPU itself.
WORKER = """
from accelerate import Accelerator
import torch
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.ones(1), reduction="sum")
if accelerator.is_main_process:
    print(f"RAN {accelerator.num_processes} {int(total)} {accelerator.device.type} {accelerator.mixed_precision}")
accelerator.end_training()
"""


def test_every_configuration_is_listed() -> None:
    assert CONFIGS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_passes_the_launchers_checks(name: str) -> None:
    processes, machines, precision, fsdp_version = EXPECTED[name]
    config = load_config_from_file(str(CONFIGS[name]))  # refuses keys it does not know
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (processes, machines, precision)

    words = ["--config_file", str(CONFIGS[name]), "recipes/pretrain.py"]
    arguments, _defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == processes
    assert arguments.use_fsdp is (fsdp_version is not None)
    if fsdp_version:
        assert int(arguments.fsdp_version) == fsdp_version
        assert str(arguments.fsdp_reshard_after_forward).lower() == str(name == "fsdp2").lower()


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_says_when_and_how_and_names_no_layer(name: str) -> None:
    text = CONFIGS[name].read_text("utf-8")
    when, command, *_ = text.splitlines()
    assert when.startswith("# ")
    assert command.startswith(f"# accelerate launch --config_file accelerate_configs/{name}.yaml ")
    assert command.endswith(" recipes/pretrain.py")
    fsdp = yaml.safe_load(text).get("fsdp_config", {})
    assert "fsdp_transformer_layer_cls_to_wrap" not in fsdp, "the model says itself what its layers are"


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("cpu_2proc", 2)])
def test_cpu_configuration_starts_its_processes(tmp_path: Path, name: str, processes: int) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name])]
    if processes > 1:
        launcher += ["--main_process_port", "0"]  # any free port: other tests may be launching at the same time
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"RAN {processes} {processes} cpu no\n" in done.stdout
