"""What decides a small base model that is made from scratch: its shape and its training. Loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainingRecipe:
    """Everything but the texts that alters the weights `workers.pretraining` makes.

    The defaults were found by measuring: about a minute of one CPU thread for half a million parameters that copy a named
    value out of a sentence they have never seen.
    """

    vocab_size: int = 1024
    """Tokens at most, special ones and the 256 bytes included."""
    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    initializer_range: float = 0.08
    """About 1 / sqrt(hidden_size); the usual 0.02 suits models 30 times as wide and starts this one asleep."""
    num_steps: int = 1200
    batch_size: int = 16
    max_length: int = 80
    """Tokens of a row; longer texts are cut."""
    learning_rate: float = 3.0e-3
    """Peak of a one-cycle schedule."""
    seed: int = 0

    @property
    def num_texts(self) -> int:
        """Texts that training reads, each once."""
        return self.num_steps * self.batch_size
