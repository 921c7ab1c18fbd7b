"""The ways out of `docs/serving.md`, each run as it is written there, against plain transformers' own answers.

They need optional libraries (extras `serve` and `export`), and KerasHub an environment of its own, whose Python
`HFKIT_TF_PYTHON` names; what is not installed is skipped.
"""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfkit.chat import ChatFormat
from hfkit.generation import complete
from hfkit.model import generation_config
from hfkit.replies import answer_by_default, end_turns_at
from hfkit.settings import GenerationSettings, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from runs import wait_for

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/serving.md").read_text("utf-8")
QUESTION = "What colour is grass?"
pytestmark = pytest.mark.slow


def example(heading: str, model: Path, output: Path) -> str:
    """Return the Python code of a section of the guide, about another model and output folder."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    assert '"runs/sft/model"' in code
    return code.replace("runs/sft/model", str(model)).replace("runs/onnx", str(output))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with weights wide enough that the most probable token is far ahead of the second."""
    path = tmp_path_factory.mktemp("serving") / "model"
    tokenizer = train_tokenizer([QUESTION, "Grass is green."], TokenizerConfig(vocab_size=280))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.generation_config = generation_config(len(tokenizer), tokenizer)
    end_turns_at(model, ChatFormat(tokenizer).end_id)
    answer_by_default(model, GenerationSettings())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of `transformers serve` on the model."""
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, "the server ended"
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(healthy, "the server's first answer")
        yield f"{address}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_an_openai_client_gets_the_answer_of_hfkit(folder: Path, server: str) -> None:
    from openai import OpenAI

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    settings = GenerationSettings(max_new_tokens=24, temperature=0)
    expected = complete(model, tokenizer, [ChatFormat(tokenizer).prompt(messages)], settings, 0)[0]
    client = OpenAI(base_url=server, api_key="none")
    asked = {"model": str(folder), "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    unfinished = "\N{REPLACEMENT CHARACTER}"  # bytes of a character that was never completed; the server drops them
    text = expected.text.rstrip(unfinished)
    assert whole.choices[0].message.content.rstrip(unfinished) == text and text
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces).rstrip(unfinished) == text and len(pieces) > 2
    hot = [client.chat.completions.create(**asked | {"temperature": 2, "seed": seed}) for seed in (1, 2)]
    assert hot[0].choices[0].message.content != hot[1].choices[0].message.content


def test_onnx_gives_the_logits_for_other_shapes_too(folder: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    names: dict = {}
    exec(example("ONNX", folder, tmp_path / "onnx"), names)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for shape in ((1, 5), (3, 40)):
        ids = torch.randint(6, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(shape, dtype=np.int64)}
        found = names["session"].run(["logits"], feed)[0]
        np.testing.assert_allclose(found, model(ids).logits.detach().numpy(), atol=1e-4)


@pytest.mark.skipif("HFKIT_TF_PYTHON" not in os.environ, reason="no environment with KerasHub is named")
def test_keras_on_tensorflow_gives_the_logits_and_the_greedy_answer(folder: Path, tmp_path: Path) -> None:
    report = "import json; print(json.dumps([ids.tolist(), np.array(logits).tolist(), np.array(answer).tolist()]))"
    code = "\n".join([example("KerasHub on TensorFlow", folder, tmp_path), report])
    done = subprocess.run([os.environ["HFKIT_TF_PYTHON"], "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids, logits, answer = (np.array(value) for value in json.loads(done.stdout.splitlines()[-1]))
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(folder)(QUESTION)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = torch.from_numpy(ids)
    np.testing.assert_allclose(logits, model(given).logits.detach().numpy(), atol=1e-4)
    greedy = model.generate(given, do_sample=False, max_new_tokens=answer.shape[1] - ids.shape[1])[0].tolist()
    assert answer[0, : len(greedy)].tolist() == greedy
