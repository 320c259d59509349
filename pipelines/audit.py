"""`lorafleet adapters audit`: what an adapter does to its base, what it was trained on, and whether it learned rows by heart.

Kept as one evidence object of kind `audit`: the same findings are one object, however often they are made. It holds no text of
any row but labels. Numbers are kept to six digits, beyond which they depend on the machine.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.fingerprint import id_of_json
from infra.strict import parse
from pipelines.audited import show_audit
from pipelines.evaluate import Subject
from pipelines.evidence import Binding, keep
from pipelines.workspace import Workspace
from workers.audit import LayerAudit, audit_layers, by_kind, rank_advice
from workers.data.rows import Row, position_of
from workers.data.splits import load_splits
from workers.data.store import load_rows
from workers.data_audit import audit_data, normalised_text, texts_of
from workers.evaluate import Bench
from workers.job import NUMERICS_VERSION
from workers.manifests import AdapterRef
from workers.memorisation import canary_rows, exposure, num_planted, probe
from workers.metrics_log import encode_number
from workers.scores import RowScores
from workers.spec import DataSpec, EvaluationSpec

KIND = "audit"
EXPOSED_BITS = 3.0
"""More than a canary's base rank by this much counts as exposed: eight times as likely as by chance."""
SUSPICIOUS_ERRORS = 4.0
"""Standard deviations above one half from which training rows count as recognisable."""


def audit(
    workspace: Workspace,
    reference: str,
    *,
    base: Path | None = None,
    num_rows: int = 256,
    canaries: Path | None = None,
    num_alternatives: int = 255,
) -> dict[str, Any]:
    """Audit an adapter and keep what was found. Raises WrongBase before anything is computed.

    At most `num_rows` training rows and as many held-out rows are measured; 0 measures none. Each of the `canaries` (a file of
    prompts and completions) is compared with `num_alternatives` random secrets of its form.
    """
    subject = Subject(workspace, reference)
    path = subject.find_base(base)
    planted = _read_canaries(canaries)
    rows = _rows_of(subject)
    layers = audit_layers(subject.stored.adapter, path)
    verdict, advice = rank_advice(layers)
    found: dict[str, Any] = {
        "layers": [{**asdict(layer), "ratio": layer.ratio} for layer in layers],
        "rank": {"verdict": verdict, "advice": advice},
        "data": asdict(audit_data(rows["train"], _held_out(rows))) if "train" in rows else None,
        **_measured(subject, path, rows, planted, num_rows, num_alternatives),
        "setting": {
            "num_rows": num_rows,
            "num_alternatives": num_alternatives if planted else None,
            "canaries": id_of_json([dict(row.body) for row in planted]) if planted else None,
            "numerics": NUMERICS_VERSION,
        },
    }
    found["sentence"] = _sentence(found)
    return _kept(subject, _rounded(found))


def _kept(subject: Subject, found: dict[str, Any]) -> dict[str, Any]:
    manifest = subject.stored.manifest
    ref = AdapterRef(subject.tenant, subject.base_id, subject.stored.adapter_id)
    key = keep(subject.workspace.store, Binding(ref, manifest.get("task") or "", None, None), KIND, found)
    return {**ref._asdict(), "task": manifest.get("task"), **found, "evidence": key, "not_in_mlflow": _tell(subject, found)}


def _tell(subject: Subject, found: Mapping[str, Any]) -> str | None:
    """Show the sentence where the adapter's job is shown; return why it is not in MLflow, None if it is."""
    if subject.job is None:
        return "the adapter comes from no job of this store"
    return show_audit(subject.workspace, subject.tenant, subject.job.job_id, found["sentence"])


def _rows_of(subject: Subject) -> dict[str, list[Row]]:
    known = subject.stored.manifest.get("data") or {}
    digests = {split: known.get(split) for split in ("train", "validation", "test")}
    return {name: load_rows(subject.workspace.store, subject.tenant, digest) for name, digest in digests.items() if digest}


def _held_out(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    return {name: found for name, found in rows.items() if name != "train"}


def _read_canaries(path: Path | None) -> list[Row]:
    if path is None:
        return []
    return load_splits(parse(DataSpec, {"train": str(path.absolute())}, "--canaries"), Path.cwd()).train


def _measured(
    subject: Subject, path: Path, rows: Mapping[str, list[Row]], planted: Sequence[Row], num_rows: int, num_alternatives: int
) -> dict[str, Any]:
    """Measure rows and canaries with the adapter and with the plain base; nothing is loaded where there is nothing to measure."""
    train, held_out = _sample(rows, num_rows)
    kind = rows["train"][0].kind if "train" in rows else "prompt_completion"
    trials = [canary_rows(canary, num_alternatives, kind) for canary in planted]
    memorisation = None
    exposures = []
    if (train and held_out) or trials:
        bench = subject.bench(path)
        if train and held_out:
            memorisation = asdict(probe(_both(bench, subject, train), _both(bench, subject, held_out)))
        texts = ["\n".join(texts_of(row)) for row in rows.get("train", [])]
        for canary, trial in zip(planted, trials, strict=True):
            with_adapter, without = _both(bench, subject, trial)
            exposures.append(asdict(exposure(canary, num_planted(canary, texts), with_adapter.loss, without.loss)))
    return {"memorisation": memorisation, "canaries": exposures}


def _both(bench: Bench, subject: Subject, rows: Sequence[Row]) -> tuple[RowScores, RowScores]:
    evaluation = EvaluationSpec()
    return bench.scores(subject.stored.adapter, rows, evaluation), bench.scores(None, rows, evaluation)


def _sample(rows: Mapping[str, list[Row]], num: int) -> tuple[list[Row], list[Row]]:
    """Choose training rows and held-out rows that are none, by their content: the same ones every time."""
    train = {normalised_text(row): row for row in rows.get("train", [])}
    others = {normalised_text(row): row for found in _held_out(rows).values() for row in found}
    unseen = [row for text, row in others.items() if text not in train]
    return sorted(train.values(), key=position_of)[:num], sorted(unseen, key=position_of)[:num]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return encode_number(float(f"{value:.6g}"))
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _sentence(found: Mapping[str, Any]) -> str:
    """Return the audit in one line."""
    rank = {"too_high": "rank looks too high", "too_low": "rank may be too low", "fits": "rank looks right"}
    parts = [rank[found["rank"]["verdict"]]]
    if (data := found["data"]) is not None:
        parts.append(f"{data['duplicates']['normalised']['num_rows']} repeated training rows")
        parts += [f"{one['normalised']['num_rows']} {name} rows also trained on" for name, one in data["overlaps"].items()]
        matches = {kind: one["num_matches"] for kind, one in data["personal"].items() if one["num_matches"]}
        parts.append("personal data: " + (", ".join(f"{count} {kind}" for kind, count in matches.items()) or "none found"))
    if (memory := found["memorisation"]) is not None:
        told = "training rows recognisable" if _recognisable(memory) else "training rows not recognisable"
        parts.append(f"{told} (AUC {memory['auc']:.2f} ± {memory['auc_error']:.2f})")
    if found["canaries"]:
        parts.append(f"{sum(map(_exposed, found['canaries']))} of {len(found['canaries'])} canaries exposed")
    return "; ".join(parts)


def _recognisable(memory: Mapping[str, Any]) -> bool:
    return bool(memory["auc"] > 0.5 + SUSPICIOUS_ERRORS * memory["auc_error"])


def _exposed(canary: Mapping[str, Any]) -> bool:
    return bool(canary["bits"] >= canary["base_bits"] + EXPOSED_BITS)


def audit_text(found: Mapping[str, Any]) -> str:
    """Return an audit as lines for a person."""
    lines = [f"adapter {found['adapter_id']}, base {found['base_id']}", *_layer_lines(found["layers"]), found["rank"]["advice"]]
    lines += (
        _data_lines(found["data"]) if found["data"] is not None else ["data: none known; the adapter comes from no job here."]
    )
    lines += _memory_lines(found["memorisation"])
    for one in found["canaries"]:
        lines.append(
            f"canary {one['where']}: in {one['num_planted']} training rows; rank {one['rank']} of {one['num_alternatives'] + 1} "
            f"({one['bits']:.1f} bits), plain base rank {one['base_rank']} ({one['base_bits']:.1f} bits)"
            + ("; exposed" if _exposed(one) else "")
        )
    return "\n".join([*lines, f"evidence {found['evidence']}"])


def _layer_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table by kind of layer; every layer stands in the evidence."""
    keys = ("module", "r", "norm", "base_norm", "spectrum", "effective_rank")
    groups = by_kind(LayerAudit(**{key: row[key] for key in keys}) for row in rows)
    lines = [f"{'layers':<20}{'number':>8}{'r':>8}{'effective':>12}{'|update|/|W|, least to most':>30}"]
    for kind, layers in groups.items():
        ratios = [layer.ratio for layer in layers if layer.ratio is not None]
        ranks = sorted({layer.r for layer in layers})
        shown = f"{min(ratios):.2e} to {max(ratios):.2e}" if ratios else "not stored plainly"
        r = "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
        effective = statistics.median(layer.effective_rank for layer in layers)
        lines.append(f"{kind:<20}{len(layers):>8}{r:>8}{effective:>12.2f}{shown:>30}")
    return lines


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    def told(what: str, repeats: Mapping[str, Any]) -> str:
        places = ", ".join(repeats["normalised"]["places"][:3])
        exact, near = (repeats[key]["num_rows"] for key in ("exact", "normalised"))
        return f"{what}: {exact} exact, {near} but for case, space and forms" + (f" ({places})" if places else "")

    lines = [f"data: {data['num_rows']} training rows", told("repeated training rows", data["duplicates"])]
    lines += [told(f"{name} rows among the training rows", one) for name, one in data["overlaps"].items()]
    if (labels := data["labels"]) is not None:
        counts = ", ".join(f"{label} {count}" for label, count in labels["counts"].items())
        lines.append(f"labels: {counts}; evenness {labels['entropy']:.2f} of 1")
        lines.append(f"texts with two labels: {labels['contradictions']['num_rows']} rows")
    for kind, one in data["personal"].items():
        places = ", ".join(one["rows"]["places"][:3])
        lines.append(
            f"personal data, {kind}: {one['num_matches']} in {one['rows']['num_rows']} rows" + (f" ({places})" if places else "")
        )
    return lines


def _memory_lines(memory: Mapping[str, Any] | None) -> list[str]:
    if memory is None:
        return ["memorisation: not measured; it takes training rows, held-out rows and --rows above 0."]
    return [
        f"memorisation: loss of {memory['num_train']} training rows {float(memory['base_train_loss']):.4f} -> "
        f"{float(memory['train_loss']):.4f}, of {memory['num_held_out']} held-out rows "
        f"{float(memory['base_held_out_loss']):.4f} -> {float(memory['held_out_loss']):.4f}; a training row gained more in "
        f"{memory['auc']:.0%} of pairs (by chance 50% ± {memory['auc_error']:.0%})"
    ]
