"""What is done to a customer's rows before they are trained on: read leniently, cleaned, parted, counted, compared, judged.

Rows are put aside one by one; a customer is held as a whole where its data cannot be what was meant, and skipped where too
little came. Nothing here depends on other customers, and nothing is written but, on demand, the list of bad rows.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from infra.errors import BadInput, ConditionFailed, ObjectNotFound, WorkFailed
from infra.fingerprint import id_of_bytes
from infra.storage import Storage
from pipelines.nightly import records
from pipelines.nightly.drift import NOTABLE, drift, length_of
from pipelines.nightly.holding import Customer, Reason, hold, skip, unusable
from pipelines.nightly.holdout import Files, Known, Parted, known, part
from workers import layout
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.data.sifting import Quarantine, SiftedRows, printable, sift_source
from workers.data.sources import OpenUri
from workers.data.splits import Splits
from workers.spec import JobSpec

RendererOf = Callable[[JobSpec, Sequence[str]], Renderer]
"""(job, labels of a classifier) -> what renders its rows, as `workers.resolve.Resolver.renderer`."""
NUM_SHOWN = 20
"""Bad rows that a page shows."""
_MAX_LABELS = 100


@dataclass(frozen=True)
class Cared:
    """A customer's rows as they may be trained on, and what was found in them."""

    train: list[Row]
    """Each list is sorted by the rows' hashes, so it is a function of the set of rows."""
    validation: list[Row] | None
    holdout: list[Row]
    """Rows that are never trained on; test rows of the source's own, if it has some."""
    care: records.Care
    digest: str
    """Of all good rows and their use, whatever their order."""
    labels: tuple[str, ...]
    """Of the training rows, sorted; empty unless the job is a classifier's."""
    hold: Reason | None
    skip: Reason | None
    """What the data alone says; another recipe, base or gates is a reason to train all the same. None if held."""
    quarantine: tuple[tuple[str, str], ...]
    """(file:line, what is wrong) of bad rows, up to workers.data.sifting.MAX_LISTED."""
    num_tokens: int
    """Of the training rows, as rendered; 0 if they were not."""

    @property
    def splits(self) -> Splits:
        """The rows as `Resolver.resolve_rows` takes them."""
        return Splits(self.train, self.validation, self.holdout or None, list(self.care.notes))

    def num_gone(self, rows: Sequence[Row]) -> int:
        """Count those of `rows`, on which some adapter was trained, that are not trained on any more.

        With any, training may not continue from that adapter: it would keep what was deleted.
        """
        return len(_digests(rows) - _digests(self.train))


def look_after(
    customer: Customer,
    renderer_of: RendererOf | None,
    last: records.Row | None,
    load_last_rows: Callable[[], list[Row]],
    open_store: OpenUri,
    now: float | None = None,
) -> Cared:
    """Read and clean a customer's rows and compare them with those trained on last.

    Args:
        customer: Whose rows.
        renderer_of: Renders rows as training will, so that what cannot be trained on is put aside; None leaves that out.
        last: How the customer's last night ended; None for a new one.
        load_last_rows: Gives the rows of `last.train_digest`; called only if there are any.
        open_store: Opens an s3:// URI.
        now: Seconds since the epoch; None: this moment.

    Raises:
        ServiceUnavailable: a store did not answer. Whatever is wrong with the data is a value.
    """
    quarantine = Quarantine()
    sifted = sift_source(customer.job.data, customer.folder, quarantine, open_store)
    parted = part(Files(sifted.train, sifted.validation, sifted.test), customer.holdout, customer.job.data.validation_split)
    trouble = unusable(customer.job, _rows(parted.train), quarantine.unread)
    used, notes = _Use(customer.job, renderer_of if trouble is None else None, quarantine).of(parted)
    trouble = trouble or used.trouble
    past = _past(last, load_last_rows, notes)
    care = _care(sifted, used, quarantine, past, last, notes)
    held = trouble or hold(customer, care, _rows(used.train), len(used.holdout))
    has_past = held is None and past is not None
    skipped = skip(customer, care, last, time.time() if now is None else now) if has_past else None
    return Cared(
        train=_rows(used.train),
        validation=_rows(used.validation) or None,
        holdout=_rows(used.holdout),
        care=care if held else replace(care, num_accepted=care.num_read),
        digest=_digest(used),
        labels=used.labels,
        hold=held,
        skip=skipped,
        quarantine=tuple(quarantine.entries),
        num_tokens=used.num_tokens,
    )


def save_quarantine(store: Storage, tenant: str, cared: Cared) -> str | None:
    """Keep the list of bad rows under the tenant and return its key; None if there are none. Saving again changes nothing."""
    if not cared.quarantine:
        return None
    lines = [json.dumps({"where": where, "problem": problem}, ensure_ascii=False) for where, problem in cared.quarantine]
    data = "".join(f"{line}\n" for line in lines).encode()
    key = layout.quarantine(tenant, id_of_bytes(data))
    with contextlib.suppress(ConditionFailed):  # the key holds the digest of the content
        store.put_if_absent(key, data)
    return key


@dataclass(frozen=True)
class _Used:
    """Rows that are left once the renderer has looked at them."""

    train: list[Known]
    validation: list[Known]
    holdout: list[Known]
    labels: tuple[str, ...]
    num_tokens: int
    num_duplicates: int
    num_overlap: int
    trouble: Reason | None


_Left = tuple[list[Known], list[Known], list[Known], tuple[str, ...], int]
"""The first fields of `_Used`."""


@dataclass(frozen=True)
class _Use:
    """Takes out the rows that the job's renderer refuses, and held-out rows whose label nobody could have learned."""

    job: JobSpec
    renderer_of: RendererOf | None
    quarantine: Quarantine

    def of(self, parted: Parted) -> tuple[_Used, list[str]]:
        """Return what is left, and sentences about what was left out."""
        notes: list[str] = []
        counts = (parted.num_duplicates, parted.num_overlap)
        try:
            used = self._labelled(parted, notes) if self.job.task_type == "SEQ_CLS" else self._written(parted)
        except BadInput as error:  # of the base or the job, whatever the row
            trouble = Reason("not_rendered", printable(str(error)), "Correct the base or the job of this customer.")
            return _Used(parted.train, parted.validation, parted.holdout, (), 0, *counts, trouble), notes
        return _Used(*used, *counts, None), notes

    def _written(self, parted: Parted) -> _Left:
        # All at once: a template that does not end is given up once for a customer, not once for each use of its rows.
        tokens = self._num_tokens([*parted.train, *parted.validation, *parted.holdout], ())
        train = _among(parted.train, tokens)
        num_tokens = sum(tokens[one] for one in train)
        return train, _among(parted.validation, tokens), _among(parted.holdout, tokens), (), num_tokens

    def _labelled(self, parted: Parted, notes: list[str]) -> _Left:
        tokens = self._num_tokens(parted.train, _labels(parted.train))
        train = _among(parted.train, tokens)
        labels = _labels(train)
        validation, holdout = (
            [one for one in rows if one.row.body.get("label") in labels] for rows in (parted.validation, parted.holdout)
        )
        if num_left_out := len(parted.validation) + len(parted.holdout) - len(validation) - len(holdout):
            notes.append(f"{num_left_out} held-out rows bear labels that no training row has; they are left out.")
        others = self._num_tokens([*validation, *holdout], labels)
        return train, _among(validation, others), _among(holdout, others), labels, sum(tokens.values())

    def _num_tokens(self, rows: list[Known], labels: tuple[str, ...]) -> dict[Known, int]:
        """Return the tokens of each row that can be rendered, and put the others aside."""
        if self.renderer_of is None or not rows or (self.job.task_type == "SEQ_CLS" and not labels):
            return dict.fromkeys(rows, 0)
        tokens: dict[Known, int] = {}
        for one, example in zip(rows, self.renderer_of(self.job, labels).render_each(_rows(rows)), strict=True):
            if isinstance(example, str):
                self.quarantine.add(one.row.where, example)
            else:
                tokens[one] = len(example.input_ids)
        return tokens


def _among(rows: list[Known], tokens: Mapping[Known, int]) -> list[Known]:
    return [one for one in rows if one in tokens]


def _labels(rows: Sequence[Known]) -> tuple[str, ...]:
    return tuple(sorted({str(one.row.body["label"]) for one in rows if "label" in one.row.body}))


def _past(last: records.Row | None, load_last_rows: Callable[[], list[Row]], notes: list[str]) -> list[Known] | None:
    """Return the rows trained on last, sorted by digest; None if there are none."""
    if last is None or last.train_digest is None:
        return None
    try:
        return sorted(map(known, load_last_rows()), key=lambda one: one.digest)
    except (ObjectNotFound, WorkFailed) as error:
        notes.append(printable(f"The rows trained on last cannot be compared with: {error}"))
        return None


def _care(
    sifted: SiftedRows,
    used: _Used,
    quarantine: Quarantine,
    past: list[Known] | None,
    last: records.Row | None,
    notes: list[str],
) -> records.Care:
    now, before = {one.digest for one in used.train}, {one.digest for one in past or []}
    good = used.train + used.validation + used.holdout
    lengths = sorted(length_of(one.row) for one in good)
    moved = drift(_rows(used.train), _rows(past or []))
    notes = [*sifted.notes, *notes, *_drift_notes(moved)]
    return records.Care(
        num_read=len(good),
        num_accepted=(last.care.num_accepted if last is not None else 0) or len(before),
        num_quarantined=quarantine.num_rows,
        num_duplicates=used.num_duplicates,
        num_overlap=used.num_overlap,
        num_new=len(now - before),
        num_deleted=len(before - now),
        mean_characters=round(sum(lengths) / len(lengths), 1) if lengths else 0.0,
        p95_characters=float(lengths[(len(lengths) - 1) * 95 // 100]) if lengths else 0.0,
        labels=_label_counts(used.train),
        drift=round(max(moved.values()), 4) if moved else None,
        quarantine=tuple(quarantine.entries[:NUM_SHOWN]),
        notes=tuple(notes),
    )


def _drift_notes(moved: Mapping[str, float]) -> list[str]:
    far = [f"{name} {value:.2f}" for name, value in moved.items() if value > NOTABLE]
    return (
        [f"The rows have moved away from those trained on last (0 alike, 1 nothing in common): {', '.join(far)}."] if far else []
    )


def _label_counts(rows: Sequence[Known]) -> dict[str, int]:
    counts = Counter(printable(str(one.row.body["label"]))[:60] for one in rows if "label" in one.row.body)
    return dict(counts.most_common(_MAX_LABELS))


def _digest(used: _Used) -> str:
    uses = {"train": used.train, "validation": used.validation, "holdout": used.holdout}
    lines = sorted(f"{name} {one.digest.hex()}\n" for name, rows in uses.items() for one in rows)
    return id_of_bytes(b"night-data/1\n" + "".join(lines).encode())


def _digests(rows: Sequence[Row]) -> set[bytes]:
    return {known(row).digest for row in rows}


def _rows(known_rows: Sequence[Known]) -> list[Row]:
    return [one.row for one in known_rows]
