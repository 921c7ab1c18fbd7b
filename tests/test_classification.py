"""Classification: heads on many bodies, exact weighted gradients, scores that batches and processes leave alone."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfkit.classification import (
    ClassificationLoss,
    build_classifier,
    compute_class_weights,
    load_classifier_tokenizer,
)
from hfkit.data.batches import Plan, Split
from hfkit.data.label_batches import Encoded, classification_rows, encode_rows
from hfkit.loop import train_step
from hfkit.optim import build_optimizer
from hfkit.prediction import predict, score_labels
from hfkit.settings import AdapterConfig, BadInput, ClassifierConfig, OptimConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from processes import run_in_processes

NAMES = ["bad", "fair", "good"]
TEXTS = [f"{word} {' and '.join(['word'] * number)}" for number in range(1, 12) for word in ("one",)]  # 11 lengths
LABELS = [0, 1, 2, 2, 2, 0, 1, 2, 2, 2, 2]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
SHAPE = {**SMALL, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_classifier(ClassifierConfig(config_overrides=SHAPE), tokenizer, NAMES, seed=3)


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerBase) -> Encoded:
    return encode_rows(tokenizer, TEXTS, length=8, how="windows")


def step_gradient(
    model: PreTrainedModel, encoded: Encoded, weights: np.ndarray, micro: int, world: int
) -> tuple[float, torch.Tensor]:
    """Return mean loss and gradient of one step of 6 rows, summed over ranks and micro-batches."""
    module = ClassificationLoss(model, label_smoothing=0.2).train()
    module.zero_grad()
    total = 0.0
    for rank in range(world):
        plan = Plan(2, Split(6, micro, rank, world), None)
        step = classification_rows(encoded, LABELS, weights, plan, seed=1, pad=1)(1)
        for batch in step.micro_batches:
            loss, _ = module(**batch)
            (loss / step.targets).backward()
            total += loss.item() / step.targets
    return total, torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def test_gradients_do_not_depend_on_the_split(model: PreTrainedModel, encoded: Encoded) -> None:
    weights = compute_class_weights(ClassifierConfig(class_weights="balanced"), LABELS, NAMES)
    loss, gradient = step_gradient(model, encoded, weights, micro=6, world=1)
    for micro, world in ((1, 1), (2, 1), (4, 1), (3, 2), (1, 2), (2, 3)):  # 4 leaves slots of the last pass empty
        other_loss, other = step_gradient(model, encoded, weights, micro, world)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)


def train_two_steps(micro: int, tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> tuple[int, list[list[float]]]:
    """Return the processes that share the work, and [gradient norm, loss] and the weights after two steps."""
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    config = ClassifierConfig(config_overrides=SHAPE, class_weights="balanced", label_smoothing=0.2)
    module = ClassificationLoss(build_classifier(config, tokenizer, NAMES, seed=3), config.label_smoothing)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module, optimizer = accelerator.prepare(module, optimizer)
    weights = compute_class_weights(config, LABELS, NAMES)
    read = classification_rows(encoded, LABELS, weights, Plan(2, Split(8, micro, rank, world), 14), seed=1, pad=1)
    parameters = list(module.parameters())
    vectors = [
        train_step(accelerator, module, optimizer, read(n), number=n, seed=0, max_grad_norm=0.3, parameters=parameters)
        for n in range(2)
    ]
    figures = [[(vector[0] / read(n).targets).item(), vector[1].item()] for n, vector in enumerate(vectors)]
    wrapped = isinstance(module, torch.nn.parallel.DistributedDataParallel)
    after = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return world if wrapped else 1, [*figures, after.tolist()]


def test_real_processes_take_the_steps_of_one(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> None:
    _, expected = train_two_steps(8, tokenizer, encoded)  # the second step has 6 rows of 8
    for micro, world in ((3, 1), (4, 2), (1, 2)):
        runs = run_in_processes(world, lambda micro=micro: train_two_steps(micro, tokenizer, encoded))
        for size, found in runs:
            assert size == world
            for mine, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_loss_is_torchs_weighted_mean(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = encode_rows(tokenizer, TEXTS, length=64, how="head")
    weights = np.array([3.0, 1.0, 0.5])
    step = classification_rows(whole, LABELS, weights, Plan(1, Split(11, 11), None), seed=0, pad=1)(0)
    batch = step.micro_batches[0]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss, count = ClassificationLoss(model).eval()(**batch)
    judged = torch.nn.functional.cross_entropy(logits, batch["targets"], weight=torch.tensor(weights).float())
    assert count.item() == step.targets == sum(weights[LABELS])
    assert (loss / step.targets).item() == pytest.approx(judged.item(), abs=1e-6)
    smooth, _ = ClassificationLoss(model, label_smoothing=0.1).train()(**batch | {"weights": torch.ones(11)})
    judged = torch.nn.functional.cross_entropy(logits, batch["targets"], label_smoothing=0.1, reduction="sum")
    assert smooth.item() == pytest.approx(judged.item(), abs=1e-5)


def test_windows_of_a_text_weigh_as_much_as_one_text(encoded: Encoded) -> None:
    plan = Plan(1, Split(len(encoded.rows), 64), None)
    step = classification_rows(encoded, LABELS, np.ones(3), plan, seed=0, pad=1)(0)
    assert len(encoded.rows) > len(TEXTS)
    assert step.targets == pytest.approx(len(TEXTS))


def test_scores_and_figures_do_not_depend_on_batches_or_processes(model: PreTrainedModel, encoded: Encoded) -> None:
    reference = predict(Accelerator(cpu=True), model, encoded, batch_size=1)
    figures = score_labels(reference, LABELS, NAMES)
    assert reference.shape == (11, 3)  # 11 texts: no multiple of 2, 3 or 8
    np.testing.assert_allclose(reference.sum(1), 1, atol=1e-12)
    for world in (1, 2):
        for size in (1, 3, 8):
            for scores in run_in_processes(world, lambda n=size: predict(Accelerator(cpu=True), model, encoded, n)):
                np.testing.assert_allclose(scores, reference, atol=1e-6)
                found = score_labels(scores, LABELS, NAMES)
                for name, value in figures.items():
                    exact = name in ("per_class", "confusion_matrix")  # nested, and counts
                    assert found[name] == (value if exact else pytest.approx(value, abs=1e-6)), (world, size, name)


def test_windows_are_averaged_and_padding_is_not_read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Encoded
) -> None:
    scores = predict(Accelerator(cpu=True), model, encoded, batch_size=64)
    ids = tokenizer(TEXTS[-1])["input_ids"]
    windows = [ids[start : start + 8] for start in range(0, len(ids), 8)]
    with torch.no_grad():
        alone = [model.eval()(torch.tensor([window])).logits.softmax(-1)[0] for window in windows]
    np.testing.assert_allclose(scores[-1], torch.stack(alone).mean(0).numpy(), atol=1e-6)


def test_class_weights() -> None:
    assert compute_class_weights(ClassifierConfig(), LABELS, NAMES).tolist() == [1, 1, 1]
    balanced = compute_class_weights(ClassifierConfig(class_weights="balanced"), LABELS, NAMES)
    assert balanced == pytest.approx([11 / 3 / 2, 11 / 3 / 2, 11 / 3 / 7])  # scikit-learn's definition
    given = ClassifierConfig(class_weights={"good": 1.0, "bad": 2.0, "fair": 3.0})
    assert compute_class_weights(given, LABELS, NAMES).tolist() == [2, 3, 1]
    with pytest.raises(BadInput, match=r"must name every class of \['bad', 'fair', 'good'\]; it names \['good'\]"):
        compute_class_weights(ClassifierConfig(class_weights={"good": 1.0}), LABELS, NAMES)


def test_class_weights_may_name_numbers() -> None:
    given = ClassifierConfig(class_weights={0: 1.0, 1: 3.0})  # type: ignore[dict-item]  # as YAML reads them
    assert compute_class_weights(given, [0, 1], ["0", "1"]).tolist() == [1, 3]


def test_special_tokens_in_a_text_are_its_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "one<|pad|> and<|endoftext|>"
    (row,) = encode_rows(tokenizer, [text], length=99, how="head").rows
    assert not set(row) & set(tokenizer.all_special_ids) and tokenizer.decode(row) == text


def test_head_has_its_own_learning_rate(model: PreTrainedModel) -> None:
    module = ClassificationLoss(model, head_learning_rate=0.5)
    for name in ("adamw", "muon"):
        groups = build_optimizer(
            module, OptimConfig(name=name, learning_rate=0.01, muon_learning_rate=0.02)
        ).param_groups
        own = [parameter for group in groups if group["peak"] == 0.5 for parameter in group["params"]]
        assert [id(parameter) for parameter in own] == [id(model.score.weight)]
        assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


BODIES = {
    "llama": {**SHAPE},
    "qwen3": {**SHAPE, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "modernbert": {**SMALL, "cls_token_id": 0, "sep_token_id": 0},
}


def save_body(model_type: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> ClassifierConfig:
    """Save a small language model of the type, as pretraining leaves it; return the settings that go on from it."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **BODIES[model_type]}
    shape = AutoConfig.for_model(model_type, **sizes, **ids)
    encoder = "bert" in model_type
    torch.manual_seed(1)
    (AutoModelForMaskedLM if encoder else AutoModelForCausalLM).from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ClassifierConfig(path=str(folder), head_learning_rate=0.5)


@pytest.mark.parametrize("model_type", BODIES)
def test_every_body_gets_a_head_that_padding_leaves_alone(
    model_type: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = save_body(model_type, tokenizer, tmp_path)
    own = load_classifier_tokenizer(str(tmp_path))
    model = build_classifier(config, own, NAMES)
    assert own.padding_side == "right" and own.pad_token_id != own.eos_token_id
    assert model.config.pad_token_id == own.pad_token_id
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: number for number, name in enumerate(NAMES)}
    scores = predict(Accelerator(cpu=True), model, encode_rows(own, TEXTS, 64, "head"), batch_size=11)
    with torch.no_grad():
        alone = [model.eval()(torch.tensor([own(text)["input_ids"]])).logits.softmax(-1)[0] for text in TEXTS]
    np.testing.assert_allclose(scores, torch.stack(alone).numpy(), atol=1e-6)
    assert np.ptp(scores, axis=0).max() > 1e-4  # the texts do not all look alike
    module = ClassificationLoss(model, head_learning_rate=0.5)
    fast = {id(p) for group in build_optimizer(module, OptimConfig()).param_groups if group["peak"] == 0.5
            for p in group["params"]}  # fmt: skip
    head = {name for name, parameter in model.named_parameters() if id(parameter) in fast}
    assert head and not any(name.startswith(model.base_model_prefix) for name in head)
    groups = build_optimizer(ClassificationLoss(model), OptimConfig(name="muon")).param_groups
    muon = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    assert muon and id(getattr(model, "score", getattr(model, "classifier", None)).weight) not in muon


def test_encoders_get_a_head_and_must_bring_their_body(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, **SMALL}
    body = BertForMaskedLM(BertConfig(**sizes))
    body.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ClassifierConfig(path=str(tmp_path))
    model = build_classifier(config, load_classifier_tokenizer(config.path, pad_token=config.pad_token), NAMES)
    layer = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.get_parameter(layer), body.get_parameter(layer))
    assert model.config.id2label == dict(enumerate(NAMES)) and model.classifier.weight.shape == (3, 32)
    state = {name: value for name, value in body.state_dict().items() if name != layer}
    body.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(BadInput, match=f"lacks weights: {layer}"):
        build_classifier(config, tokenizer, NAMES)


def test_a_causal_model_without_pad_token_is_told_what_to_do(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=270))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config = ClassifierConfig(path=str(tmp_path))
    with pytest.raises(BadInput, match=r"has no pad token of its own.*--model.pad_token"):
        load_classifier_tokenizer(config.path, pad_token=config.pad_token)
    config = replace(config, pad_token="<|fill|>")
    own = load_classifier_tokenizer(config.path, pad_token=config.pad_token)
    model = build_classifier(config, own, NAMES)
    assert model.config.pad_token_id == own.pad_token_id == len(own) - 1 == model.config.vocab_size - 1


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_low_rank_updates_train_little_and_are_added_to_the_saved_model(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, quantize: Literal["none", "int8"]
) -> None:
    if quantize == "int8":
        pytest.importorskip("torchao")
    config, adapter = ClassifierConfig(config_overrides=SHAPE), AdapterConfig(rank=2, quantize=quantize)
    model = build_classifier(config, tokenizer, NAMES, adapter=adapter)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained) and any("score" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = predict(Accelerator(cpu=True), model, encoded, batch_size=8)
    merged = ClassificationLoss(model).finished_model()
    assert type(merged).__name__ == "LlamaForSequenceClassification"
    after = predict(Accelerator(cpu=True), merged, encoded, batch_size=8)
    np.testing.assert_allclose(after, before, atol=1e-6)
