"""What people write to ask for one training: the job spec.

Pydantic only: reading a job loads no torch. Names are PEFT's, transformers' and TRL's own. Every field says what it is, its
unit, and what None means; `lorafleet schema job` prints them.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from infra.strict import StrictModel

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
TARGET_PRESETS = ("attention", "mlp", "all-linear")


def check_name(name: str) -> str:
    """Return `name` if it may become part of a key; raise ValueError with the rule otherwise."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise ValueError(f"{name[:80]!r} is not a name; use 1 to 63 characters of a-z, 0-9 and '-', the first a letter or digit")
    return name


def _check_module_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.]+", name) is None:
        raise ValueError(f"{name!r} is not a module name; list plain names such as q_proj (regular expressions are not taken)")
    return name


Name = Annotated[str, AfterValidator(check_name)]
ModuleName = Annotated[str, AfterValidator(_check_module_name)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference", "classification"]


class QuantizationSpec(StrictModel):
    """bitsandbytes quantisation of the frozen base."""

    load_in_4bit: Literal[True] = Field(description="Load the base's linear layers in 4 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the quantisation constants as well.")


class BaseModelSpec(StrictModel):
    """The frozen base model."""

    name_or_path: str = Field(min_length=1, description="A local folder, or a hub name with a revision.")
    revision: str | None = Field(None, description="Commit of a hub model; None for a local folder.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the base's weights while training.")
    quantization: QuantizationSpec | None = Field(None, description="4-bit base; None keeps the weights in dtype.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model; recorded in the job.")


class DataSpec(StrictModel):
    """Rows to train on. Paths may be a file, a glob, s3://, or a folder with train|valid|test.*."""

    train: str = Field(min_length=1, description="Training rows.")
    validation: str | None = Field(None, description="Validation rows; None: from the folder, a split, or none.")
    test: str | None = Field(None, description="Test rows, read once for gates and the final report; None: as validation.")
    format: DataFormat = Field("auto", description="Form of the rows; auto detects and checks it.")
    validation_split: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of train rows, chosen by row hash, that becomes validation when there is none."
    )


class PeftSpec(StrictModel):
    """The adapter, in the words of PEFT's LoraConfig."""

    peft_type: Literal["LORA"] = Field("LORA", description="PEFT method.")
    r: Positive = Field(16, description="Rank of the update.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout on the adapter's input.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    rank_pattern: dict[ModuleName, Positive] = Field(
        default_factory=dict,
        description="Ranks of some layers, by module name (q_proj, layers.0.self_attn.q_proj); the others have r.",
    )
    alpha_pattern: dict[ModuleName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="lora_alpha of some layers, by module name; the others have lora_alpha."
    )
    target_modules: Literal["attention", "mlp", "all-linear"] | list[ModuleName] = Field(
        "all-linear", description="Linear layers to adapt: a preset or a list of module names."
    )
    init_adapter: str | None = Field(
        None, description="Adapter to continue from (id, prefix, or tenant.task@alias); None starts fresh."
    )


class TrainingSpec(StrictModel):
    """How to train, in the words of transformers' TrainingArguments and TRL."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(2.0e-4, description="Peak learning rate of AdamW.")
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the rows, unless max_steps is set.")
    max_steps: Positive | None = Field(None, description="Optimiser steps; None: from num_train_epochs.")
    per_device_train_batch_size: Positive = Field(8, description="Rows of one forward and backward.")
    gradient_accumulation_steps: Positive = Field(1, description="Forward and backward passes per optimiser step.")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "cosine", description="Shape of the learning rate over the steps."
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(0.0, description="Steps of linear warm-up; below 1 a share of all steps.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    adam_beta1: Decay = Field(0.9, description="AdamW beta 1.")
    adam_beta2: Decay = Field(0.999, description="AdamW beta 2.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW epsilon.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0, description="LoRA+: the learning rate of the factors B is so many times that of the factors A."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Clip the gradient to this norm; 0 does not clip.")
    max_length: Positive = Field(1024, description="Tokens of a row; longer rows are cut on the right.")
    eval_steps: Positive | None = Field(None, description="Steps between evaluations; None: at the end only.")
    checkpoint_steps: Positive | None = Field(None, description="Steps between checkpoints; None: at every evaluation.")
    early_stopping_patience: Positive | None = Field(
        None, description="Evaluations without a better loss before the job stops; None never."
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Which weights become the adapter: best by validation loss, or last."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass, to save memory.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of initial weights, row order and dropout.")


class EvaluationSpec(StrictModel):
    """What is measured beside the loss."""

    generate: Annotated[int, Field(ge=0)] = Field(0, description="Rows to generate for (exact match, format validity).")
    max_new_tokens: Positive = Field(64, description="Tokens of a generated answer at most.")
    format_pattern: str | None = Field(None, description="Regular expression that a whole answer should match.")

    @model_validator(mode="after")
    def _pattern_compiles(self) -> "EvaluationSpec":
        if self.format_pattern is not None:
            try:
                re.compile(self.format_pattern)
            except re.error as error:
                raise ValueError(f"format_pattern is not a regular expression ({error})") from None
        return self


class ResourcesSpec(StrictModel):
    """What the job may use; alters no result, except num_threads."""

    priority: Annotated[int, Field(ge=0, le=100)] = Field(50, description="Higher goes first.")
    num_threads: Positive = Field(1, description="Compute threads; above 1 bit-exactness across packs is not promised.")


class JobSpec(StrictModel):
    """One training that is asked for."""

    tenant: Name = Field(description="Customer that data and adapter belong to.")
    task: Name = Field(description="One use of the customer; the registered model is <tenant>.<task>.")
    base_model: BaseModelSpec = Field(description="The frozen base model.")
    task_type: TaskType = Field(
        "CAUSAL_LM", description="CAUSAL_LM learns to write answers, SEQ_CLS to label texts (rows of text and label)."
    )
    data: DataSpec = Field(description="Rows to train and validate on.")
    peft: PeftSpec = Field(default_factory=lambda: PeftSpec(), description="The adapter.")
    training: TrainingSpec = Field(default_factory=lambda: TrainingSpec(), description="How to train.")
    evaluation: EvaluationSpec = Field(default_factory=lambda: EvaluationSpec(), description="What is measured.")
    resources: ResourcesSpec = Field(default_factory=lambda: ResourcesSpec(), description="What it may use.")


def metrics_of(spec: JobSpec) -> tuple[str, ...]:
    """Return the names of what such a job measures on its validation rows: what a sweep's objective may be."""
    if spec.task_type == "SEQ_CLS":
        return ("eval/loss", "eval/accuracy", "eval/macro_f1")
    measured = ("eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/token_accuracy")
    if not spec.evaluation.generate:
        return measured
    answered = ("eval/exact_match", "eval/format_validity") if spec.evaluation.format_pattern else ("eval/exact_match",)
    return measured + answered
