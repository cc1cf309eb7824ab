"""Errors that a client may see. Each knows its HTTP status and the fields of OpenAI's error body; the server's one
middleware turns them into replies. Anything else that is raised becomes a 500 without details."""

from __future__ import annotations


class LightVLError(Exception):
    """Base of the errors that are told to a client. `param` names the request field at fault."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(LightVLError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class NotAuthorized(LightVLError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(LightVLError):
    status = 404
    type = "invalid_request_error"


class PayloadTooLarge(LightVLError):
    status = 413
    type = "invalid_request_error"


class Overloaded(LightVLError):
    """The server cannot take or finish the request now (draining, device trouble)."""

    status = 503
    type = "service_unavailable"


class ConfigError(Exception):
    """A wrong flag or checkpoint, found at start: one clear line for the operator, exit status 2."""
