"""What serves adapters, and how each of them reads one: scale, ranks, layers that lack factors, what it refuses.

Read in the sources of vLLM 0.33, SGLang 0.5.23, Ray Serve LLM 2.60, LoRAX and llama.cpp. None of them looks at the base's
content, and most pass over what they do not know, so what they would compute has to be said here. No torch.
"""

import difflib
from dataclasses import dataclass

from infra.errors import BadInput

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (and 1), hence the ranks that waste nothing there."""
LORAX_RANKS = (8, 16, 32, 64, 128)
"""Ranks of LoRAX's grouped kernels; it pads others itself, and above 128 serves an adapter alone."""


@dataclass(frozen=True)
class Consumer:
    """One program that loads what is exported."""

    name: str
    """As in `--for`."""
    title: str
    """For people."""
    reads_rslora: bool = False
    """Whether `use_rslora` makes its scale lora_alpha / sqrt(r)."""
    reads_patterns: bool = False
    """Whether rank_pattern and alpha_pattern count."""
    rank_of_tensor: bool = False
    """Whether it divides by the rank of each tensor rather than by the configuration's r."""
    drops_incomplete_types: bool = False
    """Whether a type of layer (all q_proj, say) is left out as a whole where one layer lacks it."""
    takes_heads: bool = False
    """Whether a classifier's head is loaded."""
    takes_dora: bool = False
    needs_base_string: bool = False
    """Whether base_model_name_or_path must be what the server calls its model."""
    ranks: tuple[int, ...] = ()
    """Ranks that the universal form is padded to; empty: as it is."""
    max_rank: int | None = None
    """The highest rank it can be started for; None: no limit."""
    rank_option: str | None = None
    """The server's option for its highest rank."""
    default_max_rank: int | None = None
    """What the server's option is unless it is given."""

    @property
    def rule(self) -> str:
        """Its scale as a formula."""
        if self.reads_patterns:
            return "lora_alpha / r of each layer (rsLoRA: / sqrt(r))"
        r = "rank of the tensor" if self.rank_of_tensor else "r"
        return f"lora_alpha / {r}" + (" (rsLoRA: / sqrt(r))" if self.reads_rslora else ", use_rslora passed over")


CONSUMERS = {
    one.name: one
    for one in (
        Consumer("peft", "PEFT", reads_rslora=True, reads_patterns=True, takes_heads=True, takes_dora=True),
        Consumer(
            "vllm",
            "vLLM",
            reads_rslora=True,
            needs_base_string=True,
            ranks=VLLM_RANKS,
            max_rank=VLLM_RANKS[-1],
            rank_option="--max-lora-rank",
            default_max_rank=16,
        ),
        Consumer("sglang", "SGLang", rank_option="--max-lora-rank"),
        Consumer("lorax", "LoRAX", reads_rslora=True, drops_incomplete_types=True, needs_base_string=True, ranks=LORAX_RANKS),
        Consumer(
            "ray-llm",
            "Ray Serve LLM",
            reads_rslora=True,
            ranks=VLLM_RANKS,
            max_rank=VLLM_RANKS[-1],
            rank_option="max_lora_rank of engine_kwargs",
            default_max_rank=16,
        ),
        Consumer("llama-cpp", "llama.cpp", rank_of_tensor=True),
        Consumer("merged", "a plain Hugging Face folder", reads_rslora=True, reads_patterns=True),
    )
}


def find_consumer(name: str) -> Consumer:
    """Return the consumer of a name. Raises BadInput with what there is."""
    if name not in CONSUMERS:
        close = difflib.get_close_matches(name, CONSUMERS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(CONSUMERS)}."
        raise BadInput(f"--for {name[:40]!r} is nothing that adapters are exported for; {hint}")
    return CONSUMERS[name]
