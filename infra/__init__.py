"""The ground: bytes, records, claims, tracking and launching. Knows nothing of LoRA, trials or tenants."""
