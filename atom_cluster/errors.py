"""Every error the library raises on purpose.

AtomClusterError
├── InvalidRequest            400  the client sent something wrong; names the field
│   ├── ContextLengthExceeded 400
│   ├── Unauthorized          401  no API key, or one that is not valid
│   ├── Forbidden             403  the API key may not do this
│   ├── ProfileRefused        409  a profiler window is open already, or none is, or none can be
│   ├── UnknownModel          404
│   ├── UnknownRequest        404  no timeline of a request with this id is kept
│   ├── RequestTooLarge       413  body over `api.max_body_bytes`
│   ├── HeadersTooLarge       431  headers over `api.protection.max_headers` or `max_header_bytes`
│   └── BodyTimeout           408  the body did not arrive within `api.body_timeout_s`
├── Overloaded                503  a bounded queue is full; carries Retry-After seconds
│   ├── NotReady              503  no replica can take the request yet
│   └── RateLimited           429  the API key has used what it may
├── RequestFailed             500  the cluster lost the request and says why
│   ├── EngineLost            500  the engine that ran it is gone; the ingress places it again, while it may
│   └── RequestTimeout        504  the deadline of the request passed
├── ConfigError               (start-up) a configuration that cannot work; names the key
├── WeightsError              (start-up) missing, unused or mis-shaped checkpoint tensors
├── GangError                 (internal) a rank of a replica died, is stuck or could not start; the whole gang restarts
├── TransferError             (internal) a KV transfer failed; the request is recomputed or fails
└── ProtocolError             (internal) a peer sent a message that is malformed, too large or out of order

`InvalidRequest` and its kin are user errors and never count against a replica's health. Errors of other libraries are
mapped onto these where they enter (`raise ... from exc`), so callers never catch another library's exception.
"""

from __future__ import annotations


class AtomClusterError(Exception):
    """Root of the tree. `http_status` is what the API answers when the error reaches it."""

    http_status = 500
    error_type = "internal_error"
    code: str | None = None


class InvalidRequest(AtomClusterError):
    """The request is wrong. `param` names the offending field in the client's own spelling (`messages[2].role`)."""

    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested output does not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(InvalidRequest):
    """There is no valid API key with the request."""

    http_status = 401
    error_type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """The API key is valid and its role may not do this."""

    http_status = 403
    error_type = "permission_error"
    code = "insufficient_permissions"


class UnknownModel(InvalidRequest):
    """`model` names nothing that is served here."""

    http_status = 404
    code = "model_not_found"


class ProfileRefused(InvalidRequest):
    """A profiler window was asked for that cannot be: there is one already, or none to stop, or no directory."""

    http_status = 409
    code = "profile_refused"


class UnknownRequest(InvalidRequest):
    """No timeline of a request with this id is kept."""

    http_status = 404
    code = "request_not_found"


class RequestTooLarge(InvalidRequest):
    """The HTTP body is larger than the configured limit."""

    http_status = 413
    code = "request_too_large"


class HeadersTooLarge(InvalidRequest):
    """The request has more headers, or larger ones, than the configured limit."""

    http_status = 431
    code = "headers_too_large"


class BodyTimeout(InvalidRequest):
    """The client took too long to send its request body."""

    http_status = 408
    code = "body_timeout"


class Overloaded(AtomClusterError):
    """A bounded queue is full. `retry_after_s` becomes the Retry-After header."""

    http_status = 503
    error_type = "overloaded_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(Overloaded):
    """No replica can take the request at the moment: starting, restarting or draining."""

    code = "not_ready"


class RateLimited(Overloaded):
    """A key has used what it may, or all clients together have. `limit` names the configured limit, if it is known."""

    http_status = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class RequestFailed(AtomClusterError):
    """The request ended without its answer, through no fault of the client."""

    code = "request_failed"


class EngineLost(RequestFailed):
    """The engine that ran the request is gone, has failed, or what it said got lost on the way.

    `may_return`: it is out of reach, and nobody knows more; it may turn out to be as well as ever.
    """

    code = "engine_lost"

    def __init__(self, message: str, *, may_return: bool = False) -> None:
        super().__init__(message)
        self.may_return = may_return


class RequestTimeout(RequestFailed):
    """The deadline of the request passed before it finished."""

    http_status = 504
    code = "request_timeout"


class ConfigError(AtomClusterError):
    """A configuration that cannot work. The message names the key and, for a typo, the nearest valid one."""


class WeightsError(AtomClusterError):
    """A checkpoint does not match the model: the message lists missing, unused and mis-shaped tensors."""


class GangError(AtomClusterError):
    """A rank of a gang died, is stuck or could not start. The gang is unusable; the message names the rank."""


class TransferError(AtomClusterError):
    """KV blocks could not be moved."""


class ProtocolError(AtomClusterError):
    """A peer's message was malformed, too large or out of order."""
