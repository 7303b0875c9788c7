"""Kaggle's side of the official client's protocol, on this machine alone."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

USERNAME = "tester"
KEY = "0123456789abcdef-this-key-must-never-be-seen"


class KaggleServer(ThreadingHTTPServer):
    """Takes submissions, scores them, and hands out one competition's files.

    Attributes:
        calls: The methods that were called, in order.
        uploads: The files that were sent.
        failures: By method: the HTTP status and the message with which it fails.
        retry_after: Seconds, as the header of that name in every failure.
        verdicts: What each question for scores is answered with; the last one stays.
        archive: The bytes of the competition's zip file.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[str] = []
        self.uploads: list[bytes] = []
        self.failures: dict[str, tuple[int, str]] = {}
        self.retry_after = "7"
        self.verdicts = [{"status": "PENDING"}, {"status": "COMPLETE", "publicScore": "0.91230"}]
        self.archive = b""
        self.submissions: list[dict[str, Any]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead the client here, and nowhere else.

        It knows no port, only http://localhost/api; the proxy setting leads that to ours. They must
        be set together: with one of them missing the client would ask somebody else.
        """
        here = f"http://127.0.0.1:{self.server_port}"
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "http_proxy": here,
            "https_proxy": here,
            "no_proxy": "",
            "NO_PROXY": "",
            "KAGGLE_USERNAME": USERNAME,
            "KAGGLE_KEY": KEY,
        }

    @contextmanager
    def running(self) -> Iterator["KaggleServer"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def answer(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        if method == "IntrospectToken":
            return {"active": True, "username": USERNAME}
        if method == "StartSubmissionUpload":
            return {"token": "blob", "createUrl": "http://localhost/upload/blob"}
        if method == "CreateSubmission":
            ref = 4711 + len(self.submissions)
            self.submissions.append({"ref": ref, "description": request["submissionDescription"]})
            return {"message": "Successfully submitted", "ref": ref}
        assert method == "ListSubmissions", method
        verdict = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
        return {"submissions": [submission | verdict for submission in self.submissions]}


class Handler(BaseHTTPRequestHandler):
    server: KaggleServer

    def do_POST(self) -> None:
        method = self.begin(urlsplit(self.path).path.rsplit("/", 1)[1])
        if method == "DownloadDataFiles":
            self.send_response(302)
            self.send_header("Location", "http://localhost/storage/archive.zip?signature=secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif method:
            answer = self.server.answer(method, json.loads(self.body))
            self.reply(200, json.dumps(answer).encode(), "application/json")

    def do_PUT(self) -> None:
        if self.begin("PUT"):
            self.server.uploads.append(self.body)
            self.reply(200)

    def do_GET(self) -> None:
        if self.begin("GET"):
            self.reply(200, self.server.archive, "application/zip")

    def begin(self, method: str) -> str:
        """Note the call and read its body; an empty string if the call has been made to fail."""
        self.server.calls.append(method)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if method not in self.server.failures:
            return method
        status, message = self.server.failures[method]
        text = json.dumps({"code": status, "message": message}).encode()
        self.reply(status, text, "application/json")
        return ""

    def reply(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr for what the tested program says."""
