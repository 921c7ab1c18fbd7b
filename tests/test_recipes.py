"""Recipes as users run them: as scripts, under the launcher, again after they ended, with their results elsewhere."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfkit.files import digest
from runs import ROOT, Ended, Server, Words, command_line, shared_server, tiny_run, write_corpus

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
HEAVY = "torch transformers datasets accelerate tokenizers numpy pyarrow"


@pytest.fixture(scope="module")
def server() -> Server:
    """The process that forks runs."""
    return shared_server()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A run of a second, with a dozen documents held out."""
    folder = tmp_path_factory.mktemp("recipes")
    return tiny_run(write_corpus(folder / "corpus.jsonl", documents=120), folder / "cache", train__save_every=4)


@pytest.fixture(scope="module")
def script(settings: Words, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What ``python recipes/pretrain.py`` leaves."""
    return run_script([sys.executable], "pretrain", settings, tmp_path_factory.mktemp("script") / "run")


def run_script(interpreter: list[str], recipe: str, settings: Words, output_dir: Path) -> Ended:
    """Run a recipe as a script of its own."""
    words = [*interpreter, f"recipes/{recipe}.py", *command_line({**settings, "output_dir": output_dir})]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr, output_dir)


def result_of(output_dir: Path) -> dict[str, Any]:
    """Return result.json."""
    return json.loads((output_dir / "result.json").read_text())


def test_a_run_leaves_what_it_promises(script: Ended) -> None:
    left = {path.name for path in script.output_dir.iterdir()}
    assert left >= {"config.yaml", "metrics.jsonl", "checkpoints", "model", "result.json", "report.html"}
    assert left >= {"passport.json", "audit.json", "samples.jsonl", "status.json"}
    model = {path.name for path in (script.output_dir / "model").iterdir()}
    assert model >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert model >= {"generation_config.json", "README.md"}
    assert not [path for path in script.output_dir.rglob(".*") if path.name != ".lock"]  # no temporary files
    status = script.status
    assert (status["state"], status["exit_code"], status["step"], status["push"]) == ("done", 0, 12, "none")
    report = (script.output_dir / "report.html").read_text()
    assert "<svg" in report and "<script src" not in report and "<link" not in report  # self-contained


def test_metrics_and_result_have_their_figures(script: Ended) -> None:
    lines = [json.loads(line) for line in (script.output_dir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert all(keys <= line.keys() for line in training)
    assert training[-1]["loss"] < training[0]["loss"]
    assert 11 * 4 * 32 < training[-1]["tokens"] <= 12 * 4 * 32  # the last row of an epoch is short
    result = result_of(script.output_dir)
    assert result.keys() >= {"parameters", "tokens", "steps", "seconds", "tokens_per_second", "train_loss"}
    assert result.keys() >= {"eval_loss", "perplexity", "bits_per_byte", "eval_tokens", "eval_bytes"}
    for name in ("eval_loss", "perplexity", "bits_per_byte"):
        assert result[name] == evaluations[-1][name]
    assert result["perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    nats = result["eval_loss"] * result["eval_tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["eval_bytes"])
    assert json.loads(script.stdout[script.stdout.index("{") : script.stdout.rindex("}") + 1]) == result


def test_checkpoints_have_manifests_that_hold(script: Ended) -> None:
    folders = sorted((script.output_dir / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000008", "step-00000012"]
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest.keys() >= {"step", "world_size", "data_key", "config_hash", "files"}
        assert manifest["step"] == int(folder.name[5:]) and manifest["world_size"] == 1
        assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
        for name, facts in manifest["files"].items():
            assert facts == {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}


def test_config_yaml_repeats_the_run(server: Server, script: Ended, tmp_path: Path) -> None:
    again = server.run("pretrain", {"config": script.output_dir / "config.yaml"}, tmp_path / "run")
    assert again.code == 0, again.stderr
    assert again.weights == script.weights and again.metrics == script.metrics


READ_MODEL = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
assert not any(name.startswith("hfkit") for name in sys.modules)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("Bake li moke", return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
torch.manual_seed(0)
text = pipeline("text-generation", model=folder)("Bake", max_new_tokens=200, do_sample=True, temperature=9.0)
made = model.generate(ids, max_new_tokens=300, do_sample=True, temperature=50.0)[0].tolist()
seen = {"logits": logits.tolist(), "ids": ids.tolist(), "text": text[0]["generated_text"], "made": made}
print(json.dumps({**seen, "sizes": [len(tokenizer), model.config.vocab_size]}))
"""


def test_the_model_loads_elsewhere_with_plain_transformers(script: Ended, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "elsewhere"
    shutil.copytree(script.output_dir / "model", folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    words = [sys.executable, "-I", "-c", READ_MODEL, str(folder)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["text"].startswith("Bake") and len(seen["text"]) > len("Bake")
    tokens, rows = seen["sizes"]
    assert tokens < rows and rows % 64 == 0  # the vocabulary is padded …
    assert max(seen["made"]) < tokens  # … and the padding never generated
    # The last checkpoint's weights, in a model built from the configuration alone, give the same logits.
    saved = load_file(script.output_dir / "checkpoints" / "step-00000012" / "model.safetensors")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    report = model.load_state_dict(saved, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lm_head.weight"], [])  # tied to the embedding
    with torch.no_grad():
        logits = model(torch.tensor(seen["ids"])).logits
    assert torch.equal(logits, torch.tensor(seen["logits"]))


def test_running_a_finished_run_again_prints_its_result(server: Server, settings: Words, tmp_path: Path) -> None:
    names = ("result.json", "metrics.jsonl", "samples.jsonl")
    first = server.run("pretrain", settings, tmp_path / "run")
    weights = first.weights
    kept = [(first.output_dir / name).read_bytes() for name in names]
    again = server.run("pretrain", settings, tmp_path / "run")
    assert again.code == 0 and again.status["state"] == "done"
    assert again.stdout == first.stdout and "Evaluation" not in again.stderr
    assert kept == [(again.output_dir / name).read_bytes() for name in names]

    config = (tmp_path / "run" / "config.yaml").read_text()
    asked = {"generation.temperature": 0.5, "train.log_every": 2, "hub.license": "mit"}
    later = server.run("pretrain", settings | asked, tmp_path / "run")
    note = "Note: the run was finished before, so these had no effect: train.log_every, generation.temperature."
    assert later.code == 0 and note in later.stderr and "Note" not in again.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == config  # it repeats the run
    assert "license: mit" in (tmp_path / "run" / "model" / "README.md").read_text()

    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    made = server.run("pretrain", settings, tmp_path / "run")
    assert made.code == 0, made.stderr
    assert made.weights == weights and made.metrics == first.metrics
    assert json.loads(kept[0]) | {"finished": ""} == result_of(tmp_path / "run") | {"finished": ""}


def test_the_mean_of_the_last_checkpoints_is_the_result_where_asked_for_and_better(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    def weights(folder: str) -> Any:
        return load_file(tmp_path / "run" / folder / "model.safetensors")["model.embed_tokens.weight"]

    rate = {"optim.schedule": "constant", "optim.learning_rate": 0.1, "train.keep_checkpoints": 3}
    shaky = settings | rate | {"train.save_every": 2}
    asked = shaky | {"train.average_checkpoints": 3}
    ended = server.run("pretrain", asked, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    averaged, last = result_of(tmp_path / "run"), ended.metrics[-1]["eval_loss"]
    assert averaged["averaged_steps"] == [8, 10, 12] and averaged["last_eval_loss"] == last
    assert averaged["eval_loss"] < last
    parts = [weights(f"checkpoints/step-{step:08d}") for step in (8, 10, 12)]
    assert weights("model").allclose(sum(parts) / 3, rtol=1e-5, atol=1e-7)

    unseen = asked | {"train.eval_every": 0}  # so that none is kept as the best
    stopped = server.run("pretrain", unseen, tmp_path / "again", before="test_recipes.stop_after_the_tenth_step")
    assert stopped.code == 75 and (stopped.output_dir / "checkpoints" / "step-00000011").is_dir(), stopped.stderr
    again = server.run("pretrain", unseen, tmp_path / "again")
    assert again.code == 0 and again.weights == ended.weights  # one checkpoint more is in no mean and drops none

    plain = server.run("pretrain", shaky, tmp_path / "run")  # asked for otherwise, a finished run changes its result
    assert plain.code == 0 and "averaged_steps" not in result_of(tmp_path / "run")
    assert result_of(tmp_path / "run")["eval_loss"] == last and weights("model").equal(parts[2])
    again = server.run("pretrain", asked, tmp_path / "run")
    assert again.code == 0 and result_of(tmp_path / "run")["eval_loss"] == averaged["eval_loss"]

    early = server.run("pretrain", settings | {"train.average_checkpoints": 2}, tmp_path / "early")  # still falling
    assert early.code == 0 and "averaged_steps" not in result_of(early.output_dir)
    assert "not better than the last state" in early.stderr
    assert result_of(early.output_dir)["eval_loss"] == early.metrics[-1]["eval_loss"]


def stop_after_the_tenth_step() -> None:
    """Ask for a stop where a signal could have; the step on its way is then the last."""
    from hfkit.launch import stopper
    from hfkit.recorder import Recorder

    advance = Recorder.advance

    def advance_and_stop(self: Recorder, step: int, loss: float) -> None:
        advance(self, step, loss)
        stopper.requested = step == 10

    Recorder.advance = advance_and_stop  # type: ignore[method-assign]


def test_a_result_of_other_settings_is_not_kept(server: Server, settings: Words, tmp_path: Path) -> None:
    first = server.run("pretrain", settings, tmp_path / "run")
    weights = first.weights
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # so nothing is left to compare the settings with
    other = server.run("pretrain", settings | {"seed": 1}, tmp_path / "run")
    assert other.code == 0, other.stderr
    assert other.weights != weights
    assert result_of(tmp_path / "run")["eval_loss"] == other.metrics[-1]["eval_loss"]


def test_a_model_that_exists_keeps_its_shape_and_the_run_says_so(
    server: Server, script: Ended, settings: Words, tmp_path: Path
) -> None:
    other = {"model.path": str(script.output_dir / "model"), "model.config_overrides": {"num_hidden_layers": 3}}
    ended = server.run("pretrain", settings | other, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert "model.config_overrides shape a new model, so they are not used" in ended.stdout + ended.stderr
    assert "model.preset tiny is not used" in ended.stderr
    assert result_of(tmp_path / "run")["parameters"] == result_of(script.output_dir)["parameters"]


def test_resume_never_moves_the_earlier_run_aside(server: Server, settings: Words, tmp_path: Path) -> None:
    first = server.run("pretrain", settings, tmp_path / "run")
    weights = first.weights
    (tmp_path / "run" / "previous-3").mkdir()  # the user threw the first two away
    for number, seed in ((4, 5), (5, 6)):
        fresh = server.run("pretrain", settings | {"resume": "never", "seed": seed}, tmp_path / "run")
        assert fresh.code == 0, fresh.stderr
        aside = tmp_path / "run" / f"previous-{number}"
        assert {"checkpoints", "model", "metrics.jsonl", "result.json", "config.yaml"} <= set(os.listdir(aside))
        assert [line["step"] for line in fresh.metrics if "loss" in line] == [3, 6, 9, 12]
    assert (tmp_path / "run" / "previous-4" / "model" / "model.safetensors").read_bytes() == weights
    assert fresh.weights != weights


def test_two_processes_give_the_losses_of_one(server: Server, settings: Words, tmp_path: Path) -> None:
    each_step = settings | {"train.log_every": 1}
    one = server.run("pretrain", each_step, tmp_path / "one")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", "accelerate_configs/cpu_2proc.yaml"]
    two = run_script(launcher, "pretrain", each_step, tmp_path / "two")
    manifest = json.loads((two.output_dir / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert two.status["state"] == "done"
    assert len(one.metrics) == len(two.metrics) == 12 + 3
    for mine, theirs in zip(one.metrics, two.metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
        assert mine.get("learning_rate") == theirs.get("learning_rate")
    assert result_of(two.output_dir)["eval_tokens"] == result_of(one.output_dir)["eval_tokens"]
    again = server.run("pretrain", each_step, two.output_dir)  # another number of processes is the same run
    assert again.code == 0 and "Resuming" in again.stderr
    assert again.metrics == two.metrics


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_score_repeats_the_runs_figure(
    server: Server, settings: Words, script: Ended, tmp_path: Path, batch_size: int
) -> None:
    data = {key: value for key, value in settings.items() if key.startswith("data.")}
    del data["data.sequence_length"]  # the model knows
    given = {"model.path": str(script.output_dir / "model"), "micro_batch_size": batch_size}
    scored = server.run("score", data | given, tmp_path / "run")
    assert scored.code == 0, scored.stderr
    result, trained = result_of(tmp_path / "run"), result_of(script.output_dir)
    for name in ("eval_loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(trained[name], rel=1e-4)
    assert (result["eval_tokens"], result["eval_bytes"]) == (trained["eval_tokens"], trained["eval_bytes"])
    assert json.loads(scored.stdout) == result


def test_generate_continues_a_prompt(server: Server, script: Ended, tmp_path: Path) -> None:
    given = {"model.path": str(script.output_dir / "model"), "prompt": "Bake li", "generation.max_new_tokens": 12}
    texts = [server.run("generate", given | {"seed": seed}, tmp_path / "run") for seed in (0, 0, 1)]
    assert all(ended.code == 0 and ended.stdout.startswith("Bake li") for ended in texts), texts[0].stderr
    assert len(texts[0].stdout) > len("Bake li\n")
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout


def test_pretraining_uses_what_was_prepared(server: Server, settings: Words, tmp_path: Path) -> None:
    fresh = settings | {"data.cache_dir": tmp_path / "cache"}
    shared = {key: value for key, value in fresh.items() if key.startswith(("data.", "tokenizer."))}
    prepared = server.run("prepare", shared, tmp_path / "prepared")
    assert prepared.code == 0, prepared.stderr
    audit = json.loads((tmp_path / "prepared" / "audit.json").read_text())
    assert audit["reused"] is False and (tmp_path / "prepared" / "audit.html").is_file()
    assert audit["documents"]["read"] == 120
    assert audit["documents"]["read"] == audit["documents"]["kept"] + sum(audit["removed"].values())
    assert audit["tokenizer"]["round_trip_failures"] == 0
    trained = server.run("pretrain", fresh, tmp_path / "run")
    assert trained.code == 0 and "tokenize" not in trained.stderr
    used = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert used["reused"] is True and used["key"] == audit["key"]
    again = server.run("prepare", shared, tmp_path / "prepared")
    assert json.loads((tmp_path / "prepared" / "audit.json").read_text())["reused"] is True and again.code == 0


LIGHT = f"""
import runpy, sys, time
for recipe in {RECIPES}:
    for words in (["--help"], ["--no_such.setting", "1"]):
        sys.argv = [f"recipes/{{recipe}}.py", *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            assert ended.code == (0 if words == ["--help"] else 2), (sys.argv, ended.code)
        else:
            raise AssertionError(f"{{sys.argv}} went on")
        heavy = {{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r}.split())
        assert not heavy, (sys.argv, heavy)
"""


def test_help_and_mistakes_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mistakes = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(mistakes) == len(RECIPES) and all("--no_such.setting" in line for line in mistakes)
    for recipe in RECIPES:
        assert f"{recipe}.py" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses(path: Path) -> None:
    recipe = path.parent.name
    words = [sys.executable, f"recipes/{recipe}.py", "--config", str(path), "--print_config"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert_contains(resolved, yaml.safe_load(path.read_text()))


def assert_contains(resolved: Any, given: Any) -> None:
    """Fail unless every value given in a file is in the resolved configuration."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert_contains(resolved[key], value)
    elif isinstance(given, list):
        for mine, value in zip(resolved, given, strict=True):
            assert_contains(mine, value)
    else:
        assert resolved == given


def test_a_mixture_without_held_out_text_is_scored_on_all_of_it(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    sources = [{"path": str(write_corpus(tmp_path / f"{seed}.jsonl", 40, seed)), "weight": seed} for seed in (1, 2)]
    mixed = {key: value for key, value in settings.items() if key != "data.train_files"}
    ended = server.run("pretrain", mixed | {"data.sources": sources, "data.validation_share": 0}, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    text = json.loads((tmp_path / "run" / "audit.json").read_text())["splits"]["train"]
    result = result_of(tmp_path / "run")
    assert (result["eval_bytes"], result["eval_tokens"]) == (text["bytes"], text["tokens"] - text["documents"])
    assert result["evaluated_on"] == "train" and "nothing is held out for validation" in ended.stderr
    assert "nothing was held out" in (tmp_path / "run" / "report.html").read_text()
    assert "Measured on the train split" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_model_with_fewer_positions_than_a_prompt_has_words_gives_its_samples(
    server: Server, settings: Words, tmp_path: Path
) -> None:
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    short = {"model.preset": "gpt2-tiny", "model.config_overrides": shape, "data.sequence_length": 16}
    ended = server.run("pretrain", settings | short, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "run" / "samples.jsonl").exists() and "evaluated_on" not in result_of(tmp_path / "run")
