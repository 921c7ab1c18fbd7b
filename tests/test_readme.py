"""Every command of the README runs, at toy size, in the order in which a reader would type them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TOY = (
    "--train.max_steps 2 --train.global_batch_size 4 --data.sequence_length 16 --tokenizer.vocab_size 270 "
    "--data.max_documents 40 --generation.max_new_tokens 4 --model.config_overrides.num_hidden_layers 1 "
    "--model.config_overrides.hidden_size 32 --model.config_overrides.intermediate_size 64"
).split()
SIZES = {
    "pretrain": TOY,
    "prepare": ["--tokenizer.vocab_size", "270"],
    "score": ["--data.sequence_length", "16"],
    "generate": ["--generation.max_new_tokens", "4"],
}


def commands() -> list[str]:
    """Return the lines of the README's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_make_targets_exist() -> None:
    named = {shlex.split(line)[1] for line in commands() if line.startswith("make ")}
    assert {"quickstart", "test"} <= named
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert named <= targets


def test_every_recipe_command_runs(tmp_path: Path) -> None:
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    sentence = "Once upon a time number {n} there was a {n}th small model that read word {n} by word and grew.\n\n"
    (tmp_path / "corpus.txt").write_text("".join(sentence.format(n=n) for n in range(60)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = [line for line in commands() if "recipes/" in line]
    assert len(ran) >= 6
    for line in ran:
        recipe = re.search(r"recipes/(\w+)\.py", line)
        assert recipe is not None, line
        words = [*shlex.split(line), *SIZES[recipe[1]]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
