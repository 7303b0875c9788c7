"""Train on Kaggle's GPUs: push a run, follow it, and fetch what it leaves."""

import argparse
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from core import kaggle_client
from core.errors import UserError, exit_on_user_error, visible
from core.files import atomic_write, sha256, temporary
from core.kaggle_client import KaggleError, call_kernels
from core.runs import ROOT, Run, is_file
from pipeline.kaggle import parcel
from pipeline.kaggle.kernel import OUTPUT, RECORD, read_output

_SESSION = 42900.0  # seconds; Kaggle's longest are 12 hours
_REST = 1800.0  # of these for predicting, and for what is kept
_SHORTEST = 600.0  # seconds of training that are worth a start
POLL_SECONDS = 10.0
PATIENCE = 1800.0  # seconds of trouble at Kaggle until following ends
_GOING = ("NEW_SCRIPT", "QUEUED", "RUNNING", "CANCEL_REQUESTED")
_STOPPED = 143  # train.py's exit status when its time was up
_AT_HOME = ("--study", "--init_from", "--print_config", "--settings", "--data.data_dir")


def run(args: list[str]) -> None:
    """Train at Kaggle, as ``train.py fit --on kaggle`` asks; the same command again goes on."""
    with exit_on_user_error(debug="--debug" in args):
        options, rest = parse(args)
        parent = Run.parent(Path(options.config[0]), options.root)
        folder = Run.claim(parent, Run.name(options.run, parent))
        try:
            with folder.lock(), folder.tidy():
                Remote(folder, options, rest).train()
        except KeyboardInterrupt:
            print("\nNothing was ended at Kaggle; the same command again goes on.")
            raise SystemExit(130) from None


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the push, and the arguments for the machine there.

    Raises:
        UserError: Something is missing, or would do nothing.
    """
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--on")
    parser.add_argument("-c", "--config", action="append")
    parser.add_argument("--run")
    parser.add_argument("--mount", default="")
    parser.add_argument("--wheels", default="")
    parser.add_argument("--trainer.default_root_dir", dest="root", type=Path, default=ROOT)
    options, rest = parser.parse_known_args(args[1:])
    if args[0] != "fit" or options.on != "kaggle":
        raise UserError(f"{args[0]} --on={options.on}: there is `train.py fit --on kaggle` alone.")
    if not options.config or not options.run:
        raise UserError("--on kaggle needs --config FILE and --run NAME, which finds it again.")
    if missing := [path for path in options.config if not is_file(Path(path))]:
        raise UserError(f"--config={missing[0]}: there is no such file.")
    if stray := [flag for flag in _AT_HOME if flag in {arg.partition("=")[0] for arg in rest}]:
        raise UserError(f"{stray[0]} would not act on Kaggle's machine; leave it out.")
    for flag, source in (("--mount", options.mount), ("--wheels", options.wheels)):
        if source and not re.fullmatch(r"[\w-]+/[\w-]+", source):
            raise UserError(f"{flag}={source} must be OWNER/NAME, the end of a data set's address.")
    return options, rest


class Remote:
    """A run at Kaggle: a private script of the user's, named after it.

    ``on_kaggle.json`` in the run's folder knows the ``args`` and the digest of the ``code`` that
    were pushed, the time of this ``start`` and, once its output was fetched, train.py's exit
    ``status`` there and the digest of the ``last`` checkpoint.

    Args:
        run: The run, locked.
        options: What concerns the push.
        rest: The other arguments of train.py.
    """

    def __init__(self, run: Run, options: argparse.Namespace, rest: list[str]) -> None:
        self.run, self.folder, self.options = run, run.folder, options
        first, *others = options.config
        configs = [f"--config={path}" for path in (first, parcel.HARDWARE, *others)]
        self.args = ["fit", *configs, f"--run={self.folder.name}", *rest]
        self.state_file = self.folder / "on_kaggle.json"
        self.state = self.read_state()
        self.api = kaggle_client.authenticate()
        self.name = "/".join(self.folder.parts[-2:])
        named = hashlib.sha256(self.name.encode()).hexdigest()
        slug = re.sub("[^a-z0-9]+", "-", self.name.lower())[:40].strip("-")
        self.slug = f"{slug}-{named[:8]}"  # x_1 and X-1 are two
        self.user = self.api.get_config_value("username")
        self.kernel = f"{self.user}/{self.slug}"
        self.page = f"https://www.kaggle.com/code/{self.kernel}"

    def train(self) -> None:
        """Push, unless Kaggle is at it; follow it to the end, and fetch the run.

        Raises:
            UserError: The run of that name is another one.
        """
        status, _ = self.status()
        same = self.state.get("args", self.args) == self.args
        begun_here = not self.state and self.run.config.is_file()
        if begun_here or self.last() not in (self.state.get("last"), self.state.get("coming")):
            raise UserError(f"{self.folder} was trained on this machine; choose another --run.")
        if status in _GOING and not same:
            raise UserError(f"{self.page} runs with other arguments; choose another --run.")
        if status == "COMPLETE" and self.state.get("status") == 0 and same:
            print(f"{self.folder} was trained to its end, and is here.")
            return
        if status not in _GOING and (status != "COMPLETE" or "status" in self.state):
            self.push()
        print(f"{self.page}; Ctrl-C ends nothing there.", flush=True)
        self.follow()
        self.fetch()

    # ---- what is known

    def read_state(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.state_file.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):
            raise UserError(f"{self.state_file} is not whole; choose another --run.") from None

    def write_state(self, **state: Any) -> None:
        self.state = state
        with atomic_write(self.state_file, "w") as file:
            json.dump(state, file, indent=2)

    def last(self) -> str | None:
        last = self.run.last_checkpoint
        return sha256(last) if last.is_file() else None

    def status(self) -> tuple[str | None, str]:
        """Return Kaggle's state of the newest start, None before the first, and its reason."""
        fields = {"user_name": self.user, "kernel_slug": self.slug}
        try:
            answer = kaggle_client.persistently(
                lambda: call_kernels(self.api, "get_kernel_session_status", **fields), PATIENCE
            )
        except KaggleError as error:
            if error.status in (403, 404):  # what is hidden looks like what is not there
                return None, ""
            raise
        return answer.status.name, kaggle_client.clean(answer.failure_message)

    # ---- push

    def push(self) -> None:
        """Start the run there, from what it has left if it has.

        Raises:
            UserError: There is no time left, or Kaggle does not take it.
        """
        session, known = self.session_seconds(), self.api.config_values
        args, code = parcel.pack(
            self.args, [known[name] for name in ("key", "token", "api_token") if known.get(name)]
        )
        config = parcel.resolve(args, code)
        data, competition = config["data"], parcel.competition_of(config["data"])
        mount, former = self.options.mount, self.state.get("last")
        if not competition and not mount and "download" in data["init_args"]:
            if self.options.wheels:
                raise UserError(
                    "with --wheels there is no internet, and the data would be downloaded; add "
                    "--mount OWNER/NAME, a data set of them."
                )
            args.append("--data.download=true")
        job = {
            "args": args,
            "run": self.name,
            "data": "." if competition else mount,
            "former": self.kernel if former else "",
            "wheels": self.options.wheels,
            "predict": competition is not None,
            "seconds": [session - _REST, session],
            "start": time.time(),
        }
        digest = hashlib.sha256(code).hexdigest()
        pushed = {"args": self.args, "code": digest, "last": former, "start": job["start"]}
        try:
            self.send(parcel.script(job, code), competition, int(session))
        except BaseException as error:
            if not getattr(error, "refused", False):  # it may run, which the next start will see
                self.write_state(**pushed)
            raise
        self.write_state(**pushed)
        print(
            f"Pushed: code {digest[:8]}, {(session - _REST) / 3600:.1f} h for training, "
            f"{config['trainer']['devices']} processes with batches of "
            f"{data['init_args'].get('batch_size')} each."
        )

    def send(self, script: str, competition: str | None, seconds: int) -> None:
        mount, wheels = self.options.mount, self.options.wheels
        answer = call_kernels(
            self.api,
            "save_kernel",
            competition or "",
            slug=self.kernel,
            new_title=self.slug,
            text=script,
            language="python",
            kernel_type="script",
            is_private=True,
            enable_gpu=True,
            enable_internet=not wheels,
            machine_shape="NvidiaTeslaT4",  # two of them
            session_timeout_seconds=seconds,
            competition_data_sources=[competition] if competition else [],
            dataset_data_sources=list(filter(None, (mount, wheels))),
            kernel_data_sources=[self.kernel] if self.state.get("last") else [],
        )
        kinds = ("dataset", "competition", "kernel")
        unknown = [x for kind in kinds for x in getattr(answer, f"invalid_{kind}_sources") or []]
        if answer.error or unknown:  # which come without an exception
            said = "; ".join(filter(None, [answer.error, *(f"unknown: {x}" for x in unknown)]))
            said = f"Kaggle did not take the script: {kaggle_client.clean(said)}"
            raise KaggleError(said, f"{self.page} is as it was.", status=400)

    def session_seconds(self) -> float:
        """Return the longest session in seconds for which this week has GPU time left."""
        quota = call_kernels(self.api, "get_accelerator_quota_statistics")
        gpu = quota.gpu_quota
        left = (gpu.total_time_allowed - gpu.time_used).total_seconds() if gpu else _SESSION
        if left < _REST + _SHORTEST:
            raise UserError(
                f"Kaggle has {max(left, 0) / 3600:.1f} h of GPU time left for you, and a start "
                f"needs {(_REST + _SHORTEST) / 3600:.1f} h; there is more on "
                f"{quota.quota_refresh_time:%Y-%m-%d %H:%M} UTC."
            )
        return min(left, _SESSION)

    # ---- follow and fetch

    def follow(self) -> None:
        """Show what is printed there until it ends, of a progress bar its last state.

        Raises:
            UserError: It failed, or was stopped.
        """
        line, seen = "", 0
        while True:
            status, reason = self.status()
            for event in itertools.islice(self.events(), seen, None):
                seen += 1
                *lines, line = (line + str(event.get("data") or "")).split("\n")
                for whole in lines:
                    print(_last_state(whole), flush=True)
            if status not in _GOING:
                break
            time.sleep(POLL_SECONDS)
        if line:
            print(_last_state(line))
        if status != "COMPLETE":
            how = f"ended with {status}" if status else "is not to be found"
            raise UserError(
                f"{self.page} {how}{f' ({reason})' if reason else ''}; the same command starts it "
                "again."
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what was printed there from the beginning on, until the connection ends."""
        stream = self.api.kernels_logs_stream(self.kernel)
        with suppress(KaggleError):  # whether Kaggle is there, the status says
            while True:
                with kaggle_client.quiet_client():
                    if (event := next(stream, None)) is None:
                        return
                yield event if isinstance(event, dict) else {"data": event}

    def fetch(self) -> None:
        """Put what was left there into the run's folder, file by file, each whole.

        Raises:
            UserError: It is not what was left there, or train.py ended with an error.
        """
        with temporary(self.folder, folder=True) as place:
            kaggle_client.persistently(lambda: self.download(str(place)), PATIENCE)
            files = place / "files"
            record = read_output(place, files)
            if record["start"] < self.state.get("start", 0.0):
                self.write_state(**self.state | {"status": None})  # the push may not have arrived
                raise UserError(
                    f"{self.page} still has what an earlier start left; run the same command again."
                )
            made = files / "submission.json"
            if made.is_file():  # its paths are those of that machine
                text = made.read_text().replace(record["folder"], self.folder.as_posix())
                made.write_text(text)
            state, status = {"args": self.args} | self.state, record["status"]
            last = files / self.run.last_checkpoint.relative_to(self.folder)
            coming = sha256(last) if last.is_file() else None
            self.write_state(**state | {"coming": coming})  # should it end between two files
            for path in [path for path in files.rglob("*") if path.is_file()]:
                target = self.folder / path.relative_to(files)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        self.write_state(**state | {"status": status, "last": self.last()})
        if status == _STOPPED:
            print(f"{self.folder}: its time was up; the same command goes on where it stopped.")
        elif status:
            raise UserError(
                f"train.py ended there with exit status {status} and what stands above; the same "
                "command goes on from the last checkpoint."
            )
        else:
            command = "submit.py" if made.name in os.listdir(self.folder) else "predict.py"
            print(f"The run is in {self.folder}\nNext: python {command} {self.folder}")

    def download(self, folder: str) -> None:
        names = f"^({re.escape(OUTPUT)}|{re.escape(RECORD)})$"
        try:
            with kaggle_client.quiet_client():
                self.api.kernels_output(self.kernel, folder, names, force=True)
        except OSError as error:
            raise UserError(f"{folder} could not be written ({error.strerror}).") from None


def _last_state(line: str) -> str:
    """Return what a terminal shows of a line that a progress bar has written repeatedly."""
    return visible(line.rstrip("\r").rpartition("\r")[2])
