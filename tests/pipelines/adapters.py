"""Small stored adapters with made-up factors, on tiny random bases."""

from pathlib import Path
from typing import Any

import torch

from infra.storage import Storage
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, lora_config, make_adapter
from workers.adapter_store import store_adapter
from workers.identity import identify

MODULE = "model.layers.0.self_attn.q_proj"


def put_adapter(
    store: Storage, base_id: str, seed: int, *, tenant: str = "acme", task: str | None = "support", scale: float = 1.0
) -> str:
    """Store an adapter of one layer and return its id. `scale` 0 makes one that does nothing."""
    config = lora_config(
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        use_rslora=False,
        target_modules=["q_proj"],
        base_model_name_or_path="base",
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PREFIX}{MODULE}{A_SUFFIX}": torch.randn(2, 32, generator=generator),
        f"{PREFIX}{MODULE}{B_SUFFIX}": torch.randn(32, 2, generator=generator) * scale,
    }
    body: dict[str, Any] = {"job_id": "j" * 32, "metrics": {"eval/loss": 1.0 + seed}, "prompt_contract": "p" * 32}
    return store_adapter(store, tenant, base_id, make_adapter(config, tensors, "test"), body | ({"task": task} if task else {}))


def base_id_of(folder: Path) -> str:
    """Return the id of the base in a folder."""
    return identify(folder).base_id
