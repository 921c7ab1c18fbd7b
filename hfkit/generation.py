"""Generation: prompts in, continuations out, with plain ``generate`` underneath."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hfkit.settings import BadInput, GenerationSettings


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: GenerationSettings,
    seed: int,
) -> list[str]:
    """Return each prompt's continuation, without the prompt.

    Args:
        settings: How to sample.
        seed: Decides what is sampled; the global random numbers are left as they were.

    Raises:
        BadInput: for an empty prompt, from which a model has nothing to go on.
    """
    if any(not prompt for prompt in prompts):
        raise BadInput("prompt is empty; give the model a few words to go on from")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=decoding(model, settings),
            use_cache=True,
        )
    model.train(training)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def decoding(model: PreTrainedModel, settings: GenerationSettings) -> GenerationConfig:
    """Return the model's own generation settings with ours on top."""
    config = GenerationConfig(**model.generation_config.to_dict())
    config.max_new_tokens = settings.max_new_tokens
    config.do_sample = settings.temperature > 0
    if config.do_sample:
        config.temperature, config.top_p, config.top_k = settings.temperature, settings.top_p, settings.top_k or None
    return config
