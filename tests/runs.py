"""Recipes run as a user runs them, but in children forked from one process that has imported them already.

A recipe takes about eight seconds to import and a tiny training one second. The server below is a process of its own
(nothing that other tests started lives in it); each child parses the words of a command line, calls ``launch`` and is
a run like any other: it can be killed, and it leaves an exit status, two streams and an output folder.
"""

import atexit
import functools
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES = ("pretrain", "prepare", "score", "generate", "sentiment", "translation", "push", "sft", "sweep")
PATIENCE = 120.0  # seconds until something that is waited for counts as hanging

Words = dict[str, Any]
"""Settings by dotted key, as on a command line: values become JSON where they are not text."""


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    code: int
    stdout: str
    stderr: str
    output_dir: Path

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        return json.loads((self.output_dir / "status.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what depends on the clock."""
        clock = ("seconds", "tokens_per_second")
        lines = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in clock} for line in lines]

    @property
    def weights(self) -> bytes:
        """The bytes of the final model's weights."""
        return (self.output_dir / "model" / "model.safetensors").read_bytes()


class Server:
    """The process that forks; one run at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(
        self,
        recipe: str,
        settings: Words,
        output_dir: Path,
        during: Callable[[int, Path], None] = lambda pid, output_dir: None,
        before: str = "",
    ) -> Ended:
        """Run a recipe to its end.

        Args:
            during: Called with the run's process id and output folder once it has started, such as to kill it.
            before: Name of a function, ``module.function``, that the child calls first: a fault to inject.
        """
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        streams = [output_dir.with_name(f"{output_dir.name}.{name}") for name in ("stdout", "stderr")]
        words = command_line({**settings, "output_dir": output_dir})
        pid = self._ask({"recipe": recipe, "words": words, "streams": list(map(str, streams)), "before": before})
        during(pid, output_dir)
        code = self._answer()
        return Ended(code, *(stream.read_text() for stream in streams), output_dir)

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)

    def _ask(self, request: Words) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@functools.cache
def shared_server() -> Server:
    """Return the test session's server, started when it is first needed."""
    server = Server()
    atexit.register(server.close)
    return server


def command_line(settings: Words) -> list[str]:
    """Return settings as the words of a command line."""
    return [
        f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in settings.items()
    ]


def write_corpus(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Write a small corpus as JSON Lines: sentences of ten to forty words, of which no two are alike."""
    draw = random.Random(seed)
    syllables = "ba ke li mo nu ra se ti vo zu pra ste klo".split()
    vocabulary = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(150)]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(10, 40))).capitalize() + "." for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny_run(corpus: Path, cache: Path, **changed: Any) -> Words:
    """Return settings of a training that takes a second; ``changed`` keys have ``__`` for their dot."""
    settings: Words = {
        "data.train_files": str(corpus),
        "data.cache_dir": cache,
        "data.sequence_length": 32,
        "tokenizer.vocab_size": 300,
        "model.preset": "tiny",
        "model.config_overrides": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
        },
        "optim.learning_rate": 0.01,
        "train.max_steps": 12,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 3,
        "train.eval_every": 4,
        "train.save_every": 1,
        "generation.max_new_tokens": 8,
    }
    return settings | {key.replace("__", "."): value for key, value in changed.items()}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: naming what never came.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.001)


def newest_step(output_dir: Path) -> int:
    """Return the step of the newest checkpoint folder; 0 where there is none."""
    return max((int(path.name[5:]) for path in (output_dir / "checkpoints").glob("step-*")), default=0)


def signal_after(number: int, step: int, delay: float = 0.0) -> Callable[[int, Path], None]:
    """Return what sends a signal ``delay`` seconds after the checkpoint of ``step`` has appeared."""

    def send(pid: int, output_dir: Path) -> None:
        wait_for(lambda: newest_step(output_dir) >= step, f"the checkpoint of step {step}")
        time.sleep(delay)
        os.kill(pid, number)

    return send


def _serve() -> None:
    """Import the recipes, then fork a run per line of standard input; answer its process id, then its exit status."""
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "tests")]
    modules = {name: importlib.import_module(name) for name in RECIPES}
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            _run(modules[request["recipe"]], request)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(recipe: Any, request: Words) -> None:
    """Become the run: own session, own streams, own command line."""
    from hfkit.config import parse_config
    from hfkit.launch import launch

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["streams"], 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = [recipe.__file__, *request["words"]]
    if request["before"]:
        module, function = request["before"].rsplit(".", 1)
        getattr(importlib.import_module(module), function)()
    code: Any = 1
    try:
        if recipe.__name__ == "push":  # no run: it locks nothing and leaves no status
            raise SystemExit(recipe.main())
        launch(recipe.main, parse_config(getattr(recipe, f"{recipe.__name__.title()}Config")))
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
