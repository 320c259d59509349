"""`lorafleet adapters sign|verify-signature`: who vouches for an adapter, by OpenSSF model-signing with keys that lie offline.

What is signed is a folder of three files: the adapter's two and its provenance statement, so that a signature binds bytes, base,
data and job together. The signature (a Sigstore bundle) and the statement are kept as one evidence object of kind `signature`; a
later statement that says more does not make an older signature void. Of model-signing only the elliptic-curve signer is used:
no certificates, no transparency log, no network.
"""

import base64
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from infra.errors import BadInput, ConditionFailed, GateRejected, ObjectNotFound, WorkFailed
from infra.fingerprint import id_of_json, sha256_hex
from infra.records import decode_record, encode_record
from infra.storage import Storage
from pipelines.evidence import EVIDENCE_FORMAT
from pipelines.provenance import statement_bytes
from pipelines.references import find_reference
from pipelines.workspace import Workspace
from workers import layout
from workers.manifests import AdapterRef, read_manifest

KIND = "signature"
STATEMENT_NAME = "provenance.json"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""What model-signing 1.1 takes: P-256, P-384, P-521."""
_MAKE_ONE = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
_MAKE_PUBLIC = "make it with: openssl ec -in key.pem -pubout -out pub.pem"


def sign(workspace: Workspace, reference: str, key: Path) -> dict[str, Any]:
    """Sign an adapter's files and provenance with a private key; keep the signature in the store. May be repeated.

    Returns `adapter_id`, `base_id`, `tenant`, `key_id` (SHA-256 of the public key's PEM), `signature` (the store's key) and
    `created` (False if this key's signature was there). Raises BadInput for a key that cannot be used, or a damaged adapter.
    """
    signing = _model_signing()
    public_pem = _public_pem(_private_key(key))
    ref = find_reference(workspace.store, reference)
    files = _files(workspace.store, ref)
    result = {**ref._asdict(), "key_id": sha256_hex(public_pem)}
    standing = _valid_signature(workspace.store, ref, files, public_pem)
    if standing is not None:
        return {**result, "signature": standing, "created": False}
    statement = statement_bytes(workspace.store, ref)
    with _folder(files, statement) as folder:
        path = folder.parent / "bundle.json"
        signing.signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, path)
        bundle = json.loads(path.read_text())
    body = {"kind": KIND, **ref._asdict(), "key_id": result["key_id"], "statement": statement.decode(), "bundle": bundle}
    signature = layout.evidence(ref.tenant, ref.adapter_id, id_of_json(body))
    try:
        workspace.store.put_if_absent(signature, encode_record(EVIDENCE_FORMAT, body))
    except ConditionFailed:
        return {**result, "signature": signature, "created": False}
    return {**result, "signature": signature, "created": True}


def verify_signature(workspace: Workspace, reference: str, public_key: Path) -> dict[str, Any]:
    """Check that the holder of a key signed an adapter as it is now; return `adapter_id`, ..., `key_id` and `signature`.

    Raises GateRejected if there is no such signature, BadInput for a key that cannot be used or a damaged adapter.
    """
    store = workspace.store
    ref = find_reference(store, reference)
    public_pem = _read_public(public_key)
    signature = _valid_signature(store, ref, _files(store, ref), public_pem)
    if signature is None:
        others = sorted({str(body.get("key_id"))[:12] for _, body in _signatures(store, ref)})
        told = f"it bears signatures by other keys only ({', '.join(others)})" if others else "it bears no signature"
        if sha256_hex(public_pem)[:12] in others:
            told = "its signature by this key does not fit its files"
        raise GateRejected(
            f"the adapter {ref.adapter_id[:12]} is not signed with the key of {public_key.name}: {told}; "
            f"sign it with: lorafleet adapters sign {ref.adapter_id[:12]} --key KEY.pem"
        )
    return {**ref._asdict(), "key_id": sha256_hex(public_pem), "signature": signature}


def is_signed_by(store: Storage, adapter: AdapterRef, public_key: Path) -> bool:
    """Tell whether the holder of a public key (a PEM file) signed the adapter as it is in the store now.

    Raises BadInput if the key cannot be used, or the adapter's files are not those of its manifest.
    """
    return _valid_signature(store, adapter, _files(store, adapter), _read_public(public_key)) is not None


def signed_text(result: Mapping[str, Any]) -> str:
    """Return the end of a signing as a line."""
    how = "signed" if result["created"] else "was signed already"
    return f"adapter {result['adapter_id']} {how} with key {result['key_id'][:12]}; {result['signature']}"


def verified_text(result: Mapping[str, Any]) -> str:
    """Return the end of a verification as a line."""
    return f"adapter {result['adapter_id']} is signed with key {result['key_id'][:12]}: its files, base, data and job."


def _model_signing() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise BadInput(
            f"signatures need the package {error.name or 'model-signing'}; install it with: pip install 'lorafleet[signing]'"
        ) from None
    return model_signing


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = _read(path, "private key")
    try:
        key = load_pem_private_key(data, None)
    except TypeError:
        raise BadInput(f"the private key {path} is encrypted; decrypt it for this command: openssl ec -in {path}.") from None
    except Exception as error:  # cryptography raises many kinds for what is no key, none of them with a common root
        raise BadInput(f"{path} holds no private key in PEM ({type(error).__name__}); {_MAKE_ONE}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise BadInput(f"the private key {path} is of another kind than elliptic curve P-256, P-384 or P-521; {_MAKE_ONE}")
    return key


def _read_public(path: Path) -> bytes:
    """Return the PEM of a public key in its one canonical form."""
    data = _read(path, "public key")
    try:
        key = load_pem_public_key(data)
    except Exception as error:  # as above
        private = "; it looks like a private key" if b"PRIVATE KEY" in data else ""
        raise BadInput(f"{path} holds no public key in PEM ({type(error).__name__}){private}; {_MAKE_PUBLIC}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise BadInput(f"the public key {path} is of another kind than elliptic curve P-256, P-384 or P-521; {_MAKE_PUBLIC}")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"the {what} {path} cannot be read ({error.strerror or error}); name a PEM file.") from None


def _files(store: Storage, ref: AdapterRef) -> dict[str, bytes]:
    """Return the adapter's files, each checked against the manifest. Raises BadInput if one is damaged or lost."""
    found = {}
    for name, known in read_manifest(store, ref)["files"].items():
        key = layout.adapter(*ref) + name
        try:
            found[name] = store.get(key)[0]
        except (ObjectNotFound, WorkFailed) as error:
            raise BadInput(f"{error}; 'lorafleet adapters verify {ref.adapter_id[:12]}' tells more.") from None
        if sha256_hex(found[name]) != known["sha256"]:
            raise BadInput(f"{key} in the store {store.uri} is damaged; restore the adapter from a copy of the store.")
    return found


def _signatures(store: Storage, ref: AdapterRef) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the signatures of an adapter by their keys; what cannot be read is none."""
    for info in store.list(layout.evidence_of(ref.tenant, ref.adapter_id)):
        try:
            body = decode_record(store.get(info.key)[0], EVIDENCE_FORMAT, info.key)
        except (BadInput, WorkFailed, ObjectNotFound):
            continue
        if body.get("kind") == KIND:
            yield info.key, body


def _valid_signature(store: Storage, ref: AdapterRef, files: Mapping[str, bytes], public_pem: bytes) -> str | None:
    """Return the key of a signature of these files, and of a statement about this very adapter, by this key; None without."""
    signing = _model_signing()
    for key, body in _signatures(store, ref):
        if body.get("key_id") == sha256_hex(public_pem) and _is_valid(signing, ref, files, body, public_pem):
            return key
    return None


def _is_valid(signing: Any, ref: AdapterRef, files: Mapping[str, bytes], body: Mapping[str, Any], public_pem: bytes) -> bool:
    statement = str(body.get("statement")).encode()
    signed = {**files, STATEMENT_NAME: statement}
    if not (_is_about(statement, ref, files) and _covers(body.get("bundle"), signed, public_pem)):
        return False
    with _folder(files, statement) as folder:
        bundle, key = folder.parent / "bundle.json", folder.parent / "key.pem"
        bundle.write_text(json.dumps(body["bundle"]))
        key.write_bytes(public_pem)
        try:
            signing.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, bundle)
        except Exception:  # a forged bundle may fail in any way: whatever does not verify is not signed
            return False
    return True


def _covers(bundle: Any, signed: Mapping[str, bytes], public_pem: bytes) -> bool:
    """Tell whether a bundle names this key, and every one of these files with its digest, as model-signing 1.x writes it.

    Asked beside the verification, which follows what a bundle says of files to ignore, and takes older forms that say less.
    """
    try:
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        resources = {one["name"]: (one["algorithm"], one["digest"]) for one in payload["predicate"]["resources"]}
    except (KeyError, TypeError, ValueError):
        return False
    expected = {name: ("sha256", sha256_hex(data)) for name, data in signed.items()}
    return bool(hint == sha256_hex(public_pem) and resources == expected)


def _is_about(statement: bytes, ref: AdapterRef, files: Mapping[str, bytes]) -> bool:
    """Tell whether a statement speaks of this adapter of this tenant on this base, and of these bytes."""
    try:
        body = json.loads(statement)
        said = body["predicate"]["buildDefinition"]["internalParameters"]
        subjects = {one["name"]: one["digest"]["sha256"] for one in body["subject"]}
    except (KeyError, TypeError, ValueError):
        return False
    return bool(
        {name: said.get(name) for name in ref._fields} == ref._asdict()
        and subjects == {name: sha256_hex(data) for name, data in files.items()}
    )


@contextmanager
def _folder(files: Mapping[str, bytes], statement: bytes) -> Iterator[Path]:
    """Yield a temporary folder with what is signed; its parent is free for the bundle."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-sign-") as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        for name, data in {**files, STATEMENT_NAME: statement}.items():
            (folder / name).write_bytes(data)
        yield folder
