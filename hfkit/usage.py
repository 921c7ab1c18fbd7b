"""How a model is used: what it is for, and the code that its card shows, which a test runs."""

import json
from typing import Any

SNIPPETS = {
    "text-generation": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50, do_sample=True, top_p=0.95)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    "chat": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
    "text-classification": """\
from transformers import pipeline

classify = pipeline("text-classification", model="{name}")
print(classify("A sentence to classify."))""",
    "translation": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{options})
writer = {writer}
model = AutoModelForSeq2SeqLM.from_pretrained("{name}")
output = model.generate(**tokenizer({text}, return_tensors="pt"))
print(writer.decode(output[0], skip_special_tokens=True))""",
    "prompted translation": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{options})
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer({text}, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
}
SENTENCE = "A sentence to translate."


def usage(name: str, kind: str, model: dict[str, Any]) -> str:
    """Return code that uses a model.

    Args:
        name: Where it is: a Hub id or a folder.
        kind: What `find_task` returns, or `chat`.
        model: Its configuration; our translation recipe notes prefix, prompt and languages in there.
    """
    facts = model.get("translation") or {}
    text, options = facts.get("prefix", "") + SENTENCE, ""
    if facts.get("kind") == "causal":
        kind, text = "prompted translation", facts["prompt"].replace("{source}", SENTENCE)
    if facts.get("languages"):
        source, target = facts["languages"]
        options = f', src_lang="{source}", tgt_lang="{target}"'
    writer = f'AutoTokenizer.from_pretrained("{name}", subfolder="target_tokenizer")'
    return SNIPPETS[kind].format(
        name=name,
        text=json.dumps(text, ensure_ascii=False),
        options=options,
        writer=writer if facts.get("separate") else "tokenizer",
    )


def find_task(model: dict[str, Any]) -> str:
    """Return the Hub's name for what the model does."""
    if model.get("is_encoder_decoder") or "translation" in model:
        return "translation"
    architecture = (model.get("architectures") or [""])[0]
    return "text-classification" if architecture.endswith("ForSequenceClassification") else "text-generation"


def is_tuned_to_chat(config: dict[str, Any]) -> bool:
    """Return whether a run trained on conversations; our tokenizers have a chat template before that.

    A folder without a configuration is somebody else's: there, a template means a model that holds conversations.
    """
    return not config or "messages_column" in config.get("data", {})
