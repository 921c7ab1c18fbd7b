"""The configuration: sources and their order, one-line errors, YAML written and read back, and no heavy imports."""

import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfkit.config import config_dict, parse_config, replace_settings, save_config, to_yaml
from hfkit.settings import (
    AdapterConfig,
    BadInput,
    DataConfig,
    GenerationSettings,
    HubConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    check_bounds,
)

ROOT = Path(__file__).parent.parent


@dataclass
class Recipe:
    """Train something."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which text."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=5e-4))
    """Which optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where figures go."""
    output_dir: Path = Path("runs/test")
    """Where results go."""
    resume: str = "auto"
    """What to continue."""
    seed: int = 0
    """Seed of the run."""
    plan: bool = False
    """Print what would happen, and train nothing."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadInput(f"seed must be at least 0, not {self.seed}")


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the error that the words cause, having checked that it is one line, on stderr, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(Recipe, list(args))
    output, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    return errors.removeprefix("error: ").rstrip("\n")


def test_without_words_the_defaults_hold() -> None:
    assert parse_config(Recipe, []) == Recipe()
    assert parse_config(Recipe, []).optim.learning_rate == 5e-4, "the recipe's own default, not the section's"


def test_yaml_wins_over_defaults_and_flags_win_over_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {max_steps: 7, log_every: 3}\nseed: 4\n")
    words = ["--seed", "5", "--train.max_steps=9"]
    expected = Recipe(train=TrainConfig(max_steps=9, log_every=3), seed=5)
    assert parse_config(Recipe, ["--config", path, *words]) == expected
    assert parse_config(Recipe, [*words, f"--config={path}"]) == expected, "wherever --config stands"


def test_of_two_files_the_later_one_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\ntrain: {log_every: 2, max_steps: 3}\n")
    second.write_text("seed: 2\ntrain: {max_steps: 4}\n")
    config = parse_config(Recipe, ["--config", str(first), "--config", str(second)])
    assert (config.seed, config.train.log_every, config.train.max_steps) == (2, 2, 4)


def test_values_become_what_their_fields_say(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "optim: {learning_rate: 3e-4, epsilon: 1e-3}\n"
        "model: {config_overrides: {rope_theta: 1e4, num_hidden_layers: 2}, path: a, revision: 2024-01-01}\n"
        "data:\n  text_column: no\n  cache_dir: /tmp/cache\n"
        "  sources:\n  - {path: [a.txt, b.txt], weight: 2}\n  - {dataset: some/set}\n",
    )
    config = parse_config(Recipe, ["--config", path])
    assert (config.optim.learning_rate, config.optim.epsilon) == (3e-4, 1e-3)
    assert config.model.config_overrides == {"rope_theta": 10000.0, "num_hidden_layers": 2}
    assert config.model.revision == "2024-01-01", "a date is text"
    assert config.data.text_column == "no", "`no` is a word"
    assert config.data.cache_dir == Path("/tmp/cache")
    assert config.data.sources == [SourceConfig(path=["a.txt", "b.txt"], weight=2.0), SourceConfig(dataset="some/set")]


def test_a_mixture_is_data_of_ones_own() -> None:
    assert DataConfig().is_builtin
    assert not DataConfig(sources=[SourceConfig(path="a.txt")]).is_builtin


def test_flags_take_json_lists_and_bare_switches() -> None:
    words = "--plan --train.compile --tracking.to tensorboard --data.train_files a.txt b.txt --data.cache_dir x".split()
    config = parse_config(Recipe, [*words, "--model.config_overrides", '{"a": {"b": 1e-3}}'])
    assert config.plan is True
    assert config.train.compile is True
    assert config.tracking.to == ["tensorboard"]
    assert config.data.train_files == ["a.txt", "b.txt"]
    assert config.data.cache_dir == Path("x")
    assert config.model.config_overrides == {"a": {"b": 1e-3}}
    assert parse_config(Recipe, ["--plan", "false"]).plan is False
    assert parse_config(Recipe, ["--train.compile", "null"]).train.compile is None
    assert parse_config(Recipe, ["--data.train_files", '["a", "b"]']).data.train_files == ["a", "b"]
    assert parse_config(Recipe, ["--model.config_overrides.layers", "2"]).model.config_overrides == {"layers": 2}
    assert parse_config(Recipe, ["--model.path", "1e3"]).model.path == "1e3"


def test_flags_set_entries_of_mappings_one_by_one(tmp_path: Path) -> None:
    """Of any name, dots included, each beside what a file or another flag says."""
    path = write(tmp_path, "model: {config_overrides: {a.b: 1, kept: [2]}}\n")
    words = "--model.config_overrides.a.b 1e-3 --model.config_overrides.a.c x 2 no".split()
    config = parse_config(Recipe, [*words, "--model.config_overrides.d={e: null}", "--config", path])
    assert config.model.config_overrides == {"a.b": 1e-3, "kept": [2], "a.c": ["x", 2, "no"], "d": {"e": None}}


def test_settings_are_replaced_and_checked() -> None:
    base = Recipe(data=DataConfig(sources=[SourceConfig(path="a.txt"), SourceConfig(path="b.txt")]), seed=3)
    changed = replace_settings(base, {"optim.learning_rate": 1e-2, "model.config_overrides.a": 4}, where="grid")
    expected = Recipe(data=base.data, seed=3, optim=OptimConfig(learning_rate=1e-2))
    expected.model.config_overrides = {"a": 4}
    assert changed == expected and base.optim.learning_rate == 5e-4 and base.model.config_overrides == {}
    mistakes = {"optim.lr": 1, "seed.x": 1, "optim.name": "sgd", "seed": -1, "train.max_steps": 1.5}
    words = ["no setting optim.lr", "no setting seed.x", "adamw or muon, not 'sgd'", "at least 0", "a whole number"]
    for (key, value), said in zip(mistakes.items(), words, strict=True):
        with pytest.raises(BadInput, match=said):
            replace_settings(base, {key: value}, where="grid")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.max_stepz 3", "there is no setting --train.max_stepz; did you mean `--train.max_steps`?"),
        ("--max_steps 3", "there is no setting --max_steps; did you mean `--train.max_steps`?"),
        ("--xyzzy 3", "there is no setting --xyzzy; --help lists them all"),
        ("--data x", "there is no setting --data; --help lists them all"),
        ("--train.max_steps many", "--train.max_steps takes a whole number or null, not 'many'"),
        ("--seed 1.5", "--seed takes a whole number, not '1.5'"),
        ("--train.precision fp33", "--train.precision takes auto or fp32 or bf16 or fp16 or fp8, not 'fp33'"),
        ("--plan maybe", "--plan takes true or false, not 'maybe'"),
        ("--train.max_steps", "--train.max_steps needs a value: a whole number or null"),
        ("--seed 1 2", "--seed takes one value, a whole number, not 2: 1 2"),
        ("stray", "'stray' belongs to no flag: settings are given as --section.field value"),
        ("--config", "--config needs one YAML file (give it again for more)"),
        ("--config /nowhere.yaml", "/nowhere.yaml cannot be read: No such file or directory"),
        ("--config /", "/ cannot be read: Is a directory"),
        ("--train.max_steps 3 --train.epochs 1", "give train.max_steps or train.epochs, not both"),
        ("--seed -1", "seed must be at least 0, not -1"),
        ('--data.sources [{"path":"a","weight":-1}]', "data.sources: weight must be above 0, not -1.0"),
    ],
)
def test_a_bad_flag_is_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert error_of(capsys, *words.split()) == message


INFINITE, NO_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("section", "wrong", "bound"),
    [
        (OptimConfig, {"learning_rate": NO_NUMBER}, "be above 0 and finite, not nan"),
        (OptimConfig, {"muon_learning_rate": -0.02}, "be above 0, not -0.02"),
        (OptimConfig, {"min_learning_rate_share": -1}, r"lie in \[0, 1\], not -1"),
        (OptimConfig, {"min_learning_rate_share": 2}, r"lie in \[0, 1\], not 2"),
        (OptimConfig, {"decay_share": -1}, r"lie in \[0, 1\], not -1"),
        (OptimConfig, {"weight_decay": -1}, "be at least 0, not -1"),
        (OptimConfig, {"beta1": 1.5}, r"lie in \[0, 1\), not 1.5"),
        (OptimConfig, {"beta2": 1.0}, r"lie in \[0, 1\), not 1.0"),
        (OptimConfig, {"epsilon": 0.0}, "be above 0, not 0.0"),
        (OptimConfig, {"max_grad_norm": -1}, "be at least 0, not -1"),
        (TrainConfig, {"epochs": INFINITE}, "be above 0 and finite, not inf"),
        (TrainConfig, {"eval_every": -1}, "be at least 0, not -1"),
        (TrainConfig, {"save_every": -1}, "be at least 0, not -1"),
        (TrainConfig, {"sample_every": -1}, "be at least 0, not -1"),
        (TrainConfig, {"max_skipped_steps": -1}, "be at least 0, not -1"),
        (TokenizerConfig, {"sample_bytes": -5}, "be at least 1, not -5"),
        (ModelConfig, {"dropout": 1.5}, r"lie in \[0, 1\), not 1.5"),
        (ModelConfig, {"dropout": -0.5}, r"lie in \[0, 1\), not -0.5"),
        (AdapterConfig, {"dropout": 1.5}, r"lie in \[0, 1\), not 1.5"),
        (GenerationSettings, {"temperature": NO_NUMBER}, "be at least 0 and finite, not nan"),
        (RunConfig, {"seed": 2**70}, r"lie in \[0, 4294967296\)"),
    ],
)
def test_numbers_out_of_their_bounds_are_refused(section: type, wrong: dict[str, float], bound: str) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=rf"^([a-z]+\.)?{name} must {bound}"):
        section(**wrong)


def test_bounds_that_belong_to_the_interval_are_accepted() -> None:
    TrainConfig(epochs=0.1, eval_every=0, keep_checkpoints=2)
    OptimConfig(beta1=0.0, max_grad_norm=0.0, min_learning_rate_share=1.0, decay_share=0.0, warmup_steps=None)
    with pytest.raises(BadInput, match=r"share must lie in \(0, 1\], not 0"):
        check_bounds("", DataConfig(validation_share=0), validation_share="(0, 1]")


@pytest.mark.parametrize(
    ("section", "given", "needed"),
    [
        (DataConfig, {"revision": "v1"}, "dataset"),
        (DataConfig, {"dataset_config": "en"}, "dataset"),
        (DataConfig, {"split": "all"}, "dataset"),
        (DataConfig, {"validation_split": "dev", "sources": [SourceConfig(path="a.txt")]}, "dataset"),
        (SourceConfig, {"revision": "v1", "path": "a.txt"}, "dataset"),
        (ModelConfig, {"revision": "v1"}, "path"),
        (TokenizerConfig, {"revision": "v1"}, "path"),
        (AdapterConfig, {"alpha": 16.0}, "rank"),
        (AdapterConfig, {"dropout": 0.1}, "rank"),
        (AdapterConfig, {"target_modules": ["q_proj"]}, "rank"),
        (HubConfig, {"required": True}, "repo_id"),
        (HubConfig, {"push_every": 100}, "repo_id"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(section: type, given: dict[str, Any], needed: str) -> None:
    name = next(iter(given))
    with pytest.raises(BadInput, match=rf"{name} .* does nothing without {needed}: give both or neither$"):
        section(**given)


def test_a_warm_up_over_the_run_is_refused_before_any_work() -> None:
    with pytest.raises(BadInput, match=r"optim\.warmup_steps 9 is over the run's 4 steps"):
        RunConfig(optim=OptimConfig(warmup_steps=9), train=TrainConfig(max_steps=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {max_stepz: 3}", ": there is no setting train.max_stepz; did you mean `train.max_steps`?"),
        ("learning_rate: 3", ": there is no setting learning_rate; did you mean `optim.learning_rate`?"),
        ("data: {sources: [{path: a, wight: 1}]}", ": there is no setting data.sources.wight; did you mean "),
        ("data: {sources: [{path: a, weight: b}]}", ": data.sources.weight takes a number, not 'b'"),
        ("data: {sources: [a]}", ": data.sources takes a mapping with keys among path, dataset,"),
        ("optim: {learning_rate: fast}", ": optim.learning_rate takes a number, not 'fast'"),
        ("model: {config_overrides: 3}", ": model.config_overrides takes a mapping (JSON on the command line), not"),
        ("train: 5", ": train takes a mapping with keys among max_steps,"),
        ("train: null", ": train takes a mapping with keys among max_steps,"),
        ("- 1", " must hold `key: value` lines, not list"),
        ("seed: 1\ntrain: [", ":2: not YAML: expected the node content, but found '<stream end>'"),
        ("seed: 1\n  train: 2", ":2: not YAML: mapping values are not allowed here"),
        ("seed: 1\ntrain: {max_steps: 3}\nseed: 2", ":3: not YAML: the key 'seed' stands here a second time"),
        ("? [seed]\n: 1", ":1: not YAML: found unhashable key"),
        ("seed: \x00", ": not YAML: unacceptable character"),
    ],
)
def test_a_bad_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert error_of(capsys, "--config", path).startswith(path + message)


def test_a_file_that_is_not_utf_8_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("resume: fünf".encode("latin-1"))
    assert error_of(capsys, "--config", str(path)) == f"{path} is not UTF-8 text: byte 9"


def test_a_file_of_comments_changes_nothing(tmp_path: Path) -> None:
    assert parse_config(Recipe, ["--config", write(tmp_path, "# nothing yet\n")]) == Recipe()


def test_help_shows_field_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(Recipe, ["--train.max_steps", "3", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "Optimizer steps of the run; excludes epochs. 1000 where neither is given." in text
    assert "--optim.learning_rate LEARNING_RATE Peak learning rate. (type: float, default: 0.0005)" in text
    assert "--train_files+" not in text
    assert "--data CONFIG" not in text


def test_print_config_prints_what_parse_config_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(Recipe, ["--train.max_steps", "3", "--print_config"])
    assert stopped.value.code == 0
    path = write(tmp_path, capsys.readouterr().out)
    assert parse_config(Recipe, ["--config", path]) == Recipe(train=TrainConfig(max_steps=3))


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    words = ["no", "1e-3", "null", "2024-01-01", "012", "1_000", "~", ".5", "=", "", "true", "a\nb", "\x85x", "é: ü #"]
    config = Recipe(
        data=DataConfig(text_column="no", sources=[SourceConfig(path=words, weight=3.0)], cache_dir=Path("a b")),
        model=ModelConfig(config_overrides={**dict.fromkeys(words, words), "n": 1, "x": 1e-5, "y": None}, path="1e-3"),
        optim=OptimConfig(learning_rate=1e-7),
        tracking=TrackingConfig(to=["tensorboard"]),
        resume="2024-01-01",
    )
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(Recipe, ["--config", str(tmp_path / "config.yaml")]) == config


def test_configuration_as_plain_data() -> None:
    plain_config = config_dict(Recipe())
    assert plain_config["output_dir"] == "runs/test"
    # Whoever reads config.yaml with another library's YAML 1.1 gets the same values.
    assert yaml.safe_load(to_yaml(Recipe(output_dir=Path("no")))) == {**plain_config, "output_dir": "no"}


@pytest.mark.parametrize("words", ["--help", "--train.max_stepz 3", "--train.max_steps many", "--seed 3"])
def test_answers_come_without_heavy_imports(words: str) -> None:
    code = (
        "import sys\n"
        "from hfkit.config import parse_config\n"
        "from hfkit.settings import TrainConfig\n"
        "from dataclasses import dataclass, field\n"
        "@dataclass\n"
        "class Recipe:\n"
        "    train: TrainConfig = field(default_factory=TrainConfig)\n"
        "    seed: int = 0\n"
        "try:\n"
        "    parse_config(Recipe)\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'pandas', 'pyarrow'}\n"
        "    print('heavy imports:', sorted(heavy & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=ROOT, capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.stdout.endswith("heavy imports: []\n"), done.stderr
    print(f"{words}: {seconds:.2f} s of CPU time")


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as ended:
        parse_config(Recipe, [])
    assert (ended.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
