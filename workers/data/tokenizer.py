"""Loading a base's tokenizer: from its folder, offline, and never with code that came along."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infra.errors import BadInput
from workers.data.contract import has_tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in folder `path`. Raises BadInput if there is none or it cannot be used for training."""
    if not has_tokenizer(path):
        raise BadInput(f"{path} has no tokenizer (tokenizer.json); copy it there from the model's page.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BadInput(f"the tokenizer in {path} cannot be loaded ({reason}); copy it again from the model's page.") from error
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer in {path} has no fast form (tokenizer.json); convert it with transformers and save it.")
    return tokenizer
