"""Uploads a folder to the Hugging Face hub, after asking whether it may."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from alignlab.errors import MachineError

TRANSPORT_ERROR = HfHubHTTPError.__mro__[1]  # of the HTTP client below huggingface_hub, which has changed with versions


def check_push(repository: str, public: bool) -> None:
    """Raises MachineError where a push to `repository` could only fail, or would publish what was not meant to be.

    Asked before any work: the token, and whether an existing repository can be seen by everybody.
    """
    if repository.count("/") != 1:
        raise MachineError(f"--push {repository} is no place on the hub; write USER/NAME")
    with _explained(repository):
        validate_repo_id(repository)
        HfApi().whoami()
        with contextlib.suppress(RepositoryNotFoundError):
            if HfApi().model_info(repository).private is False and not public:
                raise MachineError(f"{repository} is there already and public; add --public if that is meant")


def push(folder: Path, repository: str, public: bool, message: str) -> str:
    """Uploads all files of a folder into a model repository, private unless told otherwise; returns its address."""
    with _explained(repository, f"; {folder} is whole: hf upload {repository} {folder}"):
        url = HfApi().create_repo(repository, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        return str(url)


@contextlib.contextmanager
def _explained(repository: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError:
        raise MachineError(
            f"--push {repository} needs a hub token; log in with `hf auth login`, or set HF_TOKEN{remedy}"
        ) from None
    except HFValidationError as e:
        raise MachineError(f"--push {repository} is no place on the hub: {_first_line(e)}") from None
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise MachineError(
                f"the hub refuses this token for {repository} ({status}); log in with `hf auth login` and a token "
                f"that may write there{remedy}"
            ) from None
        raise MachineError(f"the hub did not take {repository}: {_first_line(e)}{remedy}") from None
    except (TRANSPORT_ERROR, OSError) as e:  # type: ignore[misc]  # its base is an exception as well
        raise MachineError(f"the hub cannot be reached ({_first_line(e)}){remedy}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
