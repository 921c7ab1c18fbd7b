"""The loop: one run whatever the split, the same run after a stop, and what happens where numbers are not finite."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hfkit.loop
from hfkit.checkpoint import (
    read_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    state_writers,
    step_folder,
)
from hfkit.data.batches import Plan, Reader, Split, Step, packed_rows, plan_steps
from hfkit.data.shards import IGNORE_INDEX, TokenStream
from hfkit.launch import build_accelerator
from hfkit.loop import Diverged, Hooks, Loop, Preempted, Progressed, Rhythm, seed_step, train_step
from hfkit.losses import CausalLMLoss
from hfkit.optim import build_optimizer, build_schedule
from hfkit.settings import OptimConfig, TrainConfig
from processes import run_in_processes
from streams import number_documents, write_stream
from tiny import tiny_model

LENGTH = 8
ROWS = 39  # an epoch: 4 full steps of 8 and one of 7
DOCUMENTS = [26, *[1] * 14, 60, 3, 9, 2, 14, 31, 5, 48, 7, 60, 33]  # those of one token have no target


def text(folder: Path) -> TokenStream:
    """Write a stream of fewer than 320 ids with rows that have few targets, one target, or none."""
    stream = write_stream(folder, number_documents(DOCUMENTS))
    assert len(stream.tokens) < 320 and stream.num_rows(LENGTH) == ROWS
    return stream


class Bench:
    """One process's loop as ``Run`` builds it, with each step's figures kept."""

    def __init__(
        self, stream: TokenStream, plan: Callable[[int, int], Plan], dropout: float = 0.0, folder: Path | None = None
    ) -> None:
        """Build everything anew; with ``folder``, go on from the checkpoint there."""
        self.accelerator = build_accelerator(TrainConfig(precision="fp32"))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        settings, plan_ = OptimConfig(learning_rate=0.01, warmup_steps=3), plan(rank, world)
        module = CausalLMLoss(tiny_model(dropout=dropout), label_smoothing=0.1, z_loss=0.01)
        self.module, self.optimizer = self.accelerator.prepare(module, build_optimizer(module, settings))
        self.inner = self.accelerator.unwrap_model(self.module).model
        self.figures: list[tuple[float, float, float]] = []
        progress = Progressed()
        if folder is not None:
            restore_model(folder, self.inner)
            restore_optimizer(folder, self.inner, self.optimizer.optimizer)
            progress = Progressed(**read_checkpoint(folder)["progress"])
        read = packed_rows([stream], [1.0], LENGTH, plan_.split, seed=5, last=plan_.last)
        schedule = build_schedule(settings, plan_.max_steps)
        hooks = Hooks(log=self._keep)
        rhythm = Rhythm(plan_.max_steps, log_every=1)
        self.loop = Loop(
            self.accelerator, self.module, self.optimizer, read, schedule, rhythm, progress, hooks, seed=11
        )

    def _keep(self, figures: dict[str, Any]) -> None:
        self.figures.append((figures["loss"], figures["grad_norm"], figures["learning_rate"]))

    def stop_after(self, step: int, folder: Path) -> Path:
        """Run to ``step`` as if a signal came, save there, and return the checkpoint."""

        def save(done: int) -> None:
            writers = state_writers(self.inner, self.optimizer.optimizer)
            if self.accelerator.is_main_process:
                save_checkpoint(folder, done, writers, {"progress": asdict(self.loop.progress)})
            self.accelerator.wait_for_everyone()

        self.loop.hooks.save = save
        self.loop.hooks.should_stop = lambda: self.loop.progress.step == step - 1
        with pytest.raises(Preempted, match=f"stopped after step {step}"):
            self.loop.run()
        return folder / step_folder(step)


def epochs(micro_batch_size: int, number: float = 4.0, stages: Sequence[list[int]] = ()) -> Callable[[int, int], Plan]:
    """Return rank and world → 20 steps of 8 rows: four epochs, of which the last step is short."""
    config = TrainConfig(
        epochs=number, global_batch_size=8, micro_batch_size=micro_batch_size, batch_stages=list(stages)
    )
    return lambda rank, world: plan_steps(config, ROWS, LENGTH, rank, world)


def figures_of(
    stream: TokenStream, micro_batch_size: int, world: int = 1, stages: Sequence[list[int]] = ()
) -> list[tuple[float, float, float]]:
    """Train for four epochs in ``world`` processes; return loss, gradient norm and learning rate of each step."""

    def train() -> tuple[int, bool, list[tuple[float, float, float]]]:
        bench = Bench(stream, epochs(micro_batch_size, stages=stages))
        bench.loop.run()
        wrapped = isinstance(bench.module, nn.parallel.DistributedDataParallel)
        return torch.distributed.get_world_size() if wrapped else 1, wrapped, bench.figures

    answers = run_in_processes(world, train) if world > 1 else [train()]
    assert [(size, wrapped) for size, wrapped, _ in answers] == [(world, world > 1)] * world
    assert all(figures == answers[0][2] for _, _, figures in answers)
    return answers[0][2]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    return text(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def straight(stream: TokenStream) -> list[tuple[float, float, float]]:
    """Figures of eight rows in one pass of one process."""
    return figures_of(stream, 8)


def test_the_data_is_as_unequal_as_it_should_be(stream: TokenStream) -> None:
    """A short last step, steps with different numbers of targets, and a micro-batch without any."""
    plan = epochs(2)(0, 1)
    read = packed_rows([stream], [1.0], LENGTH, plan.split, seed=5, last=plan.last)
    steps = [read(number) for number in range(plan.max_steps)]
    counts = [[int((b["targets"] != IGNORE_INDEX).sum()) for b in step.micro_batches] for step in steps]
    assert (plan.max_steps, plan.last) == (20, 4 * ROWS)
    assert len({step.targets for step in steps}) > 5
    assert len(counts[-1]) == 2 and len(counts[0]) == 4  # four rows are left for the last step
    single = packed_rows([stream], [1.0], LENGTH, Split(8, 1), seed=5, last=plan.last)
    empty = [b for n in range(20) for b in single(n).micro_batches if (b["targets"] == IGNORE_INDEX).all()]
    assert len(empty) >= 4


@pytest.mark.parametrize(("micro_batch_size", "world"), [(4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 2)])
def test_every_split_is_the_same_run(
    stream: TokenStream, straight: list[tuple[float, float, float]], micro_batch_size: int, world: int
) -> None:
    figures = figures_of(stream, micro_batch_size, world)
    assert len(figures) == len(straight) == 20
    assert straight[-1][0] < straight[0][0] - 0.5  # it learns
    for number, (ours, expected) in enumerate(zip(figures, straight, strict=True)):
        assert ours[:2] == pytest.approx(expected[:2], rel=1e-5), f"step {number + 1}"
        assert ours[2] == expected[2], f"learning rate of step {number + 1}"


def test_growing_steps_are_the_same_run_on_every_split(stream: TokenStream) -> None:
    stages = [[4, 2], [6, 4]]
    straight, split = figures_of(stream, 2, stages=stages), figures_of(stream, 1, 2, stages)
    assert len(straight) == len(split) == 10 + 16  # 32 rows in stages, then 124 of 8 rows a step
    for number, (ours, expected) in enumerate(zip(split, straight, strict=True)):
        assert ours[:2] == pytest.approx(expected[:2], rel=1e-5), f"step {number + 1}"
        assert ours[2] == expected[2], f"learning rate of step {number + 1}"


def resumed(stream: TokenStream, stop: int, folder: Path, stages: Sequence[list[int]] = ()) -> tuple[bool, bool]:
    """Whether a run with dropout that stops after ``stop`` steps and is built anew ends as if it had not stopped."""
    plan = epochs(2, 2.5, stages)
    whole = Bench(stream, plan, dropout=0.3)
    whole.loop.run()
    first = Bench(stream, plan, dropout=0.3)
    saved = first.stop_after(stop, folder)
    second = Bench(stream, plan, dropout=0.3, folder=saved)
    second.loop.run()
    steps = plan(0, 1).max_steps
    assert (len(first.figures), len(second.figures), len(whole.figures)) == (stop, steps - stop, steps)
    assert second.loop.progress == whole.loop.progress
    pairs = zip(second.inner.parameters(), whole.inner.parameters(), strict=True)
    figures = [[number.hex() for number in line] for line in first.figures + second.figures]
    expected = [[number.hex() for number in line] for line in whole.figures]
    return figures == expected, all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stop", [1, 4, 5, 12])  # an epoch ends inside the fifth step
def test_stopped_and_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    stream: TokenStream, stop: int, tmp_path: Path
) -> None:
    assert resumed(stream, stop, tmp_path) == (True, True)


@pytest.mark.parametrize("stop", [3, 4, 9])  # inside a stage, at its end, and after all
def test_growing_steps_resume_bit_for_bit(stream: TokenStream, stop: int, tmp_path: Path) -> None:
    assert resumed(stream, stop, tmp_path, [[4, 2], [2, 4]]) == (True, True)


def test_two_processes_resume_bit_for_bit(stream: TokenStream, tmp_path: Path) -> None:
    assert run_in_processes(2, lambda: resumed(stream, 5, tmp_path)) == [(True, True)] * 2


def test_random_numbers_differ_by_seed_rank_step_and_micro_batch() -> None:
    places = [(seed, rank, step, batch) for seed in (0, 1) for rank in (0, 1) for step in (0, 1, 2) for batch in (0, 1)]

    def draw(place: tuple[int, int, int, int]) -> float:
        seed_step(*place)
        return torch.rand(()).item()

    assert len({draw(place) for place in places}) == len(places)
    assert draw(places[3]) == draw(places[3])


class Line(nn.Module):
    """A model whose loss is worked out by hand: three weights, and gradients that may pass through fp16."""

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25, 1.0]))
        self.upstream = 1.0
        if half:
            self.weight.register_hook(lambda gradient: gradient.half().float())

    def forward(self, inputs: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        return ((inputs @ self.weight - 1) ** 2).sum() + extra, torch.tensor(len(inputs))


def line_reader(bad: dict[int, dict[str, float]], reads: list[int]) -> Reader:
    """Return four rows a step in two micro-batches; ``bad`` steps have a number that is added to inputs or loss."""

    def read(step: int) -> Step:
        reads.append(step)
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        added = {"inputs": 0.0, "loss": 0.0, **bad.get(step, {})}
        batches = [{"inputs": part, "extra": torch.tensor(0.0)} for part in inputs.split(2)]
        batches[1] = {"inputs": batches[1]["inputs"] + added["inputs"], "extra": torch.tensor(added["loss"])}
        return Step(batches, targets=4, tokens=12, names=f"rows {step * 4} …")

    return read


def line_loop(module: Line, max_steps: int, *, scaler: Any = None, bad: Any = None, allowed: int = 0) -> Loop:
    """Return a loop whose ``hooks`` note each step's loss in ``loop.losses`` and its reads in ``loop.reads``."""
    accelerator = Accelerator(cpu=True)
    if scaler is not None:  # what Accelerate makes for fp16, which it refuses without a GPU
        accelerator.scaler = scaler
        accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
    settings = OptimConfig(learning_rate=0.05, schedule="constant", warmup_steps=0)
    optimizer = accelerator.prepare_optimizer(build_optimizer(module, settings))
    reads: list[int] = []
    losses: list[float] = []
    hooks = Hooks(advance=lambda step, loss: losses.append(loss))
    rhythm = Rhythm(max_steps, max_skipped_steps=allowed)
    read, schedule = line_reader(bad or {}, reads), build_schedule(settings, max_steps)
    loop: Any = Loop(accelerator, module, optimizer, read, schedule, rhythm, Progressed(), hooks)
    loop.reads, loop.losses = reads, losses
    return loop


BAD = [{"inputs": math.nan}, {"inputs": math.inf}, {"loss": math.nan}, {"loss": math.inf}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_step_that_is_not_finite_is_not_applied_and_named(bad: dict[str, float]) -> None:
    good = Line()
    line_loop(good, 2).run()
    module = Line()
    loop = line_loop(module, 5, bad={2: bad})
    with pytest.raises(Diverged, match=r"^step 3: loss (nan|inf) .*\(rows 8 …\); the update was not applied"):
        loop.run()
    assert torch.equal(module.weight, good.weight)
    assert loop.progress.step == 2 and loop.progress.tokens == 24


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_so_many_steps_may_be_skipped_and_no_more(bad: dict[str, float]) -> None:
    module = Line()
    loop: Any = line_loop(module, 6, bad={1: bad, 3: bad}, allowed=2)
    loop.run()
    assert (loop.progress.step, loop.progress.skipped, loop.reads) == (6, 2, [0, 1, 2, 3, 4, 5])
    assert torch.isfinite(module.weight).all()
    with pytest.raises(Diverged, match=r"^step 4: "):
        line_loop(Line(), 6, bad={1: bad, 3: bad}, allowed=1).run()


def test_overflowing_step_is_retried_with_the_same_data_until_its_scale_fits() -> None:
    plain: Any = line_loop(Line(), 6)
    plain.run()
    module, scaler = Line(half=True), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    loop: Any = line_loop(module, 6, scaler=scaler)
    loop.run()
    retries = loop.reads.count(0) - 1
    assert retries >= 3 and loop.reads == sorted(loop.reads) and set(loop.reads) == set(range(6))
    assert scaler.get_scale() == 2.0 ** (20 + 6 - len(loop.reads))  # halved at each retry
    assert loop.progress.step == 6 and loop.progress.tokens == 72 and loop.progress.skipped == 0
    assert loop.losses == pytest.approx(plain.losses, rel=1e-3)  # fp16 keeps 11 bits


@pytest.mark.parametrize("init_scale", [4.0, 2.0**60])
def test_overflow_at_every_scale_is_divergence(init_scale: float) -> None:
    """A scale below 1, or twenty-one skips in a row."""
    module = Line()
    module.weight.register_hook(lambda gradient: gradient * math.inf)
    before = module.weight.detach().clone()
    loop: Any = line_loop(module, 6, scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))
    with pytest.raises(Diverged, match=r"^step 1: gradients overflow fp16 at every loss scale"):
        loop.run()
    assert loop.reads == [0] * (3 if init_scale == 4.0 else hfkit.loop.MAX_SCALER_SKIPS + 1)
    assert torch.equal(module.weight, before)


def test_loss_scale_goes_on_where_it_was() -> None:
    """The scaler's state survives a manifest's JSON, the count of good steps before it grows again included."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=4)

    whole, whole_scaler = Line(half=True), scaler()
    line_loop(whole, 9, scaler=whole_scaler).run()
    module, first, second = Line(half=True), scaler(), scaler()
    loop: Any = line_loop(module, 9, scaler=first)
    loop.hooks.should_stop = lambda: loop.progress.step == 4
    with pytest.raises(Preempted):
        loop.run()
    assert first.state_dict()["_growth_tracker"] > 0
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest: Any = line_loop(module, 9, scaler=second)
    rest.optimizer.optimizer.load_state_dict(loop.optimizer.optimizer.state_dict())
    rest.progress = loop.progress
    rest.run()
    assert second.state_dict() == whole_scaler.state_dict()
    assert torch.equal(module.weight, whole.weight)


def test_gradient_norm_is_that_before_clipping() -> None:
    module = Line()
    loop: Any = line_loop(module, 1)
    step = loop.read(0)
    inputs = torch.cat([batch["inputs"] for batch in step.micro_batches])
    expected = (2 / 4 * inputs.T @ (inputs @ module.weight - 1)).norm().item()
    settings = {"number": 0, "seed": 0, "max_grad_norm": 1e-3, "parameters": [module.weight]}
    _, norm, _ = train_step(loop.accelerator, module, loop.optimizer, step, **settings).tolist()
    assert norm == pytest.approx(expected, rel=1e-6)
