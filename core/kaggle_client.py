"""The official Kaggle client, spoken to in one place.

The client prints where it should raise, with ``VERBOSE=1`` prints request headers with the key in
them, and sets no time-outs. Here its prints are kept in, a request ends after ``TIMEOUT``, and what
goes wrong ends in one sentence: of an error of its own only the type, as the key may be in its
text.
"""

import base64
import io
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from core.errors import UserError, visible
from core.files import temporary

if TYPE_CHECKING:  # importing the client logs in, so that waits until an account is asked for
    from kaggle.api.kaggle_api_extended import KaggleApi

SETTINGS_PAGE = "https://www.kaggle.com/settings"
TOKEN_PAGE = f"{SETTINGS_PAGE}/api"
VARIABLES = ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN")
TIMEOUT = (20.0, 60.0)  # seconds until a connection stands, and between two parts of an answer
UPLOAD_SECONDS = 60.0  # how long an upload is tried again
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between two tries; it doubles
PAGE = 200  # submissions; Kaggle's largest

T = TypeVar("T")


class NoCredentials(UserError):
    """Nobody is logged in to Kaggle on this machine."""


class KaggleError(UserError):
    """A failure at Kaggle or on the way there.

    Attributes:
        said: The sentence without the remedy.
        status: HTTP status of the answer; None without an answer.
        pause: Seconds for which Kaggle asks, if it does.
    """

    def __init__(
        self, said: str, remedy: str, status: int | None = None, pause: float | None = None
    ) -> None:
        super().__init__(f"{said}; {remedy}")
        self.said, self.status, self.pause = said, status, pause

    @property
    def refused(self) -> bool:
        """True if Kaggle has certainly done nothing; others may come from a proxy in between."""
        return self.status in (400, 401, 403, 404, 422, 429)

    @property
    def passing(self) -> bool:
        """True if the same request may succeed a little later."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


@dataclass(frozen=True)
class Result:
    """State of a submission at Kaggle: PENDING, COMPLETE or ERROR."""

    ref: int
    status: str
    public_score: str = ""
    error: str = ""
    message: str = ""


def authenticate() -> "KaggleApi":
    """Log in with what the client finds: a token, ``kaggle.json`` or ``kaggle auth login``.

    Raises:
        NoCredentials: There are no credentials, or Kaggle does not know the token.
        UserError: They cannot be used, or Kaggle could not be asked whether the token is valid.
    """
    for name in set(VARIABLES) & os.environ.keys():  # files of secrets end in a newline
        os.environ[name] = os.environ[name].strip()
    try:
        with quiet_client():
            import kaggle

            kaggle.api.authenticate()  # the import tried too, but hid why it failed
            kaggle.api.build_kaggle_client()
    except SystemExit:
        raise NoCredentials(
            "no valid Kaggle credentials were found; run `kaggle auth login`, or make a token at "
            f"{TOKEN_PAGE} and put it into KAGGLE_API_TOKEN."
        ) from None
    except OSError as error:
        raise UserError(
            f"the Kaggle client cannot use its folder or a file in it ({error.strerror}): "
            "~/.kaggle, or what KAGGLE_CONFIG_DIR names."
        ) from None
    return kaggle.api


def has_credentials() -> bool:
    """Return true if somebody is logged in to Kaggle on this machine."""
    try:
        authenticate()
    except NoCredentials:
        return False
    return True


def upload(api: "KaggleApi", content: bytes, csv: Path, competition: str) -> str:
    """Upload a file, of which :func:`create` makes a submission; returns the token for that.

    Raises:
        KaggleError: Kaggle did not take the file. No submission was made.
    """

    def once() -> str:
        started = call(
            api,
            "start_submission_upload",
            competition,
            file_name=csv.name,
            content_length=len(content),
            last_modified_epoch_seconds=int(csv.stat().st_mtime),
        )
        with quiet_client():
            status = requests.put(started.create_url, data=content).status_code
        if status not in (200, 201):
            raise KaggleError(
                f"Kaggle did not take the file ({status})",
                "run the same command again in a few minutes.",
                status,
            )
        return str(started.token)

    return persistently(once, UPLOAD_SECONDS)


def create(api: "KaggleApi", token: str, message: str, competition: str) -> int:
    """Make a submission of an uploaded file and return Kaggle's reference.

    Raises:
        KaggleError: There is none if ``refused``; else nobody knows.
    """
    answer = call(
        api,
        "create_submission",
        competition,
        blob_file_tokens=token,
        submission_description=message,
    )
    if type(answer.ref) is not int or answer.ref == 0:
        raise _unreadable("no reference")
    return answer.ref


def result(api: "KaggleApi", ref: int) -> Result:
    """Ask for the state of one submission; one that cannot be read yet is PENDING."""
    try:
        return _read_result(call(api, "get_submission", ref=ref))
    except KaggleError as error:
        if error.status != 404:
            raise
        return Result(ref, "PENDING")


def results(api: "KaggleApi", competition: str) -> Iterator[Result]:
    """Yield all submissions to a competition, the newest first."""
    token = ""
    while True:
        page = call(api, "list_submissions", competition, page_size=PAGE, page_token=token)
        yield from (_read_result(submission) for submission in page.submissions or [])
        if not (token := page.next_page_token):
            return


def _read_result(submission: Any) -> Result:
    with quiet_client():
        score, error = clean(submission.public_score), clean(submission.error_description)
        return Result(submission.ref, submission.status.name, score, error, submission.description)


def call(api: "KaggleApi", method: str, competition: str = "", **fields: Any) -> Any:
    """Ask the competitions' service of the client."""
    if competition:
        fields["competition_name"] = competition
    with quiet_client(competition), api.build_kaggle_client() as client:
        from kagglesdk.competitions.types import competition_api_service as types

        return _ask(client.competitions.competition_api_client, types, method, fields)


def call_kernels(api: "KaggleApi", method: str, competition: str = "", **fields: Any) -> Any:
    """Ask the service of scripts and notebooks, of which one may use a competition's data."""
    with quiet_client(competition), api.build_kaggle_client() as client:
        from kagglesdk.kernels.types import kernels_api_service as types

        return _ask(client.kernels.kernels_api_client, types, method, fields)


def _ask(service: Any, types: ModuleType, method: str, fields: dict[str, Any]) -> Any:
    request = getattr(types, f"Api{method.title().replace('_', '')}Request")()
    for name, value in fields.items():
        setattr(request, name, value)
    return getattr(service, method)(request)


def persistently(once: Callable[[], T], seconds: float) -> T:
    """Try again, for so many seconds, while Kaggle is out of reach or has trouble."""
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while True:
        try:
            return once()
        except KaggleError as error:
            wait = error.pause or pause
            if not error.passing or time.monotonic() + wait > end:
                raise
            print(f"{error.said}; trying again in {wait:.0f} s.", flush=True)
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


def download_competition(competition: str, folder: Path) -> None:
    """Download all files of a competition into a new ``folder``, whole or not at all.

    Archives inside Kaggle's one zip (``train.7z``) are left as they are.

    Raises:
        UserError: The folder exists, nobody is logged in, Kaggle refuses, the archive is damaged
            or has a member that climbs out of the folder, or the disk is full.
    """
    if folder.exists():
        raise UserError(f"{folder} is already there; move it away to download it again.")
    api = authenticate()
    try:
        with temporary(folder, folder=True) as place:
            with quiet_client(competition):
                api.competition_download_files(competition, path=str(place), quiet=False)
            [archive] = place.iterdir()
            files = place / "files"
            unzip(archive, files)
            files.rename(folder)
    except zipfile.BadZipFile:
        raise UserError(
            f"what Kaggle sent for {competition} is not a whole zip archive; "
            "run the same command again."
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({error.strerror or error}); "
            "free space or choose another data_dir."
        ) from error


def unzip(archive: Path, folder: Path) -> None:
    """Unpack an archive whose members all stay inside ``folder``.

    Raises:
        UserError: A member would be written elsewhere; nothing is unpacked.
    """
    root = folder.resolve()
    with zipfile.ZipFile(archive) as bundle:
        for name in bundle.namelist():
            if not (root / name).resolve().is_relative_to(root):
                raise UserError(
                    f"{archive.name} holds {name!r}, which would be written outside {folder.name}; "
                    "nothing was unpacked."
                )
        bundle.extractall(folder)


@contextmanager
def quiet_client(competition: str = "") -> Iterator[None]:
    """Keep in what the client prints, end its requests, and raise its errors as one sentence."""
    try:
        with redirect_stdout(io.StringIO()), _time_limit():  # progress bars on stderr are seen
            yield
    except requests.HTTPError as error:
        if error.response is None or error.response.status_code < 400:
            raise _unreadable("HTTPError") from None
        raise _refusal(str(error), error.response, competition) from None
    except requests.JSONDecodeError:
        raise _unreadable("JSONDecodeError") from None
    except requests.RequestException as error:  # its text holds addresses with upload tokens
        raise KaggleError(
            f"Kaggle could not be reached ({type(error).__name__})",
            "check the network and run the same command again.",
        ) from None
    except (UserError, OSError):
        raise
    except Exception as error:  # the client's own
        raise _unreadable(type(error).__name__) from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Give every request of the client a time-out: on a dead connection it would wait for ever."""
    send = HTTPAdapter.send

    def limited(self: HTTPAdapter, *args: Any, **kwargs: Any) -> requests.Response:
        return send(self, *args, **kwargs | {"timeout": kwargs.get("timeout") or TIMEOUT})

    HTTPAdapter.send = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = send  # type: ignore[method-assign]


def _unreadable(reason: str) -> KaggleError:
    """The error for an answer, or credentials, with which the client can do nothing."""
    return KaggleError(
        f"the Kaggle client failed ({reason})",
        "a login page may have answered in Kaggle's place, the client may be too old (pip install "
        "-U kaggle), or kaggle.json, KAGGLE_KEY or KAGGLE_API_TOKEN may be damaged.",
        status=200,
    )


def clean(text: str) -> str:
    """Return a text of the server's without the user's keys, its control characters shown."""
    known = getattr(getattr(sys.modules.get("kaggle"), "api", None), "config_values", None)
    if isinstance(known, dict):
        basic = base64.b64encode(f"{known.get('username')}:{known.get('key')}".encode()).decode()
        for secret in (known.get("key"), known.get("token"), known.get("api_token"), basic):
            text = text.replace(str(secret or basic), "***")
    return visible(text)[:500]


def _refusal(said: str, response: requests.Response, competition: str) -> KaggleError:
    """Return the error for a refusal: what Kaggle said, and the next move."""
    said = clean(said.partition(" for url")[0].rstrip("."))  # it may be a signed address
    page = f"https://www.kaggle.com/competitions/{competition}"
    status, pause = response.status_code, None
    if status == 401:
        remedy = f"make a new token at {TOKEN_PAGE} and log in again."
    elif status == 403 and not competition:
        remedy = f"GPUs and the network ask for a verified phone number: {SETTINGS_PAGE}."
    elif status == 403:
        remedy = f"accept the competition's rules in the browser at {page}/rules, then try again."
    elif status == 404 and competition:
        remedy = f"is {competition!r} the last part of the competition's address, {page}?"
    elif status == 429:
        header = response.headers.get("Retry-After", "")
        pause = float(header) if header.isdecimal() else 60.0
        remedy = f"run the same command again in {pause:.0f} seconds."
    elif status >= 500:
        remedy = "Kaggle has trouble; run the same command again in a few minutes."
    elif not competition:
        remedy = f"see {SETTINGS_PAGE}."
    else:  # 400 is the daily limit, or whatever else the server's words say
        remedy = f"the limits and the deadline are at {page}."
    return KaggleError(f"Kaggle refused ({status}): {said}", remedy, status, pause)
