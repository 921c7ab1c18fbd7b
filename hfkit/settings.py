"""Every setting of every recipe on one page: one dataclass per section, free of torch so that `--help` answers at once.

A recipe's own dataclass holds the sections that it uses. Each field runs with its default and says its unit; fields
whose combination matters are checked in ``__post_init__``, before any work starts.
"""

import math
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Files = str | list[str] | None
SEEDS = "[0, 4294967296)"  # what numpy, torch and lm-eval all take


class BadInput(ValueError):
    """Something the user gave cannot be used: shown as one `error: …` line, without traceback, exit status 2."""


def check_bounds(section: str, settings: object, **accepted: str) -> None:
    """Refuse numbers that lie outside of their interval; null is accepted.

    Args:
        section: What their names begin with in a message, such as ``optim.``.
        accepted: Interval by name, as in mathematics: ``[1, inf)`` is 1 or more, ``(0, 1]`` leaves out 0.

    Raises:
        BadInput: for the first one.
    """
    for name, interval in accepted.items():
        value, (least, most) = getattr(settings, name), interval[1:-1].split(", ")
        if value is None:
            continue
        low, high = float(least), float(most)
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high  # neither holds for what is not a number
        if not (above and below):
            bound = f"be at least {least}" if interval[0] == "[" else f"be above {least}"
            finite = "" if math.isfinite(value) else " and finite"
            wanted = f"{bound}{finite}" if most == "inf" else f"lie in {interval}"
            raise BadInput(f"{section}{name} must {wanted}, not {value}")


def check_needed(section: str, settings: object, needed: str, *names: str) -> None:
    """Refuse settings that were given and would do nothing, since ``needed`` was not.

    Raises:
        BadInput: for the first one.
    """
    for name in names:
        default = getattr(type(settings), name, [])  # a dataclass has no attribute for a list
        if not getattr(settings, needed) and (value := getattr(settings, name)) != default:
            raise BadInput(f"{section}{name} {value} does nothing without {needed}: give both or neither")


@dataclass
class SourceConfig:
    """One of several sources of a mixture."""

    path: Files = None
    """Files or globs, like `data.train_files`."""
    dataset: str | None = None
    """Dataset on the Hub, or a `save_to_disk` folder."""
    dataset_config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of `dataset` on the Hub."""
    split: str = "train"
    """Split of the dataset."""
    text_column: str | None = None
    """Column that holds the text; null uses `data.text_column`."""
    weight: float = 1.0
    """Share of the training sequences, relative to the other sources."""
    name: str | None = None
    """What reports call it; null uses the path or dataset."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise BadInput("each of data.sources needs either path or dataset")
        check_needed("data.sources: ", self, "dataset", "revision", "dataset_config", "split")
        if self.weight <= 0:
            raise BadInput(f"data.sources: weight must be above 0, not {self.weight}")


@dataclass
class CleanConfig:
    """Cleaning rules of `hfkit/text.py`, each with a switch. The defaults leave clean text of any language as it is."""

    enabled: bool = True
    """Apply the rules below; false reads the text as it is."""
    surrogates: bool = True
    """Join UTF-16 surrogate pairs; a lone surrogate becomes U+FFFD."""
    mojibake: bool = True
    """Undo wrong decodings such as `Ã©` for `é` (ftfy)."""
    controls: bool = True
    """Remove control characters, terminal escapes and stray byte-order marks."""
    nfc: bool = True
    """Unicode normal form C; CJK compatibility ideographs stay."""
    whitespace: bool = False
    """Unix line ends, no trailing spaces, at most two blank lines in a row."""
    boilerplate: bool = False
    """Remove short lines with the phrases of web pages' frames: cookie notices, newsletters."""
    mask_urls: bool = False
    """Replace web addresses by [url]."""
    mask_emails: bool = False
    """Replace e-mail addresses by [email]."""
    min_characters: int = 0
    """Drop shorter documents."""
    max_characters: int | None = None
    """Drop longer documents; null is no limit."""
    max_symbol_share: float = 1.0
    """Drop documents with a larger share of punctuation and symbols among their visible characters."""
    max_digit_share: float = 1.0
    """Drop documents with a larger share of digits among their visible characters."""
    repetition: bool = False
    """Drop documents whose lines, paragraphs or word sequences repeat too much (limits of Gopher, Rae et al. 2021)."""
    languages: list[str] = field(default_factory=list)
    """Keep documents in these languages only (ISO 639-1, such as [en, de]); empty keeps all. Needs hfkit[corpus]."""

    def __post_init__(self) -> None:
        check_bounds("data.clean.", self, max_symbol_share="[0, 1]", max_digit_share="[0, 1]")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise BadInput(
                f"data.clean.max_characters {self.max_characters} is below min_characters {self.min_characters}"
            )


@dataclass
class DedupConfig:
    """Duplicate removal; the first document of each cluster stays."""

    exact: bool = True
    """Drop documents equal to an earlier one after whitespace and case are normalised."""
    near: bool = True
    """Drop documents whose shingles overlap an earlier document's by `threshold` or more (MinHash)."""
    threshold: float = 0.8
    """Jaccard similarity of shingle sets from which two documents count as near duplicates."""
    shingle: int = 5
    """Words a shingle; in scripts without spaces every character counts as a word."""
    permutations: int = 128
    """Hash functions a signature (4 bytes each); the similarity estimate spreads by up to 0.5/sqrt(permutations)."""

    def __post_init__(self) -> None:
        check_bounds("data.dedup.", self, threshold="(0, 1]", shingle="[1, inf)", permutations="[16, inf)")


@dataclass
class RowsConfig:
    """Where rows come from; shared by every recipe's `data` section."""

    train_files: Files = None
    """Paths or globs: .txt .txt.gz .jsonl .jsonl.gz .jsonl.zst .csv .parquet, or a folder."""
    validation_files: Files = None
    """Like train_files; without them `validation_share` of the training documents is held out."""
    test_files: Files = None
    """Like train_files."""
    dataset: str | None = None
    """Dataset on the Hub, or a `save_to_disk` folder, instead of train_files."""
    dataset_config: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of `dataset` on the Hub."""
    split: str = "train"
    """Split of the dataset to train on."""
    validation_split: str | None = None
    """Split of the dataset to validate on, where no validation files are given."""
    test_split: str | None = None
    """Split of the dataset to test on, where no test files are given."""
    validation_share: float = 0.1
    """Share held out for validation, chosen by content hash, where no validation files or split are given."""
    on_error: Literal["stop", "skip"] = "stop"
    """A row that cannot be read: `stop` with file:line, or `skip` and count it."""
    max_documents: int | None = None
    """Read at most this many documents of the training data; in a mixture, of each source."""
    cache_dir: Path | None = None
    """Where prepared text is kept for all recipes; null is $HFKIT_CACHE or ~/.cache/hfkit. Labelled texts, pairs and
    conversations are small: they are read anew each time, and nothing of them is kept."""

    def __post_init__(self) -> None:
        if self.train_files is not None and self.dataset is not None:
            raise BadInput("give data.train_files or data.dataset, not both")
        check_needed("data.", self, "dataset", "revision", "dataset_config", "split", "validation_split", "test_split")
        check_bounds("data.", self, validation_share="[0, 1)", max_documents="[1, inf)")

    @property
    def is_builtin(self) -> bool:
        """Whether no data is named, so that a recipe runs its built-in set."""
        return not any((self.train_files, self.validation_files, self.test_files, self.dataset))


@dataclass
class DataConfig(RowsConfig):
    """Which text, and how it is cut into documents, cleaned, deduplicated and packed."""

    text_column: str = "text"
    """Column of .jsonl, .csv, .parquet and datasets that holds the text."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What one document of a .txt is."""
    document_start: str | None = None
    """Regular expression: a line of a .txt that matches begins a new document (overrides `document`)."""
    split_by: Literal["document", "characters"] = "document"
    """Hold out whole documents, or the last share of the text's characters (for one-file corpora); of a single document
    its end is held out either way."""
    streaming: bool = False
    """Read the dataset as a stream, without downloading it first."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture of weighted sources instead of train_files (YAML)."""
    hooks: list[str] = field(default_factory=list)
    """Your own functions by dotted name, called in turn on each document: text -> text, or None to drop it."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Cleaning rules."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Duplicate removal."""
    decontaminate: bool = True
    """Drop training documents that share a 13-word passage with the validation or test text."""
    sequence_length: int = 512
    """Targets per training row and evaluation window (tokens)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources and (self.train_files is not None or self.dataset is not None):
            raise BadInput("give data.sources or data.train_files/data.dataset, not both")
        if self.streaming and self.dataset is None and not any(source.dataset for source in self.sources):
            raise BadInput("data.streaming reads a dataset; give data.dataset, or leave it out for files")
        check_bounds("data.", self, sequence_length="[1, inf)")

    @property
    def is_builtin(self) -> bool:
        """Whether no data is named, so that a recipe runs its built-in set."""
        return super().is_builtin and not self.sources


@dataclass
class ExecutorConfig:
    """Who prepares the text: this machine, or many tasks of an executor of datatrove. The result is the same."""

    name: Literal["none", "local", "slurm", "ray"] = "none"
    """`local` runs the tasks on this machine, `slurm` and `ray` on a cluster that shares `data.cache_dir`. Needs
    hfkit[corpus]."""
    tasks: int = 2
    """Tasks of each long step; a file, or 10,000 rows of a dataset, is the least that one task reads."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's executor, such as {"workers": 8}; slurm needs {"time": "10:00:00", "partition": …}."""

    def __post_init__(self) -> None:
        check_bounds("executor.", self, tasks="[1, inf)")
        needed = ("time", "partition") if self.name == "slurm" else ()
        if missing := [option for option in needed if option not in self.options]:
            raise BadInput(f"executor.name slurm needs executor.options {missing[0]}")
        if self.name != "none" and not find_spec("datatrove"):
            raise BadInput(f"executor.name {self.name} needs datatrove: pip install 'hfkit[corpus]', or set it to none")
        if self.name == "ray" and not find_spec("ray"):
            raise BadInput("executor.name ray needs ray: pip install ray")


@dataclass
class ChatDataConfig(RowsConfig):
    """Which conversations: rows of messages, of prompt and completion, or of instruction, input and output."""

    messages_column: str = "messages"
    """Column with a list of {"role": system, user or assistant, "content": text}."""
    prompt_column: str = "prompt"
    """Column with what the user says, where there are no messages."""
    completion_column: str = "completion"
    """Column with what the assistant answers."""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own template; what the assistant says is inside {% generation %}."""
    sequence_length: int = 1024
    """Tokens of a training row, which holds whole conversations; longer ones are cut after a turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("data.", self, sequence_length="[2, inf)")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise BadInput(f"data.chat_template {self.chat_template} does not exist")
        if self.test_files is not None or self.test_split is not None:
            raise BadInput("data.test_files and test_split: what is scored are the validation data; leave them out")


@dataclass
class AdapterConfig:
    """LoRA: train small matrices beside the model's own, which stay as they are."""

    rank: int = 0
    """Rank of the added matrices; 0 trains the whole model. Needs hfkit[peft]."""
    alpha: float | None = None
    """What they add is multiplied by alpha / rank; null is twice the rank."""
    dropout: float = 0.0
    """Dropout on what they read."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers that get them; empty is all but the output head."""
    quantize: Literal["none", "int8"] = "none"
    """Hold those layers' own weights in 8 bits: a quarter of fp32's memory, as in QLoRA. Needs hfkit[quant]."""

    def __post_init__(self) -> None:
        check_bounds("adapter.", self, rank="[0, inf)", alpha="(0, inf)", dropout="[0, 1)")
        check_needed("adapter.", self, "rank", "alpha", "dropout", "target_modules")
        if self.rank and find_spec("peft") is None:
            raise BadInput("adapter.rank needs peft: pip install 'hfkit[peft]'")
        if self.quantize != "none" and not self.rank:
            raise BadInput(f"adapter.quantize {self.quantize} freezes weights, so adapter.rank must be above 0")
        if self.quantize != "none" and find_spec("torchao") is None:
            raise BadInput("adapter.quantize needs torchao: pip install 'hfkit[quant]'")


@dataclass
class TokenizerConfig:
    """Train a tokenizer on the corpus, or load one."""

    path: str | None = None
    """Folder or Hub id of a tokenizer; null trains one."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub."""
    kind: Literal["bpe", "char"] = "bpe"
    """Byte-level BPE (lossless on any text), or one token per character of the training text."""
    vocab_size: int = 32768
    """Tokens to train, special tokens included; a ceiling (BPE only)."""
    sample_bytes: int = 200_000_000
    """Bytes of training text that the tokenizer is trained on, drawn evenly from all sources."""

    def __post_init__(self) -> None:
        check_bounds("tokenizer.", self, sample_bytes="[1, inf)")
        check_needed("tokenizer.", self, "path", "revision")
        smallest = 256 + 6  # every byte, and tokenizer.SPECIAL_TOKENS
        if self.path is None and self.kind == "bpe" and self.vocab_size < smallest:
            raise BadInput(
                f"tokenizer.vocab_size {self.vocab_size} is too small: byte-level BPE needs the 256 bytes and 6 "
                f"special tokens, so at least {smallest}"
            )


@dataclass
class ModelConfig:
    """Which model: a preset built from scratch, or a folder or Hub id to go on from."""

    preset: str = "small"
    """Name of a shape in `hfkit/model.py`: tiny, mini, small, base, medium, large, xl, gpt2, qwen3-base …"""
    path: str | None = None
    """Folder or Hub id of a model to continue training; excludes preset."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers configuration that replace the preset's, such as {"num_hidden_layers": 4}."""
    dropout: float = 0.0
    """Dropout on embeddings and on what each block adds to the residual stream."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""
    trust_remote_code: bool = False
    """Run model code that comes with `path`: only for authors you trust."""

    def __post_init__(self) -> None:
        check_bounds("model.", self, dropout="[0, 1)")
        check_needed("model.", self, "path", "revision")


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices inside the blocks and AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """Shape after warm-up; `wsd` is constant, then falls linearly over the last `decay_share` of the run."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; null is 2 % of the run, and stays what it was where max_steps is raised."""
    min_learning_rate_share: float = 0.1
    """Where cosine and linear end, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the run over which `wsd` falls to zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """AdamW's denominator guard."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 measures without clipping."""
    z_loss: float = 0.0
    """Coefficient of PaLM's z-loss against drifting logits (1e-4 is usual): in the gradient, not in `loss`."""

    def __post_init__(self) -> None:
        check_bounds(
            "optim.",
            self,
            learning_rate="(0, inf)",
            muon_learning_rate="(0, inf)",
            warmup_steps="[0, inf)",
            min_learning_rate_share="[0, 1]",
            decay_share="[0, 1]",
            weight_decay="[0, inf)",
            beta1="[0, 1)",
            beta2="[0, 1)",
            epsilon="(0, inf)",
            max_grad_norm="[0, inf]",
            z_loss="[0, inf)",
        )

    def warmup_of(self, max_steps: int) -> int:
        """Return the warm-up of a run of ``max_steps``: as given, or 2 % of it.

        Raises:
            BadInput: where the one that is given is longer.
        """
        if self.warmup_steps is None:
            return round(0.02 * max_steps)
        if self.warmup_steps > max_steps:
            raise BadInput(f"optim.warmup_steps {self.warmup_steps} is over the run's {max_steps} steps")
        return self.warmup_steps


@dataclass
class TrainConfig:
    """Steps, batch sizes, precision, and how often to look up from training."""

    max_steps: int | None = None
    """Optimizer steps of the run; excludes epochs. 1000 where neither is given."""
    epochs: float | None = None
    """Passes over the training data; excludes max_steps."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    global_batch_tokens: int | None = None
    """Tokens per optimizer step, a multiple of data.sequence_length; replaces global_batch_size. In translation a
    budget for the longer side of the pairs, padding included."""
    batch_stages: list[list[int]] = field(default_factory=list)
    """Smaller steps at the start, stage by stage: [[100, 8], [100, 16]] is 100 steps of 8 sequences and 100 of 16, and
    then global_batch_size. The learning-rate schedule counts steps as ever."""
    micro_batch_size: int | None = None
    """Sequences per forward pass and process; null takes the largest divisor up to 8. Changes speed and memory,
    and dropout's masks, only."""
    eval_every: int = 250
    """Optimizer steps between evaluations (0: only at the end)."""
    save_every: int = 250
    """Optimizer steps between checkpoints (0: only at the end)."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    sample_every: int = 0
    """Optimizer steps between printed samples (0: only at the end)."""
    keep_checkpoints: int = 2
    """Checkpoints kept, at least 2; beside them the best one by validation loss, those to be averaged, and the one that
    resume named by its path."""
    average_checkpoints: int = 0
    """Try the mean of this many last checkpoints' weights (of save_every and of the end) as the result: it is taken
    where it is better on validation. Pays where the learning rate does not fall to zero; 0 does not try."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """auto: the launcher's if set, else bf16 on a GPU that has it, else fp32. fp8: large products only; from 1 B on."""
    compile: bool | None = None
    """torch.compile the blocks and the loss; null: on CUDA only."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it made: less memory, a third more time."""
    max_skipped_steps: int = 0
    """Steps with non-finite loss or gradient that may be skipped before the run stops with status 3."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise BadInput("give train.max_steps or train.epochs, not both")
        check_bounds(
            "train.",
            self,
            max_steps="[1, inf)",
            epochs="(0, inf)",
            global_batch_size="[1, inf)",
            global_batch_tokens="[1, inf)",
            micro_batch_size="[1, inf)",
            eval_every="[0, inf)",
            save_every="[0, inf)",
            log_every="[1, inf)",
            sample_every="[0, inf)",
            keep_checkpoints="[2, inf)",
            max_skipped_steps="[0, inf)",
        )
        for stage in self.batch_stages:
            if len(stage) != 2 or min(stage) < 1:
                raise BadInput(f"train.batch_stages holds [steps, sequences] of at least 1 each, not {stage}")
        if self.average_checkpoints == 1:
            raise BadInput("train.average_checkpoints 1 is no mean; give 2 or more, or 0 for none")
        if self.average_checkpoints and not self.save_every:
            raise BadInput(f"train.average_checkpoints {self.average_checkpoints} needs train.save_every above 0")
        if not 0 <= self.average_checkpoints <= self.keep_checkpoints:
            raise BadInput(
                f"train.average_checkpoints {self.average_checkpoints} needs as many checkpoints; "
                f"train.keep_checkpoints is {self.keep_checkpoints}"
            )
        if (
            self.micro_batch_size
            and self.global_batch_tokens is None
            and self.global_batch_size % self.micro_batch_size
        ):
            raise BadInput(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size {self.micro_batch_size}"
            )


@dataclass
class TrackingConfig:
    """Where figures go besides the console, metrics.jsonl and report.html."""

    to: list[str] = field(default_factory=list)
    """Trackers that Accelerate knows, such as [tensorboard] or [wandb]."""

    def __post_init__(self) -> None:
        known = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
        installed = [name for name in known if find_spec(name)]
        if wrong := [name for name in self.to if name not in installed]:
            raise BadInput(
                f"tracking.to: {wrong[0]!r} is {'not installed' if wrong[0] in known else 'no tracker'}; "
                f"there are {', '.join(known)}; installed: {', '.join(installed) or 'none'}"
            )


@dataclass
class GenerationSettings:
    """How text is sampled."""

    max_new_tokens: int = 100
    """Tokens to add at most."""
    temperature: float = 0.8
    """Divides the logits; 0 is greedy, and then nothing below but repetition_penalty and stop matters."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0 is no limit."""
    top_p: float = 0.95
    """Sample among the most probable tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Leave out tokens less probable than this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Divides (where negative, multiplies) the logits of tokens that are in the text already; 1 is none."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; they are not part of it."""
    num_samples: int = 1
    """Continuations of each prompt."""

    def __post_init__(self) -> None:
        check_bounds(
            "generation.",
            self,
            max_new_tokens="[1, inf)",
            temperature="[0, inf)",
            top_k="[0, inf)",
            top_p="(0, 1]",
            min_p="[0, 1]",
            repetition_penalty="(0, inf)",
            num_samples="[1, inf)",
        )
        if self.num_samples > 1 and self.temperature == 0:
            raise BadInput(
                "generation.num_samples above 1 needs a temperature above 0: greedy samples are all the same"
            )
        if "" in self.stop:
            raise BadInput("generation.stop holds an empty string, which would end every text at once")


@dataclass
class RepositoryConfig:
    """Publishing on the Hub. The token comes from HF_TOKEN or `hf auth login`, never from here."""

    repo_id: str | None = None
    """Repository to publish in, as `name/model`; null publishes nothing."""
    private: bool = True
    """Create the repository as private; an existing one stays as it is."""
    required: bool = False
    """A push that fails makes the run end with status 4; otherwise it is a warning and the files stay local."""
    license: str | None = None
    """License for the card, as the Hub spells it, such as apache-2.0."""
    language: str | list[str] | None = None
    """Language codes for the card, such as en; null takes what the run knows."""

    def __post_init__(self) -> None:
        if self.repo_id is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo_id, re.ASCII):
            raise BadInput(f"hub.repo_id must be name/model, with letters, digits, - _ and ., not {self.repo_id!r}")
        check_needed("hub.", self, "repo_id", "required")


@dataclass
class PublishConfig(RepositoryConfig):
    """Publishing a run's model, and its checkpoints."""

    push_every: int | None = None
    """Optimizer steps between pushes, each saved first and then also a branch `step-…`; null: only at the end. Training
    does not wait: where the network is slower, the newest checkpoint takes the place of the one that waits."""
    include_samples: bool = False
    """Publish samples.jsonl and predictions.jsonl too, which may quote the data."""
    include_checkpoints: bool = False
    """Put the training state into each `step-…` branch, so that `--resume hub` continues on another machine; without
    push_every every checkpoint that is saved becomes such a branch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("hub.", self, push_every="[0, inf)")
        check_needed("hub.", self, "repo_id", "push_every", "include_checkpoints")

    @property
    def branch_every(self) -> int:
        """Steps between the checkpoints that become branches, where they are saved; 0: none does."""
        return self.push_every or int(self.include_checkpoints)


@dataclass
class HubConfig(PublishConfig):
    """Publishing a run's model, its checkpoints while it trains, and going on from one that is there."""

    revision: str | None = None
    """Branch that `--resume hub` begins from, such as step-00001000; null is the newest whole one, there or here."""


@dataclass
class LabelDataConfig(RowsConfig):
    """Labelled texts: one row a text, with a column for its label."""

    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column that holds the label: a name or a number; null, blank or -1 (unless label_names hold it) is unlabelled."""
    label_names: list[str] = field(default_factory=list)
    """Names of the classes in the order of their numbers, such as [negative, positive]; empty reads the data's."""
    sequence_length: int = 256
    """Tokens of a text that the model sees at once, special tokens included."""
    long_texts: Literal["head", "head_tail", "windows"] = "head"
    """Of a longer text: its head, its head and tail (a quarter and the rest), or windows whose scores are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("data.", self, sequence_length="[4, inf)")
        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) == 1:
            raise BadInput(f"data.label_names needs two or more different names, not {self.label_names}")


@dataclass
class ClassifierConfig(ModelConfig):
    """Which model gets a classification head: a preset built from scratch, or a causal model or encoder that exists."""

    preset: str = "tiny"
    """Name of a shape in `hfkit/model.py`: tiny, mini, small, base, medium, large, xl, gpt2, qwen3-base …"""
    head_learning_rate: float | None = None
    """Peak learning rate of the new head; null is optim.learning_rate."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """Weight of each class in the loss: none, balanced (examples / classes / examples of the class), or by name."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all classes."""
    pad_token: str | None = None
    """Token that fills short rows, where the model's tokenizer has none; a new one is added to the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("model.", self, head_learning_rate="(0, inf)", label_smoothing="[0, 1)")
        if isinstance(self.class_weights, dict):
            self.class_weights = {str(name): weight for name, weight in self.class_weights.items()}  # YAML's 0 is "0"
            if min(self.class_weights.values(), default=0) <= 0:
                raise BadInput(f"model.class_weights: every weight must be above 0, not {self.class_weights}")


@dataclass
class PairDataConfig(RowsConfig):
    """Texts and their translations: rows `{"translation": {…}}`, or one column for each language."""

    source_key: str = "en"
    """Key or column of the text."""
    target_key: str = "de"
    """Key or column of its translation."""
    source_code: str | None = None
    """What the model or tokenizer calls the source language, such as eng_Latn; null is source_key."""
    target_code: str | None = None
    """Like source_code; also decides how BLEU cuts words (de, zh, ja, deu_Latn …)."""
    sequence_length: int = 128
    """Tokens of a source, and of a target, at most; longer ones are cut, and their share printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source_code = self.source_code or self.source_key
        self.target_code = self.target_code or self.target_key
        if self.source_key == self.target_key:
            raise BadInput(f"data.source_key and data.target_key are both {self.source_key!r}")
        check_bounds("data.", self, sequence_length="[4, inf)")


@dataclass
class TranslationModelConfig(ModelConfig):
    """Which model translates: built from scratch, or one that exists."""

    kind: Literal["seq2seq", "causal"] = "seq2seq"
    """Encoder and decoder, or a language model that continues a prompt."""
    preset: str = "tiny"
    """seq2seq: tiny, mini, small, base (Marian); causal: a name in `hfkit/model.py`."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread evenly over the vocabulary."""
    vocabularies: Literal["joint", "separate"] = "joint"
    """seq2seq from scratch: one BPE for both languages, or one for each, both of tokenizer.vocab_size tokens."""
    prompt: str = "{source}\n"
    """causal: what the model continues; {source} is the text."""
    prefix: str | None = None
    """seq2seq: put before every source; null is what the model wants: T5's sentence, Marian's >>code<<, or nothing."""
    average_checkpoints: int = 0
    """Earlier name of train.average_checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("model.", self, label_smoothing="[0, 1)")
        if "{source}" not in self.prompt:
            raise BadInput(f"model.prompt must hold {{source}}, where the text goes; it is {self.prompt!r}")
        if self.vocabularies == "separate" and (self.kind == "causal" or self.path):
            raise BadInput("model.vocabularies separate is for a seq2seq model that is built from scratch")


@dataclass
class DecodingConfig:
    """How translations are searched for. With translate, null is what the model was saved with."""

    num_beams: int | None = None
    """Hypotheses kept at each position; 1 is greedy; null is 5."""
    length_penalty: float | None = None
    """Scores are divided by length to this power; above 0 favours longer translations; null is 1."""
    max_new_tokens: int | None = None
    """Tokens of a translation at most; null is data.sequence_length."""
    batch_size: int = 64
    """Sentences translated at once; sorted by length, in any number of processes. A sentence that is done leaves its
    batch, so that more at once cost little (CPU time of 512 sentences, 5 beams: 9.5 s at 32, 8.4 at 64, 8.5 at 128)."""

    def __post_init__(self) -> None:
        check_bounds("decoding.", self, num_beams="[1, inf)", batch_size="[1, inf)", max_new_tokens="[1, inf)")


@dataclass
class RunConfig:
    """What every training recipe has; each gives its own kind of data and model, and adds what its task needs."""

    data: RowsConfig = field(default_factory=RowsConfig)
    """Which rows to train, validate and test on."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The one named by `path`, else that of the model to go on from, else one trained on `data`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture preset and overrides, or a model to go on from."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batch sizes, evaluation, checkpoints."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Where to publish; nothing leaves the machine unless `repo_id` is set."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers besides metrics.jsonl and the report."""
    output_dir: Path = Path("runs")
    """Checkpoints, figures, report and the final model."""
    resume: str = "auto"
    """auto: the newest whole checkpoint in output_dir; never; hub; or a checkpoint's path, to branch off there: what
    output_dir holds beyond it moves to previous-N/, and the same command again goes on with the branch."""
    resume_accept: list[str] = field(default_factory=list)
    """Settings that may differ from those of the run that is resumed, such as [max_steps]."""
    seed: int = 0
    """Decides weights, order and dropout."""

    def __post_init__(self) -> None:
        check_bounds("", self, seed=SEEDS)
        if self.train.max_steps is not None:
            self.optim.warmup_of(self.train.max_steps)
