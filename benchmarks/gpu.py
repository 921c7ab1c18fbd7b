"""One GPU, one command, at most nine minutes, no network: is training right, then how fast, and against whom.

    python benchmarks/gpu.py [--minutes 9] [--output benchmarks/results]
    python benchmarks/gpu.py --cpu            the same code at toy size, for its test

Every line is written to gpu.jsonl as it is made, so that a stopped run keeps what it has; a line whose estimate no
longer fits before the deadline says so. At the end the lines become one table and gpu.json. MFU is of the dense bf16
peak (`hfkit.tracking`), with 6 · matrix parameters + 12 · layers · width · length operations a token; `causal` counts
half of the attention.
"""

import argparse
import gc
import importlib.util
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import gpu_checks
from gpu_checks import start_anew
from hfkit.attention import block_mask
from hfkit.model import PRESETS, count_parameters, flops_per_token
from hfkit.tracking import peak_flops
from peers import PEERS, Task
from results import FOLDER, save_result
from stopwatch import time_side

LENGTH, VOCABULARY = 2048, 50304
TOY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
}
PRESET_OF = {"124M": "base", "350M": "medium", "1B": "large"}
ROWS_OF = {"124M": 32, "350M": 32, "1B": 16}  # micro-batch; no accumulation


class Report:
    """Runs the lines one after another, keeps each, and stops before the deadline."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.lines: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", "utf-8")

    def line(self, name: str, estimate: float, action: Callable[[], dict[str, Any]]) -> None:
        """Run one line if ``estimate`` seconds are left; an error is its result and does not end the run."""
        begin = time.monotonic()
        line: dict[str, Any] = {"name": name}
        if self.deadline - begin < estimate:
            line["skipped"] = f"{self.deadline - begin:.0f} s left, {estimate:.0f} s needed"
        else:
            start_anew()
            try:
                line |= action()
            except Exception as error:
                line |= {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            line["seconds"] = round(time.monotonic() - begin, 1)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def name_facts(device: str, size: int) -> dict[str, Any]:
    """Return what the device is, and what a large product reaches on it."""
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16
        facts |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        facts["peak_tflops"] = (peak_flops(torch.device(device)) or 0) / 1e12
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return facts | {"product_tflops": round(2 * size**3 / timed(lambda: left @ right, device) / 1e12, 2)}


def timed(action: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Return the shortest of some runs, in seconds."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[2:])


def time_attention(device: str, rows: int, heads: int, length: int, size: int) -> dict[str, Any]:
    """Return milliseconds of attention, forward and backward: causal, and documents of 512 tokens apart."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (rows, heads, length, size)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    document = (torch.arange(length, device=device) // 512).expand(rows, length)
    blocks = block_mask(document, compiled=device == "cuda")
    dense = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(
        length, length, dtype=torch.bool, device=device
    ).tril()
    ways: dict[str, Callable[[], Any]] = {
        "causal": lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        "dense mask": lambda: scaled_dot_product_attention(query, key, value, attn_mask=dense),
    }
    if device == "cuda":
        from torch.nn.attention.flex_attention import flex_attention
        from torch.nn.attention.varlen import varlen_attn

        flex = torch.compile(flex_attention, dynamic=False)
        starts = torch.arange(0, rows * length + 1, min(512, length), dtype=torch.int32, device=device)

        def flat(part: torch.Tensor) -> torch.Tensor:
            return part.transpose(1, 2).reshape(rows * length, heads, size)

        ways["flex"] = lambda: flex(query, key, value, block_mask=blocks)
        ways["varlen"] = lambda: varlen_attn(
            flat(query), flat(key), flat(value), starts, starts, 512, 512, window_size=(-1, 0)
        )
    figures: dict[str, Any] = {}
    for name, attend in ways.items():
        try:
            figures[name] = round(timed(lambda attend=attend: attend().sum().backward(), device) * 1e3, 3)
        except Exception as error:
            figures[name] = f"{type(error).__name__}: {str(error)[:120]}"
    return figures


def time_training(peer: str, task: Task, warm_up: int, steps: int) -> dict[str, Any]:
    """Return the speed of one side on one task, as tokens a second and as a share of the device's peak."""
    figures = time_side(partial(PEERS[peer], task), task.device, warm_up, steps)
    tokens = task.rows * task.length
    speed = tokens / figures["ms_per_step"] * 1e3
    start_anew()
    model = Task(task.shape, 1, 1, device="meta").build_model()
    operations = flops_per_token(model, task.length)
    causal = operations - (operations - 6 * count_parameters(model).matrix) // 2
    figures |= {"parameters": count_parameters(model).parameters, "tokens_per_second": round(speed)}
    if task.device == "cuda" and (peak := peak_flops(torch.device("cuda"))):
        figures |= {"mfu": round(speed * operations / peak, 4), "mfu_causal": round(speed * causal / peak, 4)}
    figures["recompiles"] = sum(torch._dynamo.utils.counters["recompiles"].values())
    return figures


def check_lines(report: Report, device: str, steps: int) -> None:
    """Correctness first: a fast wrong step is worth nothing."""
    report.line("losses against the CPU in fp32", 15, gpu_checks.check_losses)
    report.line("no mask in the captured graph", 5, gpu_checks.check_graph)
    report.line("packed documents against a dense mask", 15, gpu_checks.check_isolation)
    for precision in ("bf16", "fp16") if device == "cuda" else ("bf16",):
        report.line(f"{precision} against fp32", 15, partial(gpu_checks.check_precision, precision, steps))
    report.line("resume to the last bit", 15, partial(gpu_checks.check_resume, "auto"))
    report.line("kernels of plain rows", 10, partial(gpu_checks.name_kernels, False))
    report.line("kernels of packed rows", 10, partial(gpu_checks.name_kernels, True))


def speed_tasks(device: str) -> dict[str, tuple[str, Task, float]]:
    """Return line → (side, task, estimated seconds), the most telling first."""
    if device == "cpu":
        toy = partial(Task, TOY, 2, 64, kept=2)
        return {
            "toy": ("hfkit", toy(compiled=False), 1),
            "toy, documents apart": ("hfkit", toy(document=20), 1),
            "toy, recomputed": ("hfkit", toy(recompute=True), 1),
            "toy, Trainer": ("trainer", toy(), 1),
            "toy, bare": ("bare", toy(), 1),
        }

    def task(size: str, **options: Any) -> Task:
        shape = {**PRESETS[PRESET_OF[size]], "vocab_size": VOCABULARY}
        shape.pop("model_type")
        rows = options.pop("rows", ROWS_OF[size])
        common = {"compiled": True, "precision": "bf16", "device": "cuda", "kept": 8}
        return Task(shape, rows, LENGTH, **{**common, **options})

    liger = importlib.util.find_spec("liger_kernel") is not None
    tasks = {
        "350M": ("hfkit", task("350M"), 45.0),
        "350M, documents of 512 apart": ("hfkit", task("350M", document=512), 45.0),
        "350M, Trainer compiled": ("trainer", task("350M", liger=liger, rows=8), 60.0),
        "350M, hfkit on Trainer's rows": ("hfkit", task("350M", rows=8), 30.0),
        "350M, bare compiled": ("bare", task("350M", rows=8), 60.0),
        "124M": ("hfkit", task("124M"), 35.0),
        "1B": ("hfkit", task("1B"), 60.0),
        "1B, fp8": ("hfkit", task("1B", precision="fp8"), 60.0),
        "124M, eager": ("hfkit", task("124M", compiled=False), 25.0),
        "1B, recomputed": ("hfkit", task("1B", recompute=True), 50.0),
    }
    if importlib.util.find_spec("torchao") is None:
        del tasks["1B, fp8"]
    return tasks


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print the lines with a speed as a table."""
    columns = ("ms_per_step", "tokens_per_second", "mfu", "mfu_causal", "peak_gb", "host_waits", "first_step_seconds")
    print("\n| line | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for line in lines:
        if "tokens_per_second" in line:
            print(f"| {line['name']} | " + " | ".join(str(line.get(column, "")) for column in columns) + " |")
    failed = [line["name"] for line in lines if line.get("ok") is False]
    print(f"\nfailed: {', '.join(failed) or 'none'}")


def main() -> None:
    """Run every line that fits, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; determinism needs it
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.cpu:  # graphs are captured all the same; making kernels takes minutes and is not what this form is for
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    device = "cpu" if options.cpu else "cuda"
    name = "gpu_on_cpu" if options.cpu else "gpu"
    report = Report(options.output / f"{name}.jsonl", 60 * options.minutes - 20)
    big = device == "cuda"
    report.line("device", 10, partial(name_facts, device, 8192 if big else 256))
    for size in (64, 128):
        shape = (8, 1024 // size, LENGTH, size) if big else (1, 2, 64, size)
        report.line(f"attention, head size {size}", 20, partial(time_attention, device, *shape))
    check_lines(report, device, 200 if big else 8)
    warm_up, steps = (6, 20) if big else (2, 3)
    for line, (peer, task, estimate) in speed_tasks(device).items():
        report.line(line, estimate, partial(time_training, peer, task, warm_up, steps))
    print_table(report.lines)
    save_result(name, {"lines": report.lines}, options.output)


if __name__ == "__main__":
    main()
