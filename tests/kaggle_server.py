"""Kaggle's side of the official client's protocol, on this machine alone."""

import base64
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

USERNAME = "tester"
KEY = "0123456789abcdef-this-key-must-never-be-seen"
NOTEBOOKS = {
    *("GetAcceleratorQuotaStatistics", "SaveKernel"),
    *("GetKernelSessionStatus", "ListKernelSessionOutput"),
}


@dataclass(frozen=True)
class Fault:
    """How one answer goes wrong.

    Args:
        how: An HTTP status; or ``reset``, ``html``, ``half``, ``empty``, ``slow``; or ``kill`` and
            ``interrupt`` (Ctrl-C), which end the client.
        made: Whether what was asked for is done: ``no``, ``yes`` or ``late``, after the answer.
        body: What comes with an HTTP status; ``AUTHORIZATION`` is what the client sent as that.
        kind: The type of ``body``.
    """

    how: str
    made: str = "no"
    body: str = ""
    kind: str = "application/json"


class KaggleServer(ThreadingHTTPServer):
    """Takes submissions, scores them, and hands out one competition's files.

    Attributes:
        calls: The methods that were called, in order.
        uploads: The files that were sent.
        failures: By method: the HTTP status and the message with which it fails.
        faults: By method: what goes wrong with the next answers, one after the other.
        keys: The key or token that came with each call.
        made: Competition and content of every submission, parallel to ``submissions``.
        late: Submissions that will be made, and since when they wait.
        slow: Seconds of a slow answer.
        patience: Seconds after which a late submission is there.
        clients: Processes that a fault may kill.
        retry_after: Seconds, as the header of that name in every failure.
        verdicts: What each question for scores is answered with; the last one stays.
        archive: The bytes of the competition's zip file.
        scripts: What was pushed to be run.
        push_answer: What comes with the answer to a push.
        quota: Hours of GPU time that are used, of 30.
        statuses: How the script does, each time it is asked for; the last one stays.
        log: What the script prints, event by event.
        output: Files that it leaves; START in them is the time at which the newest was pushed.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[str] = []
        self.uploads: list[bytes] = []
        self.failures: dict[str, tuple[int, str]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.keys: list[str] = []
        self.made: list[tuple[str, bytes]] = []
        self.late: list[tuple[float, dict[str, Any]]] = []
        self.slow = 0.3
        self.patience = 0.2
        self.clients: list[Any] = []
        self.lock = threading.Lock()
        self.retry_after = "7"
        self.verdicts = [{"status": "PENDING"}, {"status": "COMPLETE", "publicScore": "0.91230"}]
        self.archive = b""
        self.scripts: list[dict[str, Any]] = []
        self.push_answer: dict[str, Any] = {}
        self.quota = 20.0
        self.statuses = ["QUEUED", "RUNNING", "COMPLETE"]
        self.log = ["Training\n"]
        self.output: dict[str, bytes] = {}
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
            number = len(self.uploads)
            self.uploads.append(b"")
            return {"token": f"blob{number}", "createUrl": f"http://localhost/upload/blob{number}"}
        if method == "CreateSubmission":
            return {"message": "Successfully submitted", "ref": self.make(request)}
        if method == "GetSubmission":
            found = [one for one in self.submissions if one["ref"] == request["ref"]]
            return found[0] | self.verdict()
        if method in NOTEBOOKS:
            return self.notebook(method, request)
        assert method == "ListSubmissions", method
        return self.page(int(request.get("pageToken") or 0), request.get("pageSize", 20))

    def notebook(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        if method == "GetAcceleratorQuotaStatistics":
            gpu = {"timeUsed": f"{self.quota * 3600:.0f}s", "totalTimeAllowed": "108000s"}
            return {"quotaRefreshTime": "2026-12-05T00:00:00Z", "gpuQuota": gpu}
        if method == "SaveKernel":
            self.scripts.append(request)
            return {"versionNumber": len(self.scripts), **self.push_answer}
        if not self.scripts:
            return {"code": 404, "message": "Not found"}
        if method == "GetKernelSessionStatus":
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            return {"status": status, "failureMessage": "Out of memory" * (status == "ERROR")}
        names, page = sorted(self.output), int(request.get("pageToken") or 0)
        files = [{"url": f"http://localhost/storage/{x}", "fileName": x} for x in names]
        more = str(page + 1) if page + 1 < len(names) else ""
        return {"files": files[page : page + 1], "nextPageToken": more}

    def make(self, request: dict[str, Any]) -> int:
        ref = 4711 + len(self.submissions)
        self.submissions.append({"ref": ref, "description": request["submissionDescription"]})
        content = self.uploads[int(request["blobFileTokens"].removeprefix("blob"))]
        self.made.append((request["competitionName"], content))
        return ref

    def verdict(self) -> dict[str, Any]:
        return self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]

    def page(self, start: int, size: int) -> dict[str, Any]:
        """A page of submissions, the newest first; what is late comes after it, if it may."""
        now = time.monotonic()
        verdict = self.verdict()
        self.make_late(now - self.patience)
        newest = [one | verdict for one in reversed(self.submissions)]
        self.make_late(now)
        more = str(start + size) if start + size < len(newest) else ""
        return {"submissions": newest[start : start + size], "nextPageToken": more}

    def make_late(self, before: float) -> None:
        for since, request in [one for one in self.late if one[0] <= before]:
            self.late.remove((since, request))
            self.make(request)


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
            request = json.loads(self.body)
            with self.server.lock:
                faults = self.server.faults.get(method)
                fault = faults.pop(0) if faults else None
                if fault is None or fault.made == "yes":
                    answer = self.server.answer(method, request)
                elif fault.made == "late":
                    self.server.late.append((time.monotonic(), request))
            if fault is None:
                self.reply(answer.get("code", 200), json.dumps(answer).encode(), "application/json")
            else:
                self.fail(fault)

    def do_PUT(self) -> None:
        if self.begin("PUT"):
            faults = self.server.faults.get("PUT")
            if faults:
                self.fail(faults.pop(0))
                return
            self.server.uploads[int(self.path.rpartition("blob")[2])] = self.body
            self.reply(200)

    def fail(self, fault: Fault) -> None:
        match fault.how:
            case "html":
                self.reply(200, b"<html>Sign in</html>", "text/html")
            case "half":
                self.reply(200, b'{"message": "Success', "application/json")
            case "empty":
                self.reply(200, b"{}", "application/json")
            case "slow":
                time.sleep(self.server.slow)
            case "kill":
                for client in self.server.clients:
                    client.kill()
            case "interrupt":
                for client in self.server.clients:
                    with suppress(ProcessLookupError):
                        os.kill(client.pid, signal.SIGINT)
                time.sleep(self.server.slow)
            case "reset":
                linger = struct.pack("ii", 1, 0)  # closing sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            case status:
                body = fault.body or json.dumps({"code": int(status), "message": "trouble"})
                body = body.replace("AUTHORIZATION", self.headers.get("Authorization", ""))
                self.reply(int(status), body.encode(), fault.kind)
        self.close_connection = True

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self.begin("GET"):
            return
        if "/logs/stream/" in path and self.server.statuses[0] != "COMPLETE":
            events = [f"data: {json.dumps({'data': text})}\n\n" for text in self.server.log]
            body = "".join([*events, "data: END_OF_LOG\n\n"]).encode()
            self.reply(200, body, "text/event-stream")
        elif "/logs/stream/" in path:
            body = json.dumps([{"data": text} for text in self.server.log]).encode()
            self.reply(200, body, "application/json")
        else:
            content = self.server.output.get(path.rpartition("/")[2], self.server.archive)
            if b"START" in content:
                job = self.server.scripts[-1]["text"].rpartition("'start': ")[2]
                content = content.replace(b"START", job.partition("}")[0].encode())
            self.reply(200, content, "application/zip")

    def begin(self, method: str) -> str:
        """Note the call and read its body; an empty string if the call has been made to fail."""
        self.server.calls.append(method)
        self.server.keys.append(key_of(self.headers.get("Authorization", "")))
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
        with suppress(ConnectionError):  # the client has been killed, or has lost its patience
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr for what the tested program says."""


def key_of(authorization: str) -> str:
    kind, _, value = authorization.partition(" ")
    return base64.b64decode(value).decode("latin1").partition(":")[2] if kind == "Basic" else value
