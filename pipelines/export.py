"""`lorafleet adapters export`: an adapter where a serving engine finds it, in the form that engine reads right.

An export is a folder `<tenant>--<task>--g<generation>` (six digits, so that no name begins another: LoRAX lists S3 by prefix),
made once and never changed: engines keep what they loaded under its name and path. Files that tell an engine that the
adapter is there come last, and behind them `export.json`, which names all others with their digests. The target is a store
of its own, a folder or S3.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ConditionFailed, ObjectNotFound
from infra.fingerprint import sha256_hex, sha256_of_file
from infra.records import decode_record, encode_record
from infra.storage import Storage
from pipelines.evaluate import Subject
from pipelines.journal import history
from pipelines.references import model_in
from pipelines.workspace import Workspace
from workers.adapter import Adapter
from workers.adapter_files import CONFIG_NAME, adapter_files
from workers.consumers import Consumer, find_consumer
from workers.export import Compatibility, Layers, compatibility, exported, layers_of, report
from workers.export_merged import rounding_of, write_merged
from workers.export_proof import prove
from workers.fitting import model_without_weights
from workers.identity import identify

EXPORT_FORMAT = "export/1"
PROOF_FORMAT = "export-proof/1"
MANIFEST_NAME, PROOF_NAME = "export.json", "proof.json"
LAST_NAMES = (PROOF_NAME, CONFIG_NAME, "config.json", MANIFEST_NAME)
"""Written in this order behind everything else: Ray Serve takes an adapter for there as soon as its configuration is."""
ID_LENGTH_IN_NAME = 12
NO_TASK = "adapter"


@dataclass(frozen=True)
class _Plan:
    """What is to be exported, decided before anything is computed."""

    subject: Subject
    consumer: Consumer
    base: Path
    layers: Layers
    compatibility: Compatibility
    base_string: str | None

    @property
    def adapter(self) -> Adapter:
        return self.subject.stored.adapter

    def content(self) -> dict[str, Any]:
        """What determines the files, and is compared with what stands at the target."""
        return {
            "consumer": self.consumer.name,
            "form": self.compatibility.form,
            "adapter_id": self.subject.stored.adapter_id,
            "base_id": self.subject.base_id,
            "tenant": self.subject.tenant,
            "base_string": self.base_string,
        }


def export(
    workspace: Workspace,
    reference: str,
    consumer_name: str,
    to: str,
    *,
    base_string: str | None = None,
    base: Path | None = None,
    max_rank: int | None = None,
) -> dict[str, Any]:
    """Write an adapter for a consumer under `to`, with a proof of what it computes there. May be repeated.

    `base_string` is what the server calls its model, `base` a folder with the adapter's base (None: where the job found it), and
    `max_rank` the highest rank the server is started for. Returns the body of export.json with `uri`, `created` (False if it
    stood there already), `proof`, and `compatibility`: one object for every consumer.

    Raises BadInput if the consumer cannot serve the adapter, or the path holds something else; WrongBase for another base;
    WorkFailed if the proof fails, in which case nothing is written.
    """
    consumer = find_consumer(consumer_name)
    _check_base_string(consumer, base_string)
    plan = _plan(Subject(workspace, reference), consumer, base, base_string, max_rank)
    target = workspace.services.open_store(to)
    name = name_of(workspace.store, reference, plan.subject.stored.manifest)
    found = _standing(target, name, plan)
    manifest, proof = (found, _read_proof(target, name)) if found is not None else _write(target, name, plan)
    all_reports = report(plan.adapter, plan.layers, max_rank)
    return {
        "name": name,
        "uri": f"{target.uri}/{name}",
        "created": found is None,
        **manifest,
        "proof": proof,
        "compatibility": [asdict(plan.compatibility if one.consumer == consumer.name else one) for one in all_reports],
    }


def _check_base_string(consumer: Consumer, base_string: str | None) -> None:
    if consumer.name == "merged" and base_string is not None:
        raise BadInput("--base-string has no effect on a merged model, which names no base; leave it out.")
    if base_string is not None and not base_string.strip():
        raise BadInput("--base-string is empty; give what the server calls its model, such as Qwen/Qwen3-0.6B.")
    if consumer.needs_base_string and base_string is None:
        raise BadInput(
            f"{consumer.title} compares base_model_name_or_path with what it was told to serve; "
            "give --base-string the server's --model (LoRAX: --model-id), letter by letter."
        )


def _plan(subject: Subject, consumer: Consumer, base: Path | None, base_string: str | None, max_rank: int | None) -> _Plan:
    adapter, path = subject.stored.adapter, subject.find_base(base)
    layers = layers_of(model_without_weights(path, "CAUSAL_LM" if adapter.head_module is None else "SEQ_CLS"))
    found = compatibility(adapter, consumer, layers, max_rank)
    if found.form == "refused":
        raise BadInput(
            f"the adapter {subject.stored.adapter_id[:12]} cannot be exported for {consumer.title}: {found.reasons[0]}."
        )
    found = replace(found, notes=(*found.notes, *_view_notes(subject, path)))
    return _Plan(subject, consumer, path, layers, found, base_string)


def _view_notes(subject: Subject, path: Path) -> Iterator[str]:
    """Yield what to know of an adapter that was trained on another view of its base than files hold."""
    quantization = subject.setting(path)[0].quantization
    if quantization is not None:
        yield (
            f"it was trained on a 4-bit view of its base ({quantization.bnb_4bit_quant_type}), and the proof is on the weights "
            "as they are stored; 'lorafleet evaluate --forms' measures what that costs"
        )


def name_of(store: Storage, reference: str, manifest: Mapping[str, Any]) -> str:
    """Return an export's name: `<tenant>--<task>--g<generation>` of one that is or was champion, else with the id's beginning."""
    named = model_in(reference)
    task = named[1] if named is not None else manifest.get("task")
    entries = history(store, manifest["tenant"], task) if task is not None else []
    generations = [entry.generation for entry in entries if entry.adapter_id == manifest["adapter_id"]]
    version = f"{generations[-1]:06d}" if generations else manifest["adapter_id"][:ID_LENGTH_IN_NAME]
    return f"{manifest['tenant']}--{task or NO_TASK}--g{version}"


def _standing(target: Storage, name: str, plan: _Plan) -> dict[str, Any] | None:
    """Return the manifest of the same export if it stands there already, whole. Raises BadInput if something else does."""
    key = f"{name}/{MANIFEST_NAME}"
    try:
        manifest = decode_record(target.get(key)[0], EXPORT_FORMAT, f"{target.uri}/{key}")
    except ObjectNotFound:
        return None
    for field, value in plan.content().items():
        if manifest.get(field) != value:
            raise BadInput(
                f"{target.uri}/{name} holds another export ({field} {manifest.get(field)!r}, now {value!r}); exports are never "
                "changed, since engines keep what they loaded from a path; give another --to."
            )
    for file, known in manifest["files"].items():
        _check_same(target, f"{name}/{file}", known["sha256"])
    return manifest


def _check_same(target: Storage, key: str, sha256: str) -> None:
    info = target.head(key)
    if info is None or (info.sha256 or sha256_hex(target.get(key)[0])) != sha256:
        state = "is missing" if info is None else "holds other content"
        raise BadInput(f"{target.uri}/{key} {state}; exports are never changed: remove the folder, or give another --to.")


def _read_proof(target: Storage, name: str) -> dict[str, Any]:
    key = f"{name}/{PROOF_NAME}"
    return decode_record(target.get(key)[0], PROOF_FORMAT, f"{target.uri}/{key}")


def _write(target: Storage, name: str, plan: _Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prove and write an export; return its manifest and its proof."""
    with _files(plan) as (folder, described):
        proof = _proof(plan, folder)
        (folder / PROOF_NAME).write_bytes(encode_record(PROOF_FORMAT, proof))
        names = sorted((path.name for path in folder.iterdir()), key=lambda one: (_place(one), one))
        files = {one: _digest(folder / one) for one in names}
        manifest = plan.content() | described | {"task": plan.subject.stored.manifest.get("task"), "files": files}
        for one in names:
            _put(target, f"{name}/{one}", folder / one, files[one]["sha256"])
        _put_manifest(target, f"{name}/{MANIFEST_NAME}", encode_record(EXPORT_FORMAT, manifest))
    return manifest, proof


def _place(file: str) -> int:
    return LAST_NAMES.index(file) + 1 if file in LAST_NAMES else 0


def _digest(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of_file(path), "size_bytes": path.stat().st_size}


@contextmanager
def _files(plan: _Plan) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Make the export's files in a temporary folder; yield it and what the manifest says of them."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-export-") as temporary:
        folder = Path(temporary)
        if plan.consumer.name == "merged":
            identity = identify(plan.base, plan.subject.workspace.services.cache_dir)
            write_merged(plan.adapter, plan.base, identity.files, folder)
            yield folder, {"merged_base_id": identify(folder).base_id}
            return
        adapter = exported(plan.adapter, plan.consumer, plan.compatibility.form, plan.layers, plan.base_string)
        for name, data in adapter_files(adapter).items():
            (folder / name).write_bytes(data)
        yield folder, {key: adapter.config[key] for key in ("r", "lora_alpha", "use_rslora", "target_modules")}


def _proof(plan: _Plan, folder: Path) -> dict[str, Any]:
    ids = {"adapter_id": plan.subject.stored.adapter_id, "base_id": plan.subject.base_id}
    if plan.adapter.head_module is not None:
        reason = "a classifier for PEFT: its tensors are those of the store, byte for byte; nothing was converted"
        return {**ids, "consumer": plan.consumer.name, "rule": reason, "float64": None, "float32": None}
    code = plan.subject.stored.manifest.get("trust_remote_code", False)
    if plan.consumer.name == "merged":
        rounding = rounding_of(plan.adapter, plan.base)
        return ids | prove(
            plan.adapter, plan.consumer, plan.base, plan.layers, merged=folder, rounding=rounding, trust_remote_code=code
        )
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return ids | prove(plan.adapter, plan.consumer, plan.base, plan.layers, files=files, trust_remote_code=code)


def _put(target: Storage, key: str, path: Path, sha256: str) -> None:
    """Store a file unless it is there already; other content under its key is left alone and refused.

    What an export that was killed left of a proof is replaced: another machine's may differ in the last digits.
    """
    if key.endswith(f"/{PROOF_NAME}") or target.head(key) is None:
        target.put(key, path)
    else:
        _check_same(target, key, sha256)


def _put_manifest(target: Storage, key: str, data: bytes) -> None:
    try:
        target.put_if_absent(key, data)
    except ConditionFailed:
        if target.get(key)[0] != data:
            raise BadInput(f"{target.uri}/{key} was written by another export meanwhile; run this one again.") from None


def export_text(result: Mapping[str, Any]) -> str:
    """Return the end of an export as lines for a person."""
    chosen = next(one for one in result["compatibility"] if one["consumer"] == result["consumer"])
    lines = [
        f"{'exported' if result['created'] else 'stands already'}: {result['uri']}",
        f"  adapter {result['adapter_id']} for {result['consumer']}, {result['form']} form",
        *(f"  why     {reason}" for reason in chosen["reasons"]),
        *(f"  note    {note}" for note in chosen["notes"]),
        *(
            [f"  base    {result['merged_base_id']} (the merged weights are a base of their own)"]
            if "merged_base_id" in result
            else []
        ),
        *(f"  proof   {line}" for line in _proof_lines(result["proof"])),
    ]
    others = ", ".join(f"{one['consumer']} {one['form']}" for one in result["compatibility"] if one is not chosen)
    return "\n".join([*lines, f"  others  {others}"])


def _proof_lines(proof: Mapping[str, Any]) -> Iterator[str]:
    if proof["float32"] is None:
        yield str(proof["rule"])
        return
    for name in ("float64", "float32"):
        if proof[name] is not None:
            difference = proof[name]
            yield (
                f"{name}: logits differ by {difference['largest_difference']:.2e} at most "
                f"({difference['share_of_largest_logit']:.1e} of the largest)"
            )
    yield f"the adapter itself moves logits by {proof['largest_effect']:.3g}; {proof['probe_tokens']} probe tokens"
    if proof["if_read_as_stored"]:
        yield f"served as it is stored, logits would be off by {proof['if_read_as_stored']:.3g}"
