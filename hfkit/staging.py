"""What of a run leaves the machine: the files of `model/`, a card and a passport made for the public.

With `hub.include_samples` the samples go with them, with `hub.include_checkpoints` the training state; no pickles, no
scripts, no logs. Files are linked into a folder first, so that what is sent stays as it was while training goes on.
"""

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hfkit.card import render_model_card
from hfkit.files import read_json, write_atomic, write_json
from hfkit.hub import STATE_FOLDER
from hfkit.passport import public_passport
from hfkit.remote import HubError
from hfkit.settings import PublishConfig

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (*WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
SAMPLE_FILES = ("samples.jsonl", "predictions.jsonl")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # learned from data, not written by a run


def stage_model(into: Path, model_dir: Path, checkpoint: Path | None = None) -> None:
    """Link the files of a model that may be published; with ``checkpoint``, its weights in place of the model's."""
    link_files(model_dir, into, MODEL_FILES)
    for folder in [path for path in model_dir.iterdir() if path.is_dir()]:  # a second tokenizer
        link_files(folder, into / folder.name, MODEL_FILES)
    if checkpoint is not None:
        for path in [path for path in into.iterdir() if matches(path.name, WEIGHTS)]:
            path.unlink()
        link_files(checkpoint, into, ("model.safetensors",))


def stage_branch(into: Path, model_dir: Path, checkpoint: Path, config: PublishConfig) -> None:
    """Link what the branch of a step holds."""
    stage_model(into, model_dir, checkpoint)
    if config.include_checkpoints:
        link_files(checkpoint, into / STATE_FOLDER)


def stage_final(into: Path, model_dir: Path, output_dir: Path, config: PublishConfig) -> None:
    """Link what `main` holds in the end."""
    stage_model(into, model_dir)
    if config.include_samples:
        link_files(output_dir, into, SAMPLE_FILES)


def link_files(source: Path, into: Path, patterns: tuple[str, ...] = ("*",)) -> None:
    """Put hard links to the files of a folder into another: no copy, and later changes of the folder do not matter.

    Files are replaced, never rewritten, everywhere in hfkit, so a link keeps its content.
    """
    into.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and matches(path.name, patterns):
            try:
                os.link(path.resolve(), into / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, into / path.name)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a file name has one of these forms."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def complete(folder: Path, output_dir: Path, config: PublishConfig, step: int | None) -> None:
    """Write the card and the public passport into a staged folder, and take this machine's paths out of the rest.

    Raises:
        HubError: if a file would still give away the token or a path.
    """
    for path in folder.glob("*config.json"):
        if (content := read_json(path)) is not None and (shown := without_paths(content)) != content:
            write_json(path, shown)  # a new file: the original, linked to, stays as it is
    if passport := read_json(output_dir / "passport.json"):
        write_json(folder / "passport.json", public_passport(passport))
    card = folder / "README.md"
    if (output_dir / "config.yaml").exists() or not card.exists():
        said = {"license": config.license, "language": config.language}
        write_atomic(card, render_model_card(output_dir, folder, config.repo_id, step, said))
    check_private(folder, output_dir)


def without_paths(value: Any) -> Any:
    """Return a JSON value with each path on this machine cut to its last part.

    Example:
        >>> without_paths({"_name_or_path": "/home/ada/gpt2", "base": "openai-community/gpt2"})
        {'_name_or_path': 'gpt2', 'base': 'openai-community/gpt2'}
    """
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def check_private(folder: Path, output_dir: Path) -> None:
    """Raise HubError if a text file holds the Hub token, the home folder or the run's folder."""
    places = {str(place) for place in (Path.home(), output_dir.resolve(), Path.cwd()) if len(place.parts) > 1}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".safetensors", ".parquet"):
            continue
        content = path.read_bytes()
        if (token := get_token()) and token.encode() in content:
            raise HubError(f"{path.name} holds the Hub token; nothing was sent")
        if path.name not in VOCABULARIES and any(place.encode() + b"/" in content for place in places):
            raise HubError(f"{path.name} holds a path of this machine; nothing was sent")
