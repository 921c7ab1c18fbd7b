"""What a user can give wrongly: each is one line on stderr that says what was given and what to do, exit status 2.

Nothing is half-written: the output folder holds at most its lock and the status.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from runs import Ended, Server, Words, shared_server, tiny_run, write_corpus


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A run that would work."""
    folder = tmp_path_factory.mktemp("good")
    return tiny_run(write_corpus(folder / "corpus.jsonl"), folder / "cache", train__max_steps=4)


@pytest.fixture(scope="module")
def finished(server: Server, settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run."""
    ended = server.run("pretrain", settings, tmp_path_factory.mktemp("finished") / "run")
    assert ended.code == 0, ended.stderr
    return ended.output_dir


def assert_refused(ended: Ended, *words: str) -> None:
    """Fail unless a run ended with status 2 and one line that holds the words, and wrote nothing else."""
    assert ended.code == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.endswith(" elapsed")]  # progress of real work
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in ended.stderr and not ended.stdout


def assert_nothing_written(output_dir: Path) -> None:
    """Fail if an output folder holds more than its lock and a status that says what was wrong."""
    left = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    assert left <= {"status.json", ".lock"}
    if "status.json" in left:
        status = json.loads((output_dir / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("bad_input", 2) and status["message"]


@dataclass(frozen=True)
class Case:
    """One mistake: what differs from settings that work, and what the line must say."""

    name: str
    change: Words
    words: tuple[str, ...]
    files: Callable[[Path], object] = field(default=lambda folder: None)
    """Writes into the folder that `{}` in a setting stands for."""


def write_invalid(folder: Path) -> None:
    """Write a text whose third line is Latin-1."""
    (folder / "latin.txt").write_bytes("fine\nalso fine\nna\xefve\n".encode("latin-1"))


CASES = [
    Case("missing file", {"data.train_files": "{}/no.txt"}, ("data.train_files", "no such file", "no.txt")),
    Case("glob without match", {"data.train_files": "{}/*.txt"}, ("data.train_files", "*.txt", "matches no file")),
    Case(
        "folder without text",
        {"data.train_files": "{}"},
        ("data.train_files", "holds no text", ".jsonl"),
        lambda folder: (folder / "image.png").write_bytes(b"x"),
    ),
    Case(
        "empty file",
        {"data.train_files": "{}/empty.txt"},
        ("empty.txt is empty",),
        lambda folder: (folder / "empty.txt").touch(),
    ),
    Case(
        "blank file",
        {"data.train_files": "{}/blank.txt"},
        ("blank.txt", "holds no text"),
        lambda folder: (folder / "blank.txt").write_text(" \n\n"),
    ),
    Case(
        "unknown format",
        {"data.train_files": "{}/notes.docx"},
        ("notes.docx", "no format that can be read", ".txt"),
        lambda folder: (folder / "notes.docx").write_bytes(b"PK"),
    ),
    Case(
        "wrong column",
        {"data.train_files": "{}/rows.jsonl"},
        ("rows.jsonl:1", "no column 'text'", "title, body", "--data.text_column"),
        lambda folder: (folder / "rows.jsonl").write_text('{"title": "a", "body": "b"}\n'),
    ),
    Case(
        "broken row",
        {"data.train_files": "{}/rows.jsonl"},
        ("rows.jsonl:2",),
        lambda folder: (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"\n'),
    ),
    Case(
        "invalid UTF-8",
        {"data.train_files": "{}/latin.txt"},
        ("latin.txt:3", "byte 3", "0xef", "UTF-8"),
        write_invalid,
    ),
    Case(
        "cut archive",
        {"data.train_files": "{}/cut.txt.gz"},
        ("cut.txt.gz", "cannot be read"),
        lambda folder: (folder / "cut.txt.gz").write_bytes(gzip.compress(b"some text\n" * 99)[:-20]),
    ),
    Case("small vocabulary", {"tokenizer.vocab_size": 261}, ("tokenizer.vocab_size 261", "256 bytes", "262")),
    Case("long sequences", {"data.sequence_length": 4096}, ("sequence_length 4096", "2048")),
    Case(
        "indivisible batch",
        {"train.global_batch_size": 6, "train.micro_batch_size": 4},
        ("train.global_batch_size 6", "train.micro_batch_size 4"),
    ),
    Case(
        "indivisible tokens",
        {"train.global_batch_tokens": 100},
        ("train.global_batch_tokens 100", "data.sequence_length 32"),
    ),
    Case("unknown preset", {"model.preset": "huge"}, ("model.preset 'huge'", "tiny, mini, small")),
    Case(
        "unknown override",
        {"model.config_overrides": {"hiden_size": 8}},
        ("model.config_overrides", "'hiden_size'", "did you mean 'hidden_size'"),
    ),
    Case(
        "impossible override",
        {"model.config_overrides": {"hidden_size": 30, "num_attention_heads": 4}},
        ("model.config_overrides: The hidden size (30)",),
    ),
    Case("fp16 on a CPU", {"train.precision": "fp16"}, ("train.precision fp16", "CUDA")),
    Case("fp8 on a CPU", {"train.precision": "fp8"}, ("train.precision fp8", "Hopper", "use bf16 or fp32")),
    Case("unknown flag", {"train.max_step": 4}, ("--train.max_step", "did you mean `--train.max_steps`")),
    Case("wrong type", {"train.max_steps": "many"}, ("train.max_steps", "a whole number", "many")),
    Case("no step", {"train.max_steps": None, "train.epochs": 1e-9}, ("train.epochs", "no step", "give more")),
    Case("steps and epochs", {"train.max_steps": 4, "train.epochs": 1}, ("train.max_steps", "train.epochs")),
    Case("warm-up over the run", {"optim.warmup_steps": 9}, ("optim.warmup_steps 9", "4")),
    Case(
        "stages longer than the run",
        {"train.batch_stages": [[2, 2], [2, 4]]},
        ("train.batch_stages take 4 steps", "only 4"),
    ),
    Case("stages without sizes", {"train.batch_stages": [[2]]}, ("train.batch_stages", "[steps, sequences]", "[2]")),
    Case("a mean of one", {"train.average_checkpoints": 1}, ("train.average_checkpoints 1 is no mean",)),
    Case(
        "a mean of nothing",
        {"train.average_checkpoints": 2, "train.save_every": 0},
        ("train.average_checkpoints 2 needs train.save_every above 0",),
    ),
    Case("negative mean", {"train.average_checkpoints": -1}, ("train.average_checkpoints -1",)),
    Case("negative z-loss", {"optim.z_loss": -1e-4}, ("optim.z_loss", "at least 0", "-0.0001")),
    Case(
        "cache that cannot be made",
        {"data.cache_dir": "{}/file/cache"},
        ("/file/cache", "cannot be written", "--data.cache_dir"),
        lambda folder: (folder / "file").touch(),
    ),
    Case("no checkpoint to resume", {"resume": "{}/nowhere"}, ("resume: there is no folder ", "path of a checkpoint")),
    Case("no tokenizer", {"tokenizer.path": "{}"}, ("{}", "tokenizer")),
    Case("no model", {"model.path": "{}", "tokenizer.path": "{}"}, ("{}",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_is_one_line_and_status_2(server: Server, settings: Words, tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    case.files(folder)

    def fill(value: object) -> object:
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    change = {key: fill(value) for key, value in case.change.items()}
    ended = server.run("pretrain", settings | change, tmp_path / "run")
    assert_refused(ended, *(str(fill(word)) for word in case.words))
    assert_nothing_written(tmp_path / "run")


def test_output_folder_that_cannot_be_made(server: Server, settings: Words, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(server.run("pretrain", settings, tmp_path / "file"), "output_dir", "file", "File exists")


def test_output_folder_of_another_run(server: Server, settings: Words, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    changed = settings | {"optim.learning_rate": 0.5, "seed": 7, "train.max_steps": 8}
    ended = server.run("pretrain", changed, finished)
    assert_refused(
        ended,
        "holds another run",
        "optim.learning_rate was 0.01, now 0.5",
        "seed was 0, now 7",
        "train.max_steps was 4, now 8",
        "--output_dir",
    )
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} <= {"status.json", ".lock"}
    assert before.keys() == after.keys()


def test_what_is_free_to_change_is_no_other_run(server: Server, settings: Words, finished: Path) -> None:
    free = settings | {"train.micro_batch_size": 4, "train.log_every": 1, "train.save_every": 2, "train.eval_every": 0}
    ended = server.run("pretrain", free, finished)
    assert ended.code == 0, ended.stderr
    ended = server.run("pretrain", settings | {"train.max_steps": 5, "resume_accept": ["max_steps"]}, finished)
    assert ended.code == 0, ended.stderr
    assert json.loads((finished / "result.json").read_text())["steps"] == 5


def test_damaged_checkpoint_named_by_resume(server: Server, settings: Words, finished: Path, tmp_path: Path) -> None:
    newest = max((finished / "checkpoints").glob("step-*"))
    copy = tmp_path / "step-00000004"
    copy.mkdir()
    for path in newest.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "optimizer.safetensors").write_bytes(b"")
    ended = server.run("pretrain", settings | {"resume": str(copy)}, tmp_path / "run")
    assert_refused(ended, "resume: ", "optimizer.safetensors is damaged")
    assert_nothing_written(tmp_path / "run")


def test_model_folder_without_tokenizer(server: Server, settings: Words, finished: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((finished / "model" / name).read_bytes())
    change = {"model.path": str(bare), "data.train_files": settings["data.train_files"]}
    given = {key: settings[key] for key in ("data.cache_dir", "data.sequence_length")}
    for recipe in ("pretrain", "score"):
        ended = server.run(recipe, change | given, tmp_path / recipe)
        assert_refused(ended, str(bare), "tokenizer")
        assert_nothing_written(tmp_path / recipe)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_model_folder_with_a_cut_file(server: Server, finished: Path, tmp_path: Path, name: str) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in (finished / "model").iterdir():
        (cut / path.name).write_bytes(path.read_bytes())
    content = (cut / name).read_bytes()
    (cut / name).write_bytes(content[: len(content) // 2])
    ended = server.run("generate", {"model.path": str(cut), "prompt": "a"}, tmp_path / "run")
    assert_refused(ended, str(cut))


def test_generation_without_model_or_prompt(server: Server, finished: Path, tmp_path: Path) -> None:
    assert_refused(server.run("generate", {"prompt": "a"}, tmp_path / "a"), "--model.path")
    empty = {"model.path": str(finished / "model"), "prompt": ""}
    assert_refused(server.run("generate", empty, tmp_path / "b"), "is empty; give")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "caf\udce9"}, ("prompt 1: character 4 is half a surrogate pair", "not UTF-8")),
        ({"prompt_file": "{}/latin.txt"}, ("latin.txt:3: byte 3 is not UTF-8",)),
        ({"prompt_file": "{}/rows.jsonl"}, ("rows.jsonl:1: no column 'prompt'; the columns are text.",)),
        ({"prompt": "a", "output_file": "{}/latin.txt/a.jsonl"}, ("output_file", "the folder cannot be made")),
        ({"prompt": "a", "output_file": "{}"}, ("output_file", "is a folder")),
    ],
)
def test_prompts_that_cannot_be_continued(
    server: Server, finished: Path, tmp_path: Path, change: Words, words: tuple[str, ...]
) -> None:
    write_invalid(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    given = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    ended = server.run("generate", {"model.path": str(finished / "model"), **given}, tmp_path / "run")
    assert_refused(ended, *words)
    assert "Set --" not in ended.stderr


def test_more_vocabulary_than_the_corpus_supports_continues_and_says_so(server: Server, tmp_path: Path) -> None:
    corpus = tmp_path / "small.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"number {number}"}) + "\n" for number in range(30)))
    given = {"data.train_files": str(corpus), "data.cache_dir": tmp_path / "cache", "tokenizer.vocab_size": 5000}
    ended = server.run("prepare", given, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    size = json.loads((tmp_path / "run" / "audit.json").read_text())["tokenizer"]["vocab_size"]
    assert 262 <= size < 400
    assert f"The corpus supports {size} tokens; tokenizer.vocab_size asked for 5000." in ended.stderr


GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
UNMARKED = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("assistant", "Hello"), ("user", "Hi")], ("starts with the assistant",)),
        ([("user", "Hi"), ("assistant", " ")], ("messages[1]: the assistant's content is empty",)),
        ([("user", ""), ("assistant", "Hello")], ("messages[0]: the user's content is empty",)),
        ([("user", "Hi"), ("robot", "Hello")], ("messages[1]: unknown role 'robot'", "system, user, assistant")),
        ([("user", "Hi")], ("the assistant says nothing",)),
    ],
)
def test_conversations_that_teach_nothing(
    server: Server, tmp_path: Path, messages: list[tuple[str, str]], words: tuple[str, ...]
) -> None:
    bad = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, bad)))
    settings = {"data.train_files": str(tmp_path / "chats.jsonl"), "train.max_steps": 1}
    ended = server.run("sft", settings, tmp_path / "run")
    assert_refused(ended, "chats.jsonl:2: ", *words)
    assert_nothing_written(tmp_path / "run")


def test_chat_templates_that_cannot_teach(server: Server, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "plain.jinja").write_text(UNMARKED)
    data = {"data.train_files": str(tmp_path / "chats.jsonl"), "data.validation_share": 0, "tokenizer.vocab_size": 300}
    ended = server.run("sft", data | {"data.chat_template": str(tmp_path / "plain.jinja")}, tmp_path / "a")
    assert_refused(ended, "does not mark what the assistant says", "{% generation %}", "--data.chat_template")
    assert_nothing_written(tmp_path / "a")

    words = Tokenizer(models.WordLevel({"Hi": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(tmp_path / "tokenizer")
    ended = server.run("sft", data | {"tokenizer.path": str(tmp_path / "tokenizer")}, tmp_path / "b")
    assert_refused(ended, "no chat template, nor our chat tokens", "--data.chat_template")
    assert_nothing_written(tmp_path / "b")
