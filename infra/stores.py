"""Opening a store by its name, and asking it whether it keeps its promises before anything relies on them.

boto3 is loaded when the first s3:// store is opened, not before.
"""

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.errors import BadInput, ConditionFailed, ServiceUnavailable
from infra.local_storage import LocalStorage
from infra.storage import ObjectInfo, Storage


def open_store(uri: str, *, endpoint_url: str | None = None) -> Storage:
    """Return the store at `uri`: a path, `file:///path` or `s3://bucket/prefix`.

    Args:
        uri: As in the settings. A relative path is taken from the current folder.
        endpoint_url: Of an S3 server that is not AWS; None reads AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL.

    Raises:
        BadInput: the name is of no known kind, or a file lies where the folder should be.
        ServiceUnavailable: the folder may not be read.
    """
    if uri.startswith("s3://"):
        from infra.s3 import S3Storage

        return S3Storage(uri, endpoint_url=endpoint_url)
    root = _folder(uri)
    try:
        is_no_folder = root.exists() and not root.is_dir()
    except PermissionError:
        raise ServiceUnavailable(f"no permission to look at the store {root}; grant it, or name another place.") from None
    if is_no_folder:
        raise BadInput(f"the store {root} is a file; name a folder, which may be missing yet.")
    store = LocalStorage(root)
    store.remove_stale_temporaries()
    return store


def probe(store: Storage) -> None:
    """Check that `store` refuses what it must; raise ServiceUnavailable, in one sentence, if it does not.

    Puts one small object under `probes/`, tries to overwrite it with conditions that do not hold, and removes it.
    """
    key = f"probes/{uuid.uuid4().hex}"
    try:
        _check_conditions(store, key)
    finally:
        with contextlib.suppress(ServiceUnavailable):  # the reason why the probe failed, if any, is on its way already
            store.delete(key)


def _check_conditions(store: Storage, key: str) -> None:
    first = store.put_if_absent(key, b"first")
    if _accepts(lambda: store.put_if_absent(key, b"rival")):
        raise _unfit(store, "ignores If-None-Match")
    try:
        store.compare_and_put(key, b"second", first.etag)
    except ConditionFailed:
        raise _unfit(store, "refuses If-Match with the right etag") from None
    if _accepts(lambda: store.compare_and_put(key, b"rival", first.etag)):
        raise _unfit(store, "ignores If-Match")
    content, info = store.get(key)
    if content != b"second":
        raise _unfit(store, "does not return what was written last")
    if (store.head(key) or info).sha256 is None:
        raise _unfit(store, "does not keep the SHA-256 stored with an object")


def _accepts(put: Callable[[], ObjectInfo]) -> bool:
    try:
        put()
    except ConditionFailed:
        return False
    return True


def _unfit(store: Storage, defect: str) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"the store {store.uri} {defect}; lorafleet cannot claim or promote on it; use a local folder, AWS S3, "
        "or a server with conditional writes."
    )


def _folder(uri: str) -> Path:
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    if "://" in uri:
        raise BadInput(f"the store {uri.partition('://')[0]}://… is of no known kind; expected a path, file:// or s3://.")
    if not uri:
        raise BadInput("the store has no name; expected a path, file:// or s3://.")
    return Path(uri).expanduser().absolute()
