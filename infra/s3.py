"""A bucket, or a prefix in one, as a store: the only module that knows boto3.

Requests are sent once by botocore and repeated here, because a conditional put whose answer was lost must be read
back and not merely sent again: a 412 may then be the echo of its own success. Only managed transfers of large files, which
carry no condition, are repeated by botocore, part by part.

Every object carries its SHA-256 as metadata, checked on every read, also where the server keeps no checksums; a put in one
request sends it as `x-amz-checksum-sha256` too, for servers that compare. Checksums that botocore would add on its own
are off: several S3 servers reject them or store them as content.
"""

import base64
import email.utils
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore import exceptions as boto_errors
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferConfig, TransferManager

from infra.errors import BadInput, ConditionFailed, LorafleetError, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.fingerprint import sha256_hex, sha256_of_file
from infra.local_storage import whole_file
from infra.patience import Patience
from infra.s3_answers import MISSING_CODES, PASSING_CODES, PASSING_STATUSES, REASONS, SIZE_FIELD, is_torn
from infra.storage import ObjectInfo, check_key, check_prefix

BUCKET_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
CONNECT_TIMEOUT_SECONDS = 3
READ_TIMEOUT_SECONDS = 30
RETRY_SECONDS = 60.0
FIRST_ANSWER_SECONDS = 5.0
"""A store that has never answered this process is given up after this time: its name or endpoint is likely wrong."""
MULTIPART_BYTES = 64 << 20
MAX_CONNECTIONS = 32

NEEDS_CREDENTIALS = (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError, boto_errors.ProfileNotFound)
FAILURES = (boto_errors.BotoCoreError, boto_errors.ClientError, RetriesExceededError)
"""All that botocore and s3transfer raise; the first has sub-classes for every way a connection can fail."""

T = TypeVar("T")


class _Clients(NamedTuple):
    process: int
    once: Any
    """Sends each request once."""
    patient: Any
    """Repeats requests on its own; for parts of managed transfers."""


class S3Storage:
    """Objects in a bucket. Credentials come from where boto3 finds them in each process and are never part of a pickle.

    Args:
        uri: `s3://bucket` or `s3://bucket/prefix`.
        endpoint_url: Of a server that is not AWS; None takes AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, here and now,
            so that a copy sent to another machine talks to the same server.
        region: None takes AWS_REGION or AWS_DEFAULT_REGION, likewise, and then boto3's own configuration.
        retry_seconds: How long a failing request is repeated.
        multipart_bytes: Files above this size go in parts of it (S3 wants at least 5 MiB).
        page_size: Keys asked for in one request of a listing.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        multipart_bytes: int = MULTIPART_BYTES,
        page_size: int = 1000,
    ) -> None:
        self._bucket, self._prefix = _parse_uri(uri)
        self.endpoint_url = _check_endpoint(endpoint_url or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        self.region = region or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
        self.retry_seconds = retry_seconds
        self.multipart_bytes = multipart_bytes
        self.page_size = page_size
        self._start()

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`, without endpoint and credentials."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of `key`, None if there is no such object."""
        try:
            info = self._head(key)
            # Headers may be torn away where no body follows that would show it: a missing digest is asked for again.
            return info if info.sha256 else self._head(key)
        except ObjectNotFound:
            return None

    def get(self, key: str) -> tuple[bytes, ObjectInfo]:
        """Return the content, checked against its SHA-256. Raises ObjectNotFound."""
        return self._read_twice(lambda: self._get(key))

    def download(self, key: str, path: Path) -> None:
        """Write the content to the local file `path`, whole or not at all. Raises ObjectNotFound."""
        with whole_file(path) as file:
            self._read_twice(lambda: self._download(key, file))

    def put(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Store bytes, or a local file's content, whatever stood there."""
        if isinstance(data, Path):
            if not data.is_file():
                raise BadInput(f"there is no file {data} to be stored.")
            if data.stat().st_size > self.multipart_bytes:
                return self._upload(key, data)
            data = data.read_bytes()
        return _info_of_put(key, data, self._request(key, "write", "put_object", **self._put_fields(key, data)))

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        """Store bytes if the key is free. Raises ConditionFailed if it is not; a lost answer is read back."""
        return self._conditional_put(key, data, {"IfNoneMatch": "*"})

    def compare_and_put(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        """Store bytes if the object still has `etag`. Raises ConditionFailed if not; a lost answer is read back."""
        return self._conditional_put(key, data, {"IfMatch": etag})

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, in key order."""
        fields = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix), "MaxKeys": self.page_size}
        while True:
            page = self._request(prefix, "list", "list_objects_v2", **fields)
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(self._prefix)
                yield ObjectInfo(key, entry["Size"], entry["ETag"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            fields = {**fields, "ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self._request(key, "delete", "delete_object", **self._address(key))

    def refuses_wrong_checksum(self, key: str) -> bool:
        """Tell whether the server compares an upload with the SHA-256 sent beside it. Uses `key`, and leaves it free."""
        fields = {**self._put_fields(key, b"sent"), "ChecksumSHA256": _base64_sha256(b"announced")}
        try:
            self._request(key, "write", "put_object", **fields)
        except ServiceUnavailable as error:
            if _status(error.__cause__) == 400:
                return True
            raise
        self.delete(key)
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_clients", "_has_answered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._clients: _Clients | None = None
        self._has_answered = False

    def _connect(self) -> _Clients:
        """Return this process's clients; a fork must not share its parent's connections."""
        with self._lock:
            if self._clients is None or self._clients.process != os.getpid():
                self._clients = _Clients(os.getpid(), self._new_client(max_attempts=1), self._new_client(max_attempts=8))
            return self._clients

    def _new_client(self, max_attempts: int) -> Any:
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=READ_TIMEOUT_SECONDS,
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            max_pool_connections=MAX_CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if self.endpoint_url else None,
        )
        session = _new_session(self.region)
        region = session.region_name or ("us-east-1" if self.endpoint_url else None)
        client = session.client("s3", endpoint_url=self.endpoint_url, region_name=region, config=config)
        client.meta.events.register("before-parse.s3", _count_torn_as_failed)
        return client

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _put_fields(self, key: str, data: bytes) -> dict[str, Any]:
        return {
            **self._address(key),
            "Body": data,
            "ChecksumAlgorithm": "SHA256",
            "ChecksumSHA256": _base64_sha256(data),
            "Metadata": _metadata(sha256_hex(data), len(data)),
        }

    def _request(self, key: str, verb: str, operation: str, **fields: Any) -> Any:
        return self._repeat(key, verb, lambda clients: getattr(clients.once, operation)(**fields))

    def _repeat(self, key: str, verb: str, send: Callable[[_Clients], T]) -> T:
        """Send until there is a clear answer; raise the error that says what it was."""
        patience = Patience(self._patience_seconds())
        while True:
            try:
                return self._send(send)
            except FAILURES as error:
                if not (_is_passing(error) and patience.wait()):
                    raise self._translated(key, verb, error) from error

    def _send(self, send: Callable[[_Clients], T]) -> T:
        try:
            answer = send(self._connect())
        except boto_errors.ClientError:
            self._has_answered = True
            raise
        self._has_answered = True
        return answer

    def _patience_seconds(self) -> float:
        return self.retry_seconds if self._has_answered else min(self.retry_seconds, FIRST_ANSWER_SECONDS)

    def _conditional_put(self, key: str, data: bytes, condition: dict[str, str]) -> ObjectInfo:
        fields = {**self._put_fields(key, data), **condition}
        patience = Patience(self._patience_seconds())
        is_unclear = False  # whether an earlier sending may have been carried out although its answer was lost
        while True:
            try:
                return _info_of_put(key, data, self._send(lambda clients: clients.once.put_object(**fields)))
            except FAILURES as error:
                is_unclear = is_unclear or (_is_passing(error) and _status(error) != 409)
                if _is_passing(error) and patience.wait():
                    continue
                return self._settle(key, data, error, is_unclear)

    def _settle(self, key: str, data: bytes, error: Exception, is_unclear: bool) -> ObjectInfo:
        """Return the info of a conditional put that ended with `error` but won, or raise what it came to."""
        if is_unclear and (info := self._stored_as(key, data)):
            return info
        if _status(error) == 412 or _code(error) in MISSING_CODES:
            raise ConditionFailed(f"the object {key} in the store {self.uri} exists already, has changed or is gone.") from error
        raise self._translated(key, "write", error) from error

    def _stored_as(self, key: str, data: bytes) -> ObjectInfo | None:
        try:
            stored, info = self.get(key)
        except ObjectNotFound:
            return None
        return info if stored == data else None

    def _read_twice(self, read: Callable[[], T]) -> T:
        """Read; once more if it came damaged, which may have happened on the way."""
        try:
            return read()
        except WorkFailed:
            return read()

    def _head(self, key: str) -> ObjectInfo:
        return _info_of_answer(key, self._request(key, "read", "head_object", **self._address(key)))

    def _get(self, key: str) -> tuple[bytes, ObjectInfo]:
        def send(clients: _Clients) -> tuple[dict[str, Any], bytes]:
            answer = clients.once.get_object(**self._address(key))
            return answer, answer["Body"].read()

        answer, data = self._repeat(key, "read", send)
        return data, self._checked(_info_of_answer(key, answer), sha256_hex(data))

    def _download(self, key: str, file: BinaryIO) -> None:
        info = self.head(key)
        if info is None:
            raise self._not_found(key)
        file.seek(0)
        file.truncate()
        if info.size_bytes <= self.multipart_bytes:
            file.write(self._get(key)[0])
            return
        self._repeat(key, "read", lambda clients: self._transfer(clients, "download", fileobj=file, **self._named(key)))
        file.flush()
        self._checked(info, sha256_of_file(Path(file.name)))

    def _upload(self, key: str, path: Path) -> ObjectInfo:
        digest = sha256_of_file(path)
        extra = {"Metadata": _metadata(digest, path.stat().st_size)}
        named = {**self._named(key), "fileobj": str(path), "extra_args": extra}
        self._repeat(key, "write", lambda clients: self._transfer(clients, "upload", **named))
        info = self.head(key)
        if info is None or info.sha256 != digest or info.size_bytes != path.stat().st_size:
            raise WorkFailed(f"the object {key} in the store {self.uri} is not the file {path} that was sent; send it again.")
        return info

    def _transfer(self, clients: _Clients, method: str, **fields: Any) -> None:
        config = TransferConfig(
            multipart_threshold=self.multipart_bytes, multipart_chunksize=self.multipart_bytes, max_request_concurrency=4
        )
        with TransferManager(clients.patient, config) as manager:
            getattr(manager, method)(**fields).result()

    def _named(self, key: str) -> dict[str, str]:
        return {"bucket": self._bucket, "key": self._prefix + check_key(key)}

    def _checked(self, info: ObjectInfo, digest: str) -> ObjectInfo:
        if info.sha256 is not None and info.sha256 != digest:
            raise WorkFailed(
                f"the object {info.key} in the store {self.uri} is damaged: its SHA-256 is {digest[:12]}…, not the one it was "
                "stored with; restore it from a copy, or delete it and run what makes it again."
            )
        return ObjectInfo(info.key, info.size_bytes, info.etag, info.modified, digest)

    def _not_found(self, key: str) -> ObjectNotFound:
        return ObjectNotFound(f"there is no object {key} in the store {self.uri}")

    def _translated(self, key: str, verb: str, error: Exception) -> LorafleetError:
        """Return the error a person can act on. Only codes and class names of `error` are shown, never its text."""
        code, name, endpoint = _code(error), type(error).__name__, self.endpoint_url or "AWS"
        if code in MISSING_CODES:
            return self._not_found(key)
        if isinstance(error, NEEDS_CREDENTIALS):
            reason = "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        elif code in REASONS:
            reason = REASONS[code].format(code=code, verb=verb, key=key)
        elif code:
            reason = f"at {endpoint} failed to {verb} {key!r} ({code}); look at the server"
        else:
            reason = f"does not answer at {endpoint} ({name}); check the endpoint and the network"
        return ServiceUnavailable(f"the store {self.uri} {reason}, then run the same command again.")


@functools.cache
def _service_models() -> Any:
    """botocore's descriptions of AWS, which take 0.3 s to read and are read once per process."""
    return botocore.session.Session().get_component("data_loader")


def _new_session(region: str | None) -> boto3.session.Session:
    core = botocore.session.Session()
    core.register_component("data_loader", _service_models())
    return boto3.session.Session(region_name=region, botocore_session=core)


def _count_torn_as_failed(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Turn a torn answer into a passing error before it is read, as botocore does with errors that came as a 200."""
    if is_torn(operation_model.name, response_dict["status_code"], response_dict["headers"], response_dict["body"]):
        response_dict.update(status_code=500, body=b"")


def _is_passing(error: Exception) -> bool:
    """Tell whether the same request may succeed later."""
    if isinstance(error, boto_errors.ClientError):
        return _status(error) in PASSING_STATUSES or _code(error) in PASSING_CODES
    if isinstance(error, boto_errors.SSLError):
        return False
    passing = (boto_errors.ConnectionError, boto_errors.HTTPClientError, boto_errors.IncompleteReadError, RetriesExceededError)
    return isinstance(error, passing) or type(error).__name__ == "ResponseParserError"


def _code(error: BaseException | None) -> str:
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, boto_errors.ClientError) else ""


def _status(error: BaseException | None) -> int:
    if not isinstance(error, boto_errors.ClientError):
        return 0
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _parse_uri(uri: str) -> tuple[str, str]:
    """Return bucket and prefix, the latter empty or ending in a slash."""
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    if "@" in bucket:
        raise BadInput("the store's name holds credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    if not uri.startswith("s3://") or not BUCKET_PATTERN.fullmatch(bucket):
        raise BadInput(
            f"{uri[:80]!r} is not a store in S3: expected s3://bucket or s3://bucket/prefix, "
            "the bucket in 3 to 63 characters of a-z, 0-9, '.' and '-'."
        )
    return bucket, check_key(prefix) + "/" if prefix else ""


def _check_endpoint(endpoint_url: str | None) -> str | None:
    if endpoint_url is None:
        return None
    parts = urlsplit(endpoint_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise BadInput("the S3 endpoint should be a URL like https://host:9000, without user and password.")
    return endpoint_url


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _base64_sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _metadata(sha256: str, size_bytes: int) -> dict[str, str]:
    return {"sha256": sha256, SIZE_FIELD: str(size_bytes)}


def _info_of_answer(key: str, answer: dict[str, Any]) -> ObjectInfo:
    digest = answer["Metadata"].get("sha256", "")
    modified = answer["LastModified"].timestamp()
    return ObjectInfo(key, answer["ContentLength"], answer["ETag"], modified, digest if len(digest) == 64 else None)


def _info_of_put(key: str, data: bytes, answer: dict[str, Any]) -> ObjectInfo:
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    modified = email.utils.parsedate_to_datetime(date).timestamp() if date.endswith("GMT") else time.time()
    return ObjectInfo(key, len(data), answer["ETag"], modified, sha256_hex(data))
