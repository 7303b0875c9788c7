"""The official Kaggle client, spoken to in one place.

The client prints where it should raise, and with ``VERBOSE=1`` prints request headers with the key
in them. Here its prints are kept in, and what goes wrong is told in one sentence.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from core.errors import UserError

if TYPE_CHECKING:  # importing the client logs in, so that waits until an account is asked for
    from kaggle.api.kaggle_api_extended import KaggleApi

TOKEN_PAGE = "https://www.kaggle.com/settings/api"


class NoCredentials(UserError):
    """Nobody is logged in to Kaggle on this machine."""


@dataclass(frozen=True)
class Result:
    """What Kaggle says of a submission, which is PENDING, COMPLETE or in ERROR."""

    status: str
    public_score: str
    error: str


def authenticate() -> "KaggleApi":
    """Log in with what the client finds: a token, ``kaggle.json`` or ``kaggle auth login``.

    Raises:
        NoCredentials: There are no credentials, or Kaggle does not know the token.
        UserError: Kaggle could not be asked whether the token is valid.
    """
    try:
        with quiet_client():
            import kaggle

            kaggle.api.authenticate()  # the import tried too, but hid why it failed
    except SystemExit:
        raise NoCredentials(
            "no valid Kaggle credentials were found; run `kaggle auth login`, or make a token at "
            f"{TOKEN_PAGE} and put it into KAGGLE_API_TOKEN."
        ) from None
    return kaggle.api


def has_credentials() -> bool:
    """Whether somebody is logged in to Kaggle on this machine."""
    try:
        authenticate()
    except NoCredentials:
        return False
    return True


def send(api: "KaggleApi", csv: Path, message: str, competition: str) -> int:
    """Submit a file and return Kaggle's reference.

    Raises:
        UserError: Kaggle did not take the submission.
    """
    with quiet_client(competition):
        answer = api.competition_submit(str(csv), message, competition, quiet=True)
    if not answer.ref:  # a failed upload is not an exception of the client
        raise UserError(
            f"Kaggle took no submission from {csv}: {answer.message.rstrip('.')}; "
            "run the same command again in a few minutes."
        )
    return answer.ref


def results(api: "KaggleApi", competition: str) -> dict[int, Result]:
    """The newest 200 submissions to a competition by reference; 200 is Kaggle's largest page."""
    with quiet_client(competition):
        submissions = api.competition_submissions(competition, page_size=200)
    return {
        s.ref: Result(s.status.name, s.public_score, s.error_description)
        for s in submissions or []
        if s is not None
    }


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            with quiet_client(competition):
                api.competition_download_files(competition, path=temporary, quiet=False)
            [archive] = Path(temporary).iterdir()
            files = Path(temporary, "files")
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
    """Keep in what the client prints, and tell its errors in one sentence."""
    try:
        with redirect_stdout(io.StringIO()):  # progress bars go to stderr and are seen
            yield
    except requests.HTTPError as error:
        raise UserError(sentence(error, competition)) from error
    except requests.RequestException as error:  # its text holds addresses with upload tokens
        raise UserError(
            f"Kaggle could not be reached ({type(error).__name__}); "
            "check the network and run the same command again."
        ) from error


def sentence(error: requests.HTTPError, competition: str) -> str:
    """What Kaggle said, and the next move."""
    said = str(error).partition(" for url")[0].rstrip(".")  # the address may be a signed one
    page = f"https://www.kaggle.com/competitions/{competition}"
    status = error.response.status_code
    if status == 401:
        remedy = f"make a new token at {TOKEN_PAGE} and log in again."
    elif status == 403:
        remedy = f"accept the competition's rules in the browser at {page}/rules, then try again."
    elif status == 404:
        remedy = f"is {competition!r} the last part of the competition's address, {page}?"
    elif status == 429:
        wait = error.response.headers.get("Retry-After", "60")
        remedy = f"run the same command again in {wait} seconds."
    elif status >= 500:
        remedy = "Kaggle has trouble; run the same command again in a few minutes."
    else:  # 400 is the daily limit, or whatever else the server's words say
        remedy = f"the limits and the deadline are at {page}."
    return f"Kaggle refused ({status}): {said}; {remedy}"
