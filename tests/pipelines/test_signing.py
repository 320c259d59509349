"""Where an adapter comes from is told in the same bytes every time, and only who holds the key can vouch for it."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from infra.fingerprint import id_of_json, sha256_hex
from infra.records import encode_record
from pipelines.provenance import statement_bytes
from pipelines.signing import is_signed_by
from tests.pipelines.adapters import base_id_of, put_adapter
from tests.pipelines.command_line import CommandLine
from tests.pipelines.conftest import Trained
from workers import layout
from workers.manifests import AdapterRef, find_adapter


def write_keys(folder: Path, name: str = "key", curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a new private key and its public one."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def ref(cli: CommandLine, tiny_base: Path) -> AdapterRef:
    base_id = base_id_of(tiny_base)
    return AdapterRef("acme", base_id, put_adapter(cli.store, base_id, 1))


def test_statement_names_files_job_base_and_data_of_a_trained_adapter(used: CommandLine, trained: Trained) -> None:
    text = used("adapters", "provenance", trained.adapter_id).out
    assert used("adapters", "provenance", trained.adapter_id[:8]).out == text
    statement = json.loads(text)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    [folder] = trained.folder.glob(f".lorafleet/store/tenants/acme/*/adapters/{trained.adapter_id}")
    assert {one["name"]: one["digest"]["sha256"] for one in statement["subject"]} == {
        path.name: sha256_hex(path.read_bytes()) for path in folder.iterdir()
    }
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["job_id"] == trained.job_id
    assert definition["externalParameters"]["spec"]["training"]["max_steps"] == 4
    assert definition["internalParameters"]["base_id"] == trained.base_id
    named = {one["name"]: one["digest"]["lorafleet"] for one in definition["resolvedDependencies"]}
    assert named.keys() == {"base", "data/train", "data/validation"}
    assert named["base"] == trained.base_id
    assert statement["predicate"]["runDetails"]["builder"]["version"].keys() >= {"lorafleet", "torch", "peft", "python"}


def test_statement_is_one_that_the_in_toto_library_accepts(used: CommandLine, trained: Trained, tmp_path: Path) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement import Statement

    out = tmp_path / "statement.json"
    assert used("adapters", "provenance", trained.adapter_id, "--out", out).code == 0
    statement = Statement([], "", {})
    statement.pb = json_format.Parse(out.read_bytes(), statement.pb)
    statement.validate()
    assert used("adapters", "provenance", trained.adapter_id, "--out", tmp_path / "no" / "x").code == 2


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_signed_adapter_verifies_with_the_public_key_and_no_other(
    cli: CommandLine, ref: AdapterRef, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    (private, public), (_, other) = write_keys(tmp_path, curve=curve), write_keys(tmp_path, "other")
    assert not is_signed_by(cli.store, ref, public)
    first = cli("adapters", "sign", ref.adapter_id, "--key", private, "--json").json
    assert first["created"]
    assert cli("adapters", "sign", ref.adapter_id, "--key", private, "--json").json == first | {"created": False}
    assert is_signed_by(cli.store, ref, public)
    assert not is_signed_by(cli.store, ref, other)
    assert cli("adapters", "verify-signature", ref.adapter_id, "--public-key", public).code == 0
    refused = cli("adapters", "verify-signature", ref.adapter_id, "--public-key", other)
    assert refused.code == 3
    assert "by other keys only" in refused.sentence
    assert find_adapter(cli.store, "acme", ref.adapter_id) == ref, "evidence is no adapter"


def test_unsigned_adapter_is_told_with_the_way_out(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    ended = cli("adapters", "verify-signature", ref.adapter_id, "--public-key", public)
    assert ended.code == 3
    assert "it bears no signature; sign it with: lorafleet adapters sign" in ended.sentence


def signature_of(cli: CommandLine, ref: AdapterRef) -> tuple[str, dict[str, Any]]:
    [info] = cli.store.list(layout.evidence_of(ref.tenant, ref.adapter_id))
    return info.key, json.loads(cli.store.get(info.key)[0])


def store_signature(cli: CommandLine, ref: AdapterRef, body: dict[str, Any]) -> None:
    content = {key: value for key, value in body.items() if key != "format"}
    cli.store.put(layout.evidence(ref.tenant, ref.adapter_id, id_of_json(content)), encode_record(body["format"], content))


def test_signature_of_one_adapter_is_none_of_another(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    cli("adapters", "sign", ref.adapter_id, "--key", private)
    _, body = signature_of(cli, ref)
    for other in (
        AdapterRef("acme", ref.base_id, put_adapter(cli.store, ref.base_id, 2)),
        AdapterRef("globex", ref.base_id, put_adapter(cli.store, ref.base_id, 1, tenant="globex")),
    ):
        store_signature(cli, other, body)
        assert not is_signed_by(cli.store, other, public)
        moved = body | {"statement": statement_bytes(cli.store, other).decode()}
        store_signature(cli, other, moved)
        assert not is_signed_by(cli.store, other, public), "a statement that was not signed"
    assert is_signed_by(cli.store, ref, public)


@pytest.mark.parametrize("what", ["payload", "signature", "key", "nothing"])
def test_forged_bundles_do_not_verify(cli: CommandLine, ref: AdapterRef, tmp_path: Path, what: str) -> None:
    (private, public), (forger, _) = write_keys(tmp_path), write_keys(tmp_path, "forger")
    cli("adapters", "sign", ref.adapter_id, "--key", forger if what == "key" else private)
    key, body = signature_of(cli, ref)
    envelope = body["bundle"]["dsseEnvelope"]
    if what == "payload":
        envelope["payload"] = base64.b64encode(base64.b64decode(envelope["payload"]) + b" ").decode()
    elif what == "signature":
        raw = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
        raw[-1] ^= 1
        envelope["signatures"][0]["sig"] = base64.b64encode(bytes(raw)).decode()
    elif what == "key":
        body["key_id"] = body["bundle"]["verificationMaterial"]["publicKey"]["hint"] = sha256_hex(public.read_bytes())
    cli.store.delete(key)
    store_signature(cli, ref, body)
    assert is_signed_by(cli.store, ref, public) == (what == "nothing")


def test_changed_files_are_found_before_any_signature_counts(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    cli("adapters", "sign", ref.adapter_id, "--key", private)
    weights = cli.store.root / layout.adapter(*ref) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    shutil.rmtree(cli.store.root / ".~lorafleet")
    ended = cli("adapters", "verify-signature", ref.adapter_id, "--public-key", public)
    assert ended.code == 2
    assert "is damaged" in ended.sentence


def test_the_tool_of_model_signing_itself_accepts_the_signature(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    cli("adapters", "sign", ref.adapter_id, "--key", private)
    _, body = signature_of(cli, ref)
    folder = tmp_path / "signed"
    shutil.copytree(cli.store.root / layout.adapter(*ref), folder)
    (folder / "provenance.json").write_text(body["statement"])
    (tmp_path / "bundle.json").write_text(json.dumps(body["bundle"]))
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        "--signature",
        "bundle.json",
        "--public_key",
        public.name,
        folder,
    ]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_keys_that_cannot_be_used_are_one_sentence(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = (Encoding.PEM, PrivateFormat.PKCS8)
    files = {
        "encrypted": key.private_bytes(*pem, BestAvailableEncryption(b"secret")),
        "damaged": key.private_bytes(*pem, NoEncryption())[:-60],
        "rsa": rsa_key.private_bytes(*pem, NoEncryption()),
        "curve": ec.generate_private_key(ec.SECP256K1()).private_bytes(*pem, NoEncryption()),
    }
    words = {
        "encrypted": "is encrypted; decrypt it",
        "damaged": "holds no private key",
        "rsa": "of another kind",
        "curve": "of another kind",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        ended = cli("adapters", "sign", ref.adapter_id, "--key", tmp_path / name)
        assert ended.code == 2
        assert words[name] in ended.sentence
    assert "cannot be read" in cli("adapters", "sign", ref.adapter_id, "--key", "none.pem").sentence
    assert "holds no public key" in cli("adapters", "verify-signature", ref.adapter_id, "--public-key", tmp_path / "rsa").sentence
    assert list(cli.store.list(layout.evidence_of(ref.tenant, ref.adapter_id))) == []


def test_gate_lets_none_but_signed_adapters_become_champion(cli: CommandLine, ref: AdapterRef, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    gates = tmp_path / "gates.yaml"
    gates.write_text(f"- {{kind: signed_by, public_key: {public.name}}}\n")
    refused = cli("promote", ref.adapter_id, "--gates", gates)
    assert refused.code == 3
    assert f"is not signed with the key of {public.name}" in refused.sentence
    assert cli("history", "acme.support").code == 2
    cli("adapters", "sign", ref.adapter_id, "--key", private)
    assert cli("promote", ref.adapter_id, "--gates", gates).code == 0
    assert [entry["adapter_id"] for entry in cli("history", "acme.support", "--json").json] == [ref.adapter_id]
