"""One process of a run: signals, exit codes, what the launcher was asked for and what it gave, threads and memory.

``accelerate launch`` falls back silently: two processes that each believe to be alone, a sharding strategy ignored on
the CPU, fp16 without a loss scale. What was obtained is compared with what was asked before anything is written.
"""

import ctypes
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers.utils.logging import disable_progress_bar

from hfkit.data.workers import num_workers
from hfkit.loop import Diverged, Preempted
from hfkit.masking import mask_secrets
from hfkit.precision import fp8_recipe, resolve_precision
from hfkit.remote import HubError, check_access
from hfkit.settings import BadInput, HubConfig, TrainConfig
from hfkit.status import BAD_INPUT, DIVERGED, DONE, FAILED, PREEMPTED, PUSH_FAILED, Status, is_locked, is_main_process

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class PushFailed(Exception):
    """A push that was required failed; everything is kept locally."""


class Stopper:
    """Turns signals into a polite stop: at once while nothing is at stake, after the step while training."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False  # whether the loop looks at `requested` by itself

    def install(self) -> None:
        """Catch the signals of preemption, and of a launcher that dies without passing them on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        _die_with_launcher()

    def release(self) -> None:
        """Ignore the signals from here on: the outcome is known and only has to be written down."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Schedulers and launchers often send a signal twice: the second must not break into what the first began.
        if not self.deferred and not again:
            raise Preempted(f"stopped by {signal.Signals(number).name} before the first step")


stopper = Stopper()


def launch(main: Callable[[Any], None], config: Any, exclusive: bool = True) -> None:
    """Run a recipe's ``main`` on this process and exit with the documented status.

    Args:
        config: The recipe's settings; ``output_dir`` is locked by the main process for as long as ``main`` runs, unless
            ``one_shot`` says that a model is only used: then nothing is locked, and no status left.
        exclusive: Refuse a folder that another run has locked; a recipe that only reads goes on without a status.
    """
    tune_process()
    disable_progress_bar()  # transformers' own, of a model that saves in a millisecond
    stopper.install()
    status: Status | None = None
    try:
        leaves_status = is_main_process() and not getattr(config, "one_shot", False)
        if leaves_status and (exclusive or not is_locked(Path(config.output_dir))):
            status = Status(Path(config.output_dir))
            _current.append(status)
            check_hub(config)
        main(config)
        code, message = DONE, ""
    except BadInput as error:
        code, message = BAD_INPUT, mask_secrets(" ".join(str(error).split()))
        if is_main_process():
            print(f"error: {message}", file=sys.stderr)
    except Diverged as error:
        code, message = DIVERGED, str(error)
        print(f"error: training diverged at {message}", file=sys.stderr)
    except Preempted as error:
        code, message = PREEMPTED, str(error)
        if is_main_process():
            print(f"{message}; run the same command again to go on", file=sys.stderr)
    except (PushFailed, HubError) as error:
        code, message = PUSH_FAILED, str(error)
        print(f"error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        code, message = 130, "interrupted twice"
    except Exception as error:
        code, message = FAILED, f"{type(error).__name__}: {error}"
        print(mask_secrets(traceback.format_exc()), end="", file=sys.stderr)
    stopper.release()
    if status is not None:
        status.finish(code if code != 130 else FAILED, mask_secrets(message))
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and code == DONE:
        torch.distributed.destroy_process_group()
    # Library threads (an upload that hangs, a dead collective) must not hold back the exit status.
    os._exit(code)


def check_hub(config: Any) -> None:
    """See that a recipe may publish where its ``hub`` section says, before data is prepared or anything is trained."""
    if hub := getattr(config, "hub", None):
        check_access(hub, "model" if isinstance(hub, HubConfig) else "dataset")


_current: list[Status] = []


def current_status() -> Status | None:
    """Return the status of this process's run; None on all but the main process."""
    return _current[-1] if _current else None


def _die_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies: with one process it passes no signal on and leaves an orphan.

    Only under a launcher; under a shell a run started with nohup must survive it.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    words = _command_line(pid)
    named = any(re.search(r"(^|/)(accelerate|accelerate-launch|torchrun)$", word) for word in words[:3])
    module = any(word in ("accelerate.commands.launch", "torch.distributed.run") for word in words)
    return (named or module) and any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def tune_process() -> None:
    """Share the cores among the machine's processes, and keep freed memory for the next step (glibc; 1.09x measured).

    OMP_NUM_THREADS is respected for a single process; for several, launchers set it to 1 without being asked.
    """
    if "OMP_NUM_THREADS" not in os.environ or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        torch.set_num_threads(num_workers())
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Build the Accelerator and see that the launcher gave what it was asked for."""
    precision = resolve_precision(config.precision)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            *([fp8_recipe()] if precision == "fp8" else []),
        ],
    )
    check_launch(accelerator, precision)
    return accelerator


def check_launch(accelerator: Accelerator, precision: str) -> None:
    """Raise BadInput where the processes, the strategy or the precision are not those that were asked for."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise BadInput(f"the launcher started {asked} processes, but each of them runs alone")
    words = _command_line(os.getppid())
    if _is_launcher(os.getppid()) and "--num_processes" in words:
        wanted = words[words.index("--num_processes") + 1]
        if wanted.isdigit() and int(wanted) != accelerator.num_processes:
            raise BadInput(
                f"accelerate was asked for {wanted} processes and started {accelerator.num_processes}; "
                "on a CPU use --config_file accelerate_configs/cpu_2proc.yaml"
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type.value != "FSDP":
        raise BadInput(
            "the launcher was asked for FSDP, which Accelerate ignores without a GPU; use ddp.yaml or cpu.yaml"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise BadInput(
            "DeepSpeed owns the step and the checkpoint; use accelerate_configs/fsdp2.yaml, the same sharding"
        )
    if accelerator.mixed_precision != precision:
        raise BadInput(f"precision {precision} was asked for and {accelerator.mixed_precision} obtained")
