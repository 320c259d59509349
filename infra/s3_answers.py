"""What the answers of an S3 server mean: whole or torn, passing or final, and the words for what a person must mend.

Knows S3's codes and headers and no library.
"""

from collections.abc import Mapping

PASSING_STATUSES = {409, 429, 500, 502, 503, 504}
"""409 is S3's word for a conditional write that met another one under way."""
PASSING_CODES = {
    "SlowDown",
    "InternalError",
    "RequestTimeout",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
}
MISSING_CODES = {"NoSuchKey", "NotFound", "404"}
SIZE_FIELD = "size-bytes"
"""Metadata that says the size again: an answer to HEAD has no body by which a torn length would be noticed."""
WITH_ETAG = {"PutObject", "GetObject", "HeadObject", "UploadPart"}
WITH_DATE = {"GetObject", "HeadObject"}

_CREDENTIALS = "refuses these credentials ({code}); correct or renew them"
_PERMISSION = (
    "gives these credentials no permission to {verb} '{key}' ({code}); grant them s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:ListBucket, or use others"
)
_REGION = "lies in another region; set AWS_REGION to it"
REASONS = {
    "NoSuchBucket": "names a bucket that does not exist; create it or name another",
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "401"), _CREDENTIALS),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"), _PERMISSION),
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed", "301"), _REGION),
}
"""What a server's error code says about name and rights, and the way out; for `format` with code, verb and key."""


def is_torn(operation: str, status: int, headers: Mapping[str, str], body: object) -> bool:
    """Tell whether a successful answer ended before its body began.

    Python's http.client takes a connection that closes inside the head for the end of the head, and urllib3 an
    end right after it for an empty body: a torn listing would read as an empty store, a torn object as an empty one.
    An end further on is noticed by them. `body` is bytes, or a stream that counts for itself.
    """
    if not 200 <= status < 300 or status == 204:
        return False
    length = headers.get("content-length", "")
    if operation != "HeadObject" and isinstance(body, bytes) and length.isdigit() and int(length) != len(body):
        return True
    if operation == "HeadObject" and headers.get(f"x-amz-meta-{SIZE_FIELD}", length) != length:
        return True
    has_length = length.isdigit() or "chunked" in headers.get("transfer-encoding", "")
    has_etag = operation not in WITH_ETAG or _is_quoted(headers.get("etag", ""))
    has_date = operation not in WITH_DATE or headers.get("last-modified", "").endswith("GMT")
    return not (has_length and has_etag and has_date)


def _is_quoted(etag: str) -> bool:
    return len(etag) > 2 and etag[0] == etag[-1] == '"'
