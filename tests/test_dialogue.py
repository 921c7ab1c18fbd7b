"""Talking to a model: what it sees of a long conversation, the commands, and the terminal, driven through a pty."""

import fcntl
import importlib
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkit.chat import ChatFormat
from hfkit.dialogue import Dialogue
from hfkit.model import generation_config
from hfkit.settings import BadInput, GenerationSettings, ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
TEXT = "the quick brown fox jumps over the lazy dog "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself, since its weights are random."""
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=300))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = generation_config(320, tokenizer)
    model.generation_config.suppress_tokens += list(range(6))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def dialogue(folder: Path) -> Dialogue:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = Dialogue(
        AutoModelForCausalLM.from_pretrained(folder),
        ChatFormat(AutoTokenizer.from_pretrained(folder)),
        GenerationSettings(max_new_tokens=10),
        seed=0,
    )
    made.window = 100
    return made


def test_the_oldest_turns_leave_the_window_and_stay_in_the_messages(dialogue: Dialogue, tmp_path: Path) -> None:
    dialogue.set_system("be brief")
    hidden = [dialogue.reply(f"{number} the quick brown fox", lambda piece: None).hidden for number in range(8)]
    assert hidden[0] == 0 and hidden[-1] >= 4 and hidden == sorted(hidden) and all(n % 2 == 0 for n in hidden)
    assert len(dialogue.messages) == 17
    prompt, out = dialogue._fit(dialogue.messages[:-1])
    seen = dialogue.chat.tokenizer.decode(prompt)
    assert len(prompt) <= 90 and seen.startswith("<|system|>be brief<|end|><|user|>") and "7 the quick" in seen
    again = dialogue.chat.prompt([dialogue.messages[0], *dialogue.messages[1 + out - 2 : -1]])
    assert len(again) > 90  # one turn more would not have fitted
    dialogue.save(tmp_path / "a.jsonl")
    before = list(dialogue.messages)
    dialogue.reset()
    assert dialogue.messages == before[:1]
    dialogue.load(tmp_path / "a.jsonl")
    assert dialogue.messages == before


def test_a_message_that_cannot_be_answered_is_not_kept(dialogue: Dialogue) -> None:
    with pytest.raises(BadInput, match="room for 90"):
        dialogue.reply("0123456789" * 20, lambda piece: None)
    with pytest.raises(BadInput, match="empty"):
        dialogue.reply(" \n", lambda piece: None)
    assert dialogue.messages == []


def test_an_interrupted_answer_is_kept_as_far_as_it_went(dialogue: Dialogue) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    completion = dialogue.reply("fox", write).completion
    assert completion.finish == "interrupted" and completion.tokens < 10
    assert dialogue.messages[-1] == {"role": "assistant", "content": completion.text}


def test_settings_change_by_name_or_not_at_all(dialogue: Dialogue) -> None:
    dialogue.change_settings(["temperature=0", "top_k=5", "stop=x|y"])
    assert (dialogue.settings.temperature, dialogue.settings.top_k, dialogue.settings.stop) == (0.0, 5, ["x", "y"])
    for words in (["top_q=1"], ["top_k=1", "temperature=-1"], ["top_k=a"]):
        with pytest.raises(BadInput):
            dialogue.change_settings(words)
    assert dialogue.settings.top_k == 5


@pytest.mark.parametrize("text", ['{"messages": [{"role": "bot", "content": "a"}]}', '{"a": 1}', "no json"])
def test_files_without_a_conversation_are_refused_and_change_nothing(dialogue: Dialogue, tmp_path, text) -> None:  # type: ignore[no-untyped-def]
    dialogue.set_system("keep me")
    (tmp_path / "a.jsonl").write_text(text + "\n")
    for name in ("a.jsonl", "missing.jsonl"):
        with pytest.raises(BadInput):
            dialogue.load(tmp_path / name)
    assert dialogue.messages == [{"role": "system", "content": "keep me"}]


def run_chat(folder: Path, *words: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/chat.py", "--model.path", str(folder), "--generation.max_new_tokens", "5"]
    return subprocess.run([*command, *words], cwd=ROOT, input=text, capture_output=True, text=True)


def test_json_lines_answer_every_line(folder: Path, tmp_path: Path) -> None:
    lines = '{"message": "fox"}\n{"text": 1}\n\n{"message": "dog"}\n'
    done = run_chat(folder, "--json", "true", "--history_file", str(tmp_path / "h.jsonl"), text=lines)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [sorted(row) for row in rows] == [
        ["finish", "hidden", "reply", "tokens"],
        ["error"],
        ["error"],
        sorted(rows[0]),
    ]
    assert rows[1]["error"].startswith("line 2: ") and rows[0]["tokens"] == 5
    assert len(json.loads((tmp_path / "h.jsonl").read_text())["messages"]) == 4


def answers(  # type: ignore[no-untyped-def]
    folder: Path, capsys, monkeypatch: pytest.MonkeyPatch, piped: bytes = b"", **changed: Any
) -> tuple[str, str]:
    """Return what the recipe says on standard output and on standard error."""
    recipe: Any = importlib.import_module("chat")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    settings = GenerationSettings(max_new_tokens=3)
    recipe.main(recipe.ChatConfig(model=ModelConfig(path=str(folder)), generation=settings, **changed))
    return capsys.readouterr()


def test_bytes_that_are_no_text_leave_the_service_running(folder: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    lines = b'{"message": "\\ud83d"}\n{"message": "caf\xe9"}\n{"message": "fox"}\n'
    said, _ = answers(folder, capsys, monkeypatch, lines, json=True)
    rows = [json.loads(line) for line in said.splitlines()]
    assert rows[0]["error"].startswith("line 1: the message: character 1 is half a surrogate pair")
    assert rows[1]["error"].startswith("line 2: byte 17 is not UTF-8")
    assert rows[2]["tokens"] == 3
    said, told = answers(folder, capsys, monkeypatch, b"caf\xe9\nfox\n")
    assert "byte 4 is not UTF-8" in told and said.endswith("\n")


def test_one_message_has_one_line_of_json(folder: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert json.loads(answers(folder, capsys, monkeypatch, message="fox", json=True)[0])["tokens"] == 3


def test_files_that_cannot_be_written_are_told_and_the_talk_goes_on(  # type: ignore[no-untyped-def]
    folder: Path, capsys, monkeypatch, tmp_path: Path
) -> None:
    piped = b"/save /dev/null/x.jsonl\n/save notes.txt\nfox\n"
    said, told = answers(folder, capsys, monkeypatch, piped, history_file=tmp_path / "new" / "h.jsonl")
    assert "save /dev/null/x.jsonl: the folder cannot be made: " in told
    assert "save notes.txt: a conversation is a row of JSON; let the name end in .jsonl" in told
    assert said.endswith("\n") and (tmp_path / "new" / "h.jsonl").exists()
    with pytest.raises(BadInput, match=r"history_file h.txt: .* end in .jsonl"):
        answers(folder, capsys, monkeypatch, history_file=Path("h.txt"))


def test_more_than_one_answer_is_refused(folder: Path) -> None:
    recipe: Any = importlib.import_module("chat")
    with pytest.raises(BadInput, match=r"generation.num_samples: a message has one answer"):
        recipe.ChatConfig(model=ModelConfig(path=str(folder)), generation=GenerationSettings(num_samples=2))


def test_one_message_prints_its_answer_alone(folder: Path) -> None:
    done = run_chat(folder, "--message", "fox", "--generation.temperature", "0")
    assert done.returncode == 0 and done.stdout.count("\n") >= 1 and "fox" not in done.stdout


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(command[0], command)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Read until the pattern has come since the last wait; return what came."""
        end = time.time() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.time() < end, f"no {pattern!r} in {self.seen[-500:]!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        seen, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return seen

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until its answer comes: a signal just before readline waits is noticed at the next one only."""
        while True:
            self.send(key)
            try:
                self.wait_for(pattern, seconds=2)
                return
            except AssertionError:
                continue


def test_a_terminal_session_with_interrupt_resize_overflow_and_reset(folder: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    words = f"--model.path {folder} --generation.max_new_tokens 2000 --history_file {history}".split()
    terminal = Terminal([sys.executable, "recipes/chat.py", *words])
    terminal.wait_for("you> ")
    terminal.send("fox\r")
    terminal.wait_for(r"(?s)fox.*?\n.{20,}")  # the answer has begun
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 30, 0, 0))
    terminal.send("\x03")
    terminal.wait_for(r"\(stopped; .* tokens/s\)")
    terminal.wait_for("you> ")
    terminal.press_until("\x03", "/quit or Ctrl-D leaves")  # at the prompt: the program stays
    terminal.send("/params max_new_tokens=5\r")
    terminal.wait_for("max_new_tokens=5")
    for _ in range(3):
        terminal.send(TEXT[:22] * 40 + "\r")
        terminal.wait_for(r"tokens/s\)")
    kept = json.loads(history.read_text())["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant"] * 4 and kept[0]["content"] == "fox"
    terminal.send(f"/save {tmp_path / 'saved.jsonl'}\r")
    terminal.wait_for("8 messages saved")
    terminal.send("/reset\r")
    terminal.wait_for("forgotten")
    terminal.send("/nonsense\r")
    terminal.wait_for("there is no command /nonsense")
    terminal.send(f"/load {tmp_path / 'saved.jsonl'}\r")
    terminal.wait_for("8 messages loaded")
    assert json.loads((tmp_path / "saved.jsonl").read_text())["messages"] == kept
    terminal.send("\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
