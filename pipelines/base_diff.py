"""`lorafleet base diff A B`: what differs between two bases, and what that means for the adapters of A.

An adapter goes on as it is where base and prompt contract are the same. Where the layers it adapts are still there in the same
place and shape it can be loaded, and only its own rows tell whether it is still good: it needs evaluation. Where they are not,
or a token's number now means another token, it was trained for something that is no more: it needs training again.

A base is a folder, or known to the store by its id: then its files are fetched if they were uploaded; if not, only its record
is compared, which knows neither tokenizer nor tensors.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.errors import BadInput
from infra.fingerprint import id_of_json
from infra.storage import Storage
from pipelines.adapters import refuse_bad_names
from pipelines.bases import find_base_id
from pipelines.workspace import Workspace
from workers import layout
from workers.bases import materialise, read_base, read_listing
from workers.data.contract import contract_parts, has_tokenizer
from workers.identity import BaseIdentity, describe_base, diff, identify
from workers.manifests import adapter_refs, read_manifest
from workers.targets import linears_of_tensors, select_targets

Verdict = Literal["survives", "evaluate", "retrain"]
NUM_READERS = 16
MAX_TOLD = 4
PLACE_KEYS = ("model_type", "num_hidden_layers")
"""Keys of an architecture without which a layer of the same name is not the same layer."""
SHAPE_KEYS = (*PLACE_KEYS, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Keys that decide the shapes of layers, for bases whose tensors are not at hand."""
WAY_OUT = {
    "survives": "go on as they are",
    "evaluate": "load, and need evaluation on the new base",
    "retrain": "need training on the new base",
}


@dataclass(frozen=True)
class _Base:
    """One side of the comparison."""

    described: Mapping[str, Any]
    """The body of base/1."""
    identity: BaseIdentity | None
    """None where its files are not at hand."""
    prompt: Mapping[str, Any] | None
    """Parts of its prompt contract, None where it has no tokenizer or its files are not at hand."""

    @property
    def base_id(self) -> str:
        return str(self.described["base_id"])

    @property
    def architecture(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.described["architecture"]
        return found

    @property
    def contract(self) -> str | None:
        """The id of its prompt contract."""
        return None if self.prompt is None else id_of_json(self.prompt)


def base_diff(workspace: Workspace, before: str, after: str, tenant: str | None = None) -> dict[str, Any]:
    """Compare two bases, each a folder, an id or a unique prefix of one; judge the adapters of the first, of one tenant or all.

    Returns `a`, `b` (base ids), `identical`, `differences` (objects with `what` - weights, architecture, quantisation, tokenizer,
    template or unknown - and `detail`), `adapters` (each with `verdict` - survives, evaluate, retrain - and `reasons`), `counts`.
    """
    refuse_bad_names(tenant)
    a, b = _find(workspace, before), _find(workspace, after)
    differences = list(_differences(a, b))
    adapters = _judged(workspace.store, a, b, tenant)
    verdicts = [one["verdict"] for one in adapters]
    return {
        "a": a.base_id,
        "b": b.base_id,
        "identical": not differences,
        "differences": differences,
        "adapters": adapters,
        "counts": {verdict: verdicts.count(verdict) for verdict in WAY_OUT},
    }


def _find(workspace: Workspace, reference: str) -> _Base:
    path = Path(reference).expanduser()
    if path.is_dir() or "/" in reference or reference.startswith("."):
        return _of_folder(path, identify(path, _cache(workspace)))
    base_id = find_base_id(workspace.store, reference)
    if read_listing(workspace.store, base_id) is not None:
        path = materialise(base_id, None, workspace.store, workspace.services.cache_dir)
        return _of_folder(path, identify(path, workspace.services.cache_dir))
    described = read_base(workspace.store, base_id)
    if described is None:
        raise BadInput(f"the store {workspace.store.uri} has lost {layout.base(base_id)}; add the base again with its folder.")
    return _Base(described, None, None)


def _cache(workspace: Workspace) -> Path | None:
    """Looking makes no home: digests are cached where there is one already."""
    return workspace.services.cache_dir if workspace.settings.home.is_dir() else None


def _of_folder(path: Path, identity: BaseIdentity) -> _Base:
    return _Base(describe_base(identity), identity, contract_parts(path) if has_tokenizer(path) else None)


def _differences(a: _Base, b: _Base) -> Iterator[dict[str, str]]:
    for line in diff(a.described, b.described):
        if line == "weights":
            yield {"what": "weights", "detail": _weights(a, b)}
        else:
            yield {"what": "quantisation" if line.startswith("quantization_config") else "architecture", "detail": line}
    if a.prompt is None or b.prompt is None:
        if a.prompt is not b.prompt or a.identity is None or b.identity is None:
            whose = " and ".join(base.base_id for base in (a, b) if base.prompt is None)
            yield {"what": "unknown", "detail": f"tokenizer and template of {whose} are not at hand; name the base's folder"}
        return
    changed = [part for part in a.prompt if part != "chat_template" and a.prompt[part] != b.prompt.get(part)]
    if changed:
        kept = "tokens keep their numbers" if _keeps_tokens(a, b) else "tokens have other numbers"
        yield {"what": "tokenizer", "detail": f"{', '.join(changed)} ({kept})"}
    if a.prompt["chat_template"] != b.prompt["chat_template"]:
        yield {"what": "template", "detail": "the chat template renders conversations in another way"}


def _weights(a: _Base, b: _Base) -> str:
    """Say how many tensors differ, where both are at hand."""
    if a.identity is None or b.identity is None:
        return "the tensors have another digest"
    one = {tensor.name: tensor for tensor in a.identity.tensors}
    other = {tensor.name: tensor for tensor in b.identity.tensors}
    shared = one.keys() & other.keys()
    changed = sorted(name for name in shared if one[name] != other[name])
    reshaped = [name for name in changed if one[name].shape != other[name].shape]
    told = [f"{len(changed)} of {len(shared)} shared tensors differ"] if changed else []
    told += [f"{len(reshaped)} in shape ({', '.join(reshaped[:MAX_TOLD])})"] if reshaped else []
    told += [f"{len(one) - len(shared)} only in A"] if len(one) > len(shared) else []
    told += [f"{len(other) - len(shared)} only in B"] if len(other) > len(shared) else []
    return ", ".join(told)


def _keeps_tokens(a: _Base, b: _Base) -> bool | None:
    """Tell whether every token of A has its number in B; None where the vocabularies cannot be read."""
    before, after = _vocabulary(a), _vocabulary(b)
    if before is None or after is None:
        same = a.prompt is not None and b.prompt is not None and a.prompt["tokenizer"] == b.prompt["tokenizer"]
        return True if same else None
    return all(after.get(token) == number for token, number in before.items())


def _vocabulary(base: _Base) -> dict[str, int] | None:
    """Return number by token: the model's vocabulary and the tokens added to it."""
    tokenizer = base.prompt["tokenizer"] if base.prompt is not None else None
    vocabulary = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, by number
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, Mapping):
        return None
    return {**vocabulary, **{one["content"]: one["id"] for one in (tokenizer or {}).get("added_tokens") or []}}


def _judged(store: Storage, a: _Base, b: _Base, tenant: str | None) -> list[dict[str, Any]]:
    refs = [ref for ref in adapter_refs(store, tenant) if ref.base_id == a.base_id]
    with ThreadPoolExecutor(NUM_READERS) as readers:
        manifests = list(readers.map(lambda ref: read_manifest(store, ref), refs))
    return [_judge(manifest, a, b) for manifest in manifests]


def _judge(manifest: Mapping[str, Any], a: _Base, b: _Base) -> dict[str, Any]:
    """Return what becomes of one adapter, and why."""
    retrain = list(_reasons_to_retrain(manifest, a, b))
    evaluate = list(_reasons_to_evaluate(manifest, a, b))
    verdict: Verdict = "retrain" if retrain else "evaluate" if evaluate else "survives"
    return {
        "adapter_id": manifest["adapter_id"],
        "tenant": manifest["tenant"],
        "task": manifest.get("task"),
        "verdict": verdict,
        "reasons": retrain or evaluate or ["the same base, tokenizer and template"],
    }


def _reasons_to_retrain(manifest: Mapping[str, Any], a: _Base, b: _Base) -> Iterator[str]:
    if a.base_id != b.base_id:
        yield from _moved_layers(manifest, a, b)
    keeps = _keeps_tokens(a, b)
    if keeps is False:
        yield "tokens have other numbers, so it would read and write other words"
    elif keeps is None and a.architecture.get("vocab_size") != b.architecture.get("vocab_size"):
        yield f"the vocabulary has {b.architecture.get('vocab_size')} tokens instead of {a.architecture.get('vocab_size')}"


def _moved_layers(manifest: Mapping[str, Any], a: _Base, b: _Base) -> Iterator[str]:
    for key in PLACE_KEYS:
        if a.architecture.get(key) != b.architecture.get(key):
            yield f"{key} is {b.architecture.get(key)} instead of {a.architecture.get(key)}, so its layers stand elsewhere"
    if a.identity is None or b.identity is None:
        changed = [key for key in SHAPE_KEYS if key not in PLACE_KEYS and a.architecture.get(key) != b.architecture.get(key)]
        if changed:
            yield f"layers have other shapes ({', '.join(changed)})"
        return
    here, there = linears_of_tensors(a.identity.shapes), linears_of_tensors(b.identity.shapes)
    adapted = select_targets(manifest["peft"]["target_modules"], list(here))
    lost = [name for name in adapted if name not in there]
    reshaped = [name for name in adapted if name in there and there[name] != here[name]]
    if lost:
        yield f"{len(lost)} of its {len(adapted)} layers are not there ({lost[0]})"
    if reshaped:
        name = reshaped[0]
        yield f"{len(reshaped)} of its {len(adapted)} layers have another shape ({name}: {there[name]} instead of {here[name]})"


def _reasons_to_evaluate(manifest: Mapping[str, Any], a: _Base, b: _Base) -> Iterator[str]:
    for line in diff(a.described, b.described):
        yield (
            f"the same shapes with other weights ({_weights(a, b)})"
            if line == "weights"
            else f"the base computes otherwise: {line}"
        )
    if b.contract is None:
        yield "tokenizer and template of the new base are not at hand"
    elif manifest.get("prompt_contract") != b.contract:
        yield f"it was trained with another {_prompt_parts(a, b)}, so its prompts are written otherwise"


def _prompt_parts(a: _Base, b: _Base) -> str:
    if a.prompt is None or b.prompt is None:
        return "tokenizer or template"
    parts = ["tokenizer"] if any(a.prompt[part] != b.prompt.get(part) for part in a.prompt if part != "chat_template") else []
    parts += ["template"] if a.prompt["chat_template"] != b.prompt["chat_template"] else []
    return " and ".join(parts) or "tokenizer or template"


def diff_text(result: Mapping[str, Any]) -> str:
    """Return a comparison as lines for a person."""
    lines = [f"A  {result['a']}", f"B  {result['b']}"]
    lines += [f"  {one['what']:<13}{one['detail']}" for one in result["differences"]] or ["  nothing differs"]
    for verdict, meaning in WAY_OUT.items():
        found = [one for one in result["adapters"] if one["verdict"] == verdict]
        if found:
            lines.append(f"adapters that {meaning}: {len(found)}")
            lines += [
                f"  {one['adapter_id']}  {one['tenant']}.{one['task'] or '-'}  {'; '.join(one['reasons'])}" for one in found
            ]
    return "\n".join(lines if result["adapters"] else [*lines, "A has no adapters in this store."])
