"""The peer of `night.py`: one customer in a fresh process, trained by transformers' Trainer with PEFT as documented there.

    python benchmarks/night_trainer.py FOLDER

FOLDER holds `setting.json` (base, steps, batch, ...), `train.jsonl` and `holdout.jsonl` (conversations), `order.json` (numbers
of the training rows in the order in which they are seen); the setting names the factors A that both contenders start with.
FOLDER receives the adapter and `result.json`. Nothing of lorafleet is imported.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGUN = time.time()
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402

IGNORED = -100
EVAL_BATCH = 8


def main(folder: Path) -> None:
    """Train, evaluate on the held-out rows, store the adapter, and say when what was done."""
    setting = json.loads((folder / "setting.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(setting["base"], local_files_only=True)
    train, holdout = (examples(tokenizer, folder / f"{name}.jsonl", setting["max_length"]) for name in ("train", "holdout"))
    plain = AutoModelForCausalLM.from_pretrained(setting["base"], local_files_only=True)
    config = LoraConfig(r=setting["r"], lora_alpha=setting["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, config)
    start_alike(model, Path(setting["start"]))
    trainer = trainer_of(model, train, folder, setting)
    loaded = time.time()
    trainer.train()
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    trained = time.time()
    loss = loss_per_token(model, holdout)
    times = {"begun": BEGUN, "loaded": loaded, "trained": trained, "ended": time.time()}
    (folder / "result.json").write_text(json.dumps({"loss": loss, "num_steps": trainer.state.global_step, **times}))


def examples(tokenizer: Any, path: Path, max_length: int) -> list[dict[str, list[int]]]:
    """Render conversations; the answer alone is trained on."""
    found = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = ids_of(tokenizer, messages)
        prompt = ids_of(tokenizer, messages[:-1], add_generation_prompt=True)
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        found.append({"input_ids": whole[:max_length], "labels": labels[:max_length]})
    return found


def ids_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Return the ids of a conversation."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def start_alike(model: Any, path: Path) -> None:
    """Give the factors A their initial weights; the factors B start at zero anyway."""
    with torch.no_grad():
        for name, value in load_file(path).items():
            model.get_base_model().get_submodule(name).lora_A["default"].weight.copy_(value)


def trainer_of(model: Any, train: list[dict[str, list[int]]], folder: Path, setting: dict[str, Any]) -> Trainer:
    """Return a Trainer that sees the rows in the order that was written down."""
    order = json.loads((folder / "order.json").read_text())

    class SameOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return list(order)

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=setting["num_steps"],
        per_device_train_batch_size=setting["batch"],
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        label_names=["labels"],
        average_tokens_across_devices=False,
    )
    return SameOrder(model=model, args=arguments, train_dataset=train, data_collator=collate)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Pad on the right to the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


def loss_per_token(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return nats per supervised token over all rows: Trainer's own eval_loss is a mean over batches."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), EVAL_BATCH):
            batch = collate(rows[start : start + EVAL_BATCH])
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            flat = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
            total, count = total + float(flat), count + int((targets != IGNORED).sum())
    return total / count


if __name__ == "__main__":
    main(Path(sys.argv[1]))
