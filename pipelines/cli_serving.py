"""Commands about what leaves the registry or proves where it came from: export, provenance, signatures, base upgrades."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_common import (
    JsonOption,
    TenantOption,
    adapters_app,
    announced,
    base_app,
    load,
    print_json,
    print_text,
    reading,
)

AdapterArgument = Annotated[str, typer.Argument(help="Id, unique prefix, or <tenant>.<task>@<alias>.")]


@adapters_app.command("export")
def adapters_export(
    adapter: AdapterArgument,
    consumer: Annotated[str, typer.Option("--for", help="peft, vllm, sglang, lorax, ray-llm, llama-cpp or merged.")],
    to: Annotated[str, typer.Option(metavar="DIR|s3://BUCKET/PREFIX", help="Where its folder is made.")],
    base_string: Annotated[
        str | None, typer.Option(help="What the server calls its model, letter by letter; vLLM and LoRAX need it.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; refused if it is not the adapter's.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The highest rank the server is started for.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in the form a serving engine reads right, with a proof of what it computes there."""
    pipeline = load("pipelines.export")
    result = pipeline.export(announced(), adapter, consumer, to, base_string=base_string, base=base, max_rank=max_rank)
    print_json(result) if as_json else print_text(pipeline.export_text(result))


@adapters_app.command("provenance")
def adapters_provenance(
    adapter: AdapterArgument,
    out: Annotated[Path | None, typer.Option(help="File to write the statement to; default: print it.")] = None,
) -> None:
    """Say what an adapter was made of, as an in-toto statement with SLSA provenance; the same bytes every time."""
    pipeline = load("pipelines.provenance")
    text = pipeline.provenance(reading(), adapter)
    if out is None:
        print_text(text.decode().rstrip("\n"))
    else:
        pipeline.write_statement(out, text)
        print_text(str(out))


@adapters_app.command("sign")
def adapters_sign(
    adapter: AdapterArgument,
    key: Annotated[Path, typer.Option(help="Private key: PEM, elliptic curve P-256, P-384 or P-521, not encrypted.")],
    as_json: JsonOption = False,
) -> None:
    """Sign an adapter's files and its provenance; the signature is kept in the store beside the adapter."""
    pipeline = load("pipelines.signing")
    result = pipeline.sign(announced(), adapter, key)
    print_json(result) if as_json else print_text(pipeline.signed_text(result))


@adapters_app.command("verify-signature")
def adapters_verify_signature(
    adapter: AdapterArgument,
    public_key: Annotated[Path, typer.Option(help="Public key: PEM.")],
    as_json: JsonOption = False,
) -> None:
    """Check that the owner of a key signed an adapter as it is now. Exit code 3 if not."""
    pipeline = load("pipelines.signing")
    result = pipeline.verify_signature(reading(), adapter, public_key)
    print_json(result) if as_json else print_text(pipeline.verified_text(result))


@base_app.command("diff")
def base_diff(
    before: Annotated[str, typer.Argument(metavar="A", help="The base as it is: a folder, an id or its unique prefix.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The base as it would be.")],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two bases, and which adapters of A go on with B, need evaluation, or need training again."""
    pipeline = load("pipelines.base_diff")
    result = pipeline.base_diff(reading(), before, after, tenant)
    print_json(result) if as_json else print_text(pipeline.diff_text(result))
