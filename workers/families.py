"""Which families of models can be trained to classify, by the `model_type` of their config.json."""

from infra.errors import BadInput
from workers.architecture import ROBERTAS

DECODERS = ("gemma", "gpt2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
BERTS = ("bert",)
FAMILIES = (*BERTS, *DECODERS, *ROBERTAS)
"""`model_type`s whose bases can be trained to classify."""
ENCODERS = (*BERTS, *ROBERTAS)
"""Those of them that read text in both directions, and write none."""
POOLER_PARTS = ("pooler.dense.weight", "pooler.dense.bias")
"""What a BERT base must store beside its layers: random weights in front of the head would be part of no adapter."""


def refuse_other_families(model_type: str) -> None:
    """Raise BadInput unless bases of this family can be trained to classify."""
    if model_type not in FAMILIES:
        raise BadInput(
            f"task_type SEQ_CLS cannot be trained on a base of the family {model_type!r}; "
            f"use one of {', '.join(sorted(FAMILIES))}."
        )
