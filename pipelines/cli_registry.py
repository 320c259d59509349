"""Commands about adapters, bases and registered models: look at them, take them in, measure them, move who is champion."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import BadInput, GateRejected
from pipelines.cli_common import (
    JsonOption,
    TenantOption,
    adapters_app,
    announced,
    app,
    base_app,
    load,
    print_json,
    print_notes,
    print_table,
    print_text,
    reading,
)

AdapterArgument = Annotated[str, typer.Argument(help="Id, unique prefix, or <tenant>.<task>@<alias>.")]
ModelArgument = Annotated[str, typer.Argument(metavar="TENANT.TASK", help="The registered model.")]
BaseOption = Annotated[Path | None, typer.Option(help="Folder of the base; refused if it is not the adapter's.")]
ReasonOption = Annotated[str, typer.Option(help="Why; kept in the journal.")]


@app.command()
def evaluate(
    adapters: Annotated[list[str], typer.Argument(help="Ids, unique prefixes, or <tenant>.<task>@<alias>.")],
    base: BaseOption = None,
    data: Annotated[str | None, typer.Option(help="Rows to measure on; default: the job's test or validation rows.")] = None,
    generate: Annotated[int | None, typer.Option(min=0, help="Rows to generate answers for; default: as the job.")] = None,
    forms: Annotated[
        bool, typer.Option("--forms", help="One adapter separate, hot-swapped, merged, and merged and quantised.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure adapters beside the plain base, on the base they were trained on and no other."""
    if forms:
        if generate is not None:
            raise BadInput("--forms compares losses and logits, and generates nothing; leave out --generate.")
        served = load("pipelines.forms")
        found = served.evaluate_forms(announced(), adapters, base=base, data=data)
        print_json(found) if as_json else print_text(served.forms_text(found))
        return
    pipeline = load("pipelines.evaluate")
    result = pipeline.evaluate(announced(), adapters, base=base, data=data, generate=generate)
    print_json(result) if as_json else print_text(pipeline.evaluation_text(result))


@app.command()
def generate(
    adapter: AdapterArgument,
    prompt: Annotated[str | None, typer.Option(help="What to answer; default: the rows of --data or of the job.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to answer.")] = 5,
    base: BaseOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most; default: as the job.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Let an adapter answer a prompt, or the first rows of a data set."""
    pipeline = load("pipelines.evaluate")
    answers = pipeline.generate(
        announced(), adapter, prompt=prompt, data=data, limit=rows, base=base, max_new_tokens=max_new_tokens
    )
    print_json(answers) if as_json else print_text(pipeline.answers_text(answers))


@adapters_app.command("list")
def adapters_list(
    tenant: TenantOption = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List stored adapters and what they serve."""
    pipeline = load("pipelines.adapters")
    listing = pipeline.list_adapters(reading(), tenant, task)
    empty = "no adapters in this store yet; train one with: lorafleet train job.yaml"
    if tenant or task:
        empty = "no adapters of this tenant and task; 'lorafleet adapters list' shows all."
    if as_json:
        print_json(listing.adapters)
    else:
        print_table(pipeline.COLUMNS, pipeline.rows_of(listing.adapters), empty)
    _end_listing(listing.notes)


def _end_listing(notes: list[str]) -> None:
    """What could not be read makes a list incomplete, and its exit code says so."""
    print_notes(notes)
    if notes:
        raise typer.Exit(1)


@adapters_app.command("show")
def adapters_show(adapter: AdapterArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of an adapter."""
    pipeline = load("pipelines.adapters")
    shown = pipeline.show_adapter(reading(), adapter)
    print_json(shown) if as_json else print_text(pipeline.adapter_text(shown))


@adapters_app.command("verify")
def adapters_verify(
    adapter: Annotated[list[str] | None, typer.Argument(help="Ids, unique prefixes, or <tenant>.<task>@<alias>.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All adapters in the store.")] = False,
    read_data: Annotated[bool, typer.Option("--read-data", help="With --all: every object of the store as well.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read adapters back in full: digests, id, shapes, finite numbers, their base's record. Exit code 1 if one is damaged."""
    if bool(adapter) == all_:
        raise BadInput("name the adapters to verify, or give --all.")
    if read_data and not all_:
        raise BadInput("--read-data reads the whole store; give --all with it.")
    pipeline, store = load("pipelines.verify"), reading().store
    found = pipeline.verify_all(store, read_data=read_data) if all_ else pipeline.verify(store, adapter)
    print_json(found.to_json()) if as_json else print_text(pipeline.verification_text(found))
    if not found.ok:
        raise typer.Exit(1)


@adapters_app.command("import")
def adapters_import(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder: adapter_config.json and adapter_model.safetensors.")],
    base: Annotated[Path, typer.Option(help="Folder of the base it was trained on.")],
    tenant: Annotated[str, typer.Option(help="Whose adapter it is.")],
    task: Annotated[str | None, typer.Option(help="The task it is for.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Store an adapter that was made elsewhere, if it fits the base."""
    pipeline = load("pipelines.intake")
    result = pipeline.import_adapter(announced(), folder, base, tenant, task)
    print_json(result) if as_json else print_text(pipeline.import_text(result))


@adapters_app.command("merge")
def adapters_merge(
    adapters: Annotated[list[str], typer.Argument(help="Ids, unique prefixes, or <tenant>.<task>@<alias>; two or more.")],
    method: Annotated[str, typer.Option(help="linear, ties, dare_linear, dare_ties, svd or cat.")] = "linear",
    weights: Annotated[str | None, typer.Option(help="One per adapter: 0.5,0.5; default: equal shares of 1.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of numbers that ties and dare_* keep; default 0.5.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result; default: exact, or by the method.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare_* drop.")] = 0,
    tenant: Annotated[str | None, typer.Option(help="Whose the result is, with --across-tenants.")] = None,
    task: Annotated[str | None, typer.Option(help="The task it is for; default: the parents' own, if they share one.")] = None,
    base: BaseOption = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Nats per token that it may be worse than a parent on that parent's rows; default 0.05.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Keep it although it is worse; recorded.")] = False,
    across_tenants: Annotated[bool, typer.Option("--across-tenants", help="Merge adapters of several tenants.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report how the adapters conflict.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters of one base into one, after a report of how they conflict."""
    pipeline = load("pipelines.merge")
    request = pipeline.Request(
        tuple(adapters),
        method,
        None if weights is None else pipeline.parse_weights(weights),
        density=density,
        rank=rank,
        seed=seed,
        tenant=tenant,
        task=task,
        tolerance=pipeline.DEFAULT_TOLERANCE if tolerance is None else tolerance,
        force=force,
        across_tenants=across_tenants,
    )
    if dry_run:
        result = pipeline.report(reading(), request)
        print_json(result) if as_json else print_text(pipeline.report_text(result))
    else:
        result = pipeline.merge_adapters(announced(), request, base)
        print_json(result) if as_json else print_text(pipeline.merge_text(result))


@base_app.command("add")
def base_add(
    folder: Annotated[Path, typer.Argument(help="The base's folder.")],
    upload: Annotated[bool, typer.Option("--upload", help="Store its files as well, for nodes without the folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a base known to the store."""
    pipeline = load("pipelines.bases")
    added = pipeline.add(announced(), folder, upload)
    print_json(added) if as_json else print_text(pipeline.base_text(added))


@base_app.command("list")
def base_list(as_json: JsonOption = False) -> None:
    """List the bases the store knows."""
    pipeline = load("pipelines.bases")
    found = pipeline.list_bases(reading())
    empty = "no bases in this store yet; add one with: lorafleet base add DIR"
    print_json(found) if as_json else print_table(pipeline.COLUMNS, [pipeline.row_of(base) for base in found], empty)


@base_app.command("show")
def base_show(
    base: Annotated[str, typer.Argument(metavar="DIR|BASE_ID", help="A folder, or a base's id or unique prefix.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a folder holds, or what the store knows of a base."""
    pipeline = load("pipelines.bases")
    shown = pipeline.show(reading(), base)
    print_json(shown) if as_json else print_text(pipeline.base_text(shown))


@base_app.command("verify")
def base_verify(
    base: Annotated[str, typer.Argument(metavar="BASE_ID|DIR", help="A base's id or unique prefix, or a folder.")],
    as_json: JsonOption = False,
) -> None:
    """Read a base in full, in the store or in a folder. Exit code 1 if it is damaged."""
    pipeline = load("pipelines.bases")
    result = pipeline.verify(reading(), base)
    print_json(result) if as_json else print_text(pipeline.verification_text(result))
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def promote(
    adapter: AdapterArgument,
    task: Annotated[str | None, typer.Option(help="The task; default: the one it was trained or named for.")] = None,
    tenant: TenantOption = None,
    base: BaseOption = None,
    change_base: Annotated[bool, typer.Option("--change-base", help="Let the task move to another base.")] = False,
    gates: Annotated[Path | None, typer.Option(help="File of gates; default: gates.yaml in the home, if there is one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote whatever the gates say; recorded, with the reason.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make an adapter the champion of a task, if the gates let it. Exit code 3 if one refuses."""
    load("pipelines.adapters").refuse_bad_names(tenant, task)
    workspace = _promoting()
    found = load("pipelines.gates").find_gates(gates, workspace.settings.home)
    jury: Any = load("pipelines.judging").Jury(workspace, found, base, excused=force) if found is not None else None
    try:
        outcome = load("pipelines.promote").promote(
            workspace.store,
            workspace.services.registry(),
            adapter,
            tenant=tenant,
            task=task,
            base=base,
            cache_dir=workspace.services.cache_dir,
            change_base=change_base,
            jury=jury,
            force=force,
            actor=workspace.actor,
            reason=reason,
        )
    except GateRejected:
        print_json(load("pipelines.history").rejection_json(jury.last)) if as_json else _print_verdicts(jury)
        raise
    if not as_json:
        _print_verdicts(jury)
    _print_promotion(outcome, as_json, jury)


@app.command()
def rollback(
    model: ModelArgument,
    to: Annotated[str | None, typer.Option(help="An earlier champion; default: the one before.")] = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make an earlier champion the champion again, at once."""
    tenant, task = load("pipelines.references").parse_model(model)
    workspace = _promoting()
    outcome = load("pipelines.promote").rollback(
        workspace.store, workspace.services.registry(), tenant, task, to, actor=workspace.actor, reason=reason
    )
    _print_promotion(outcome, as_json)


@app.command()
def freeze(model: ModelArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Keep the champion of a task: promotions and rollbacks are refused until it is unfrozen."""
    tenant, task = load("pipelines.references").parse_model(model)
    workspace = _promoting()
    outcome = load("pipelines.promote").freeze(workspace.store, tenant, task, actor=workspace.actor, reason=reason)
    _print_promotion(outcome, as_json)


@app.command()
def unfreeze(model: ModelArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Let promotions and rollbacks of a task happen again."""
    tenant, task = load("pipelines.references").parse_model(model)
    workspace = _promoting()
    outcome = load("pipelines.promote").unfreeze(workspace.store, tenant, task, actor=workspace.actor, reason=reason)
    _print_promotion(outcome, as_json)


def _promoting() -> Any:
    """Open the workspace of a command that writes a journal; refused on a store that ignores conditions."""
    workspace = announced()
    load("infra.stores").probe(workspace.store)
    return workspace


def _print_verdicts(jury: Any) -> None:
    if jury is not None and jury.last is not None:
        pipeline = load("pipelines.history")
        print_table(pipeline.VERDICT_COLUMNS, pipeline.rows_of_verdicts(jury.last), "There are no gates in this file.")


def _print_promotion(outcome: Any, as_json: bool, jury: Any = None) -> None:
    print_notes([outcome.note] if outcome.note else [])
    if as_json:
        print_json(load("pipelines.history").promotion_json(outcome, jury.last if jury is not None else None))
    else:
        print_text(outcome.sentence)


@app.command()
def history(
    model: ModelArgument,
    at: Annotated[
        str | None, typer.Option(help="Only who served at this time: ISO 8601; without a zone it is UTC.", metavar="TIME")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show who was champion of a task, when and why."""
    pipeline = load("pipelines.history")
    if at is not None:
        served = pipeline.served_at(reading(), model, at)
        print_json(served) if as_json else print_text(pipeline.served_text(served))
        return
    entries = pipeline.entries_of(reading(), model)
    if as_json:
        print_json(entries)
    else:
        empty = f"{model} has had no champion yet; promote an adapter with: lorafleet promote ADAPTER"
        print_table(pipeline.COLUMNS, [pipeline.row_of(entry) for entry in entries], empty)
