"""Run moto's server with atomic puts.

moto 5.2 looks at a put's condition and writes in two steps, so that of two writers at once both may win, which S3 rules out.
"""

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_one_at_a_time = threading.Lock()
_put_object = S3Response.put_object


def _put_alone(response: S3Response) -> tuple[int, dict[str, Any], str | bytes]:
    with _one_at_a_time:
        return _put_object(response)


S3Response.put_object = _put_alone  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    main()
