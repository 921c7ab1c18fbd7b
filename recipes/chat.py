"""Talk to a model in the terminal.

    python recipes/chat.py --model.path runs/sft/model
    python recipes/chat.py --model.path runs/sft/model --message "What colour is grass?"
    echo '{"message": "What colour is grass?"}' | python recipes/chat.py --model.path runs/sft/model --json

Ctrl-C stops an answer, Ctrl-D or /quit leaves, /help lists the commands. Over a pipe every line is a message or a
command and every answer goes to standard output; what is said about them goes to standard error.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hfkit.config import fail, parse_config
from hfkit.settings import SEEDS, BadInput, GenerationSettings, ModelConfig, check_bounds

HELP = """\
/reset            forget the conversation but the system message
/system TEXT      set the system message (without TEXT: remove it)
/save [FILE]      write the conversation
/load [FILE]      go on with a saved conversation
/params [a=b …]   show or change how answers are drawn: temperature=0.5 top_k=40
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class ChatConfig:
    """Talk to a model in the terminal."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """`model.path`: a folder or Hub id."""
    message: str | None = None
    """Answer this one message, print the answer and leave."""
    system: str | None = None
    """System message."""
    json: bool = False
    """Read lines {"message": …} and write lines {"reply": …, "tokens": …, "finish": …, "hidden": …}; with message,
    write the one line of its answer."""
    history_file: Path | None = None
    """The conversation (.jsonl): gone on with at the start, written after every answer."""
    generation: GenerationSettings = field(default_factory=lambda: GenerationSettings(max_new_tokens=256))
    """How answers are drawn."""
    output_dir: Path = Path("runs/chat")
    """Where /save and /load find conversation.jsonl when they name no file."""
    seed: int = 0
    """Decides what is sampled."""

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise BadInput("which model? Give --model.path a folder or a Hub id")
        check_bounds("", self, seed=SEEDS)
        if self.generation.num_samples > 1:
            raise BadInput("generation.num_samples: a message has one answer here; leave it out")


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(ChatConfig)

from transformers.utils.logging import disable_progress_bar

from hfkit.chat import ChatFormat, set_template
from hfkit.data.readers import decode
from hfkit.dialogue import Dialogue, Reply, check_file
from hfkit.model import load_causal_lm
from hfkit.replies import end_turns_at
from hfkit.tokenizer import load_tokenizer


def main(config: ChatConfig) -> None:
    """Load the model and answer until there is nothing more to read."""
    disable_progress_bar()  # of a model that loads in a moment
    if config.history_file is not None:
        check_file(config.history_file, "history_file")
    tokenizer = load_tokenizer(str(config.model.path), config.model.revision)
    set_template(tokenizer)
    chat = ChatFormat(tokenizer)
    model = load_causal_lm(config.model)
    if chat.marked:
        end_turns_at(model, chat.end_id)
    dialogue = Dialogue(model, chat, config.generation, config.seed)
    if config.history_file is not None and config.history_file.exists():
        dialogue.load(config.history_file)
    if config.system is not None:
        dialogue.set_system(config.system)
    if config.json and config.message is not None:
        print_reply(dialogue, config.message, config)
    elif config.json:
        answer_json(dialogue, config)
    elif config.message is not None:
        answer(dialogue, config.message, config)
    else:
        talk(dialogue, config)


def talk(dialogue: Dialogue, config: ChatConfig) -> None:
    """Answer the lines of a person or a pipe."""
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (line editing and the arrow keys in input())

        say(f"{config.model.path}, window {dialogue.window} tokens; /help lists the commands")
    while True:
        try:
            line = (input("you> ") if person else read_line()).strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                command(dialogue, line, config)
            elif line:
                answer(dialogue, line, config)
        except EOFError:
            return
        except (BadInput, UnicodeDecodeError) as problem:
            say(str(problem))
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D leaves")


def read_line() -> str:
    """Return the next line of a pipe; like ``input``, raise EOFError at its end."""
    if not (line := sys.stdin.buffer.readline()):
        raise EOFError
    return decode(line)


def answer(dialogue: Dialogue, text: str, config: ChatConfig) -> None:
    """Print the answer as it is made, and say what the reader should know about it."""
    begin = time.perf_counter()
    reply = dialogue.reply(text, show)
    keep(dialogue, config)  # before anything is said of it: who has read the answer may close the terminal
    print(flush=True)
    remarks = []
    if reply.hidden:
        remarks.append(f"the oldest {reply.hidden} messages are out of the model's window")
    if reply.completion.finish == "length":
        remarks.append("cut at max_new_tokens or the window's end")
    if reply.completion.finish == "interrupted":
        remarks.append("stopped")
    if not reply.completion.text.strip():
        remarks.append("no answer; the message is not kept")
    if sys.stdin.isatty():
        remarks.append(f"{reply.completion.tokens / (time.perf_counter() - begin):.0f} tokens/s")
    if remarks:
        say(f"({'; '.join(remarks)})")


def show(piece: str) -> None:
    """Print a piece of an answer at once; a model's control characters must not steer a person's terminal."""
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", piece) if sys.stdout.isatty() else piece, end="", flush=True)


def answer_json(dialogue: Dialogue, config: ChatConfig) -> None:
    """Answer a line of JSON with a line of JSON; a bad line with its error."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            print_reply(dialogue, message_of(line), config)
        except BadInput as problem:
            print(json.dumps({"error": f"line {number}: {problem}"}, ensure_ascii=False), flush=True)


def print_reply(dialogue: Dialogue, message: str, config: ChatConfig) -> None:
    """Print the answer to a message as a line of JSON."""
    reply = dialogue.reply(message, lambda piece: None)
    keep(dialogue, config)
    print(json.dumps(as_json(reply), ensure_ascii=False), flush=True)


def message_of(line: bytes) -> str:
    """Return the message in a line of JSON."""
    text = decode(line)
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        message = None
    if not isinstance(message, str):
        raise BadInput('must be {"message": "…"}')
    return message


def as_json(reply: Reply) -> dict[str, object]:
    """Return what the JSON mode says of a reply."""
    completion = reply.completion
    return {
        "reply": completion.text,
        "tokens": completion.tokens,
        "finish": completion.finish,
        "hidden": reply.hidden,
    }


def command(dialogue: Dialogue, line: str, config: ChatConfig) -> None:
    """Do what a line that begins with a slash asks for."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    path = Path(rest) if rest else config.output_dir / "conversation.jsonl"
    if name == "/help":
        say(HELP)
    elif name == "/reset":
        dialogue.reset()
        say("forgotten")
    elif name == "/system":
        dialogue.set_system(rest)
        say("system message set" if rest else "system message removed")
    elif name == "/save":
        dialogue.save(path)
        say(f"{len(dialogue.messages)} messages saved in {path}")
    elif name == "/load":
        dialogue.load(path)
        say(f"{len(dialogue.messages)} messages loaded from {path}")
    elif name == "/params":
        dialogue.change_settings(rest.split())
        say(" ".join(f"{k}={v}" for k, v in asdict(dialogue.settings).items() if k != "num_samples"))
    else:
        raise BadInput(f"there is no command {name}; /help lists them")


def keep(dialogue: Dialogue, config: ChatConfig) -> None:
    """Write the conversation to the history file, if there is one."""
    if config.history_file is not None:
        dialogue.save(config.history_file)


def say(text: str) -> None:
    """Tell the person, apart from the answers."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(config)
    except BadInput as problem:
        fail(str(problem))
