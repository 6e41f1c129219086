"""What a client is told: a status, a sentence, and never a stack trace."""


class HttpError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def error_body(path: str, status: int, message: str) -> dict[str, object]:
    """In the manner of the protocol: OpenAI's, or the Open Inference Protocol's."""
    if path.startswith("/v2"):
        return {"error": message}
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
