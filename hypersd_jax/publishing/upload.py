"""Upload a folder to the hub, through huggingface_hub; every failure is one line, and none shows a token."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from hypersd_jax.errors import UserError
from hypersd_jax.publishing.target import MARK


def require_login(repo: str) -> None:
    """UserError where there is no token to upload with, so that nobody waits for images in vain."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; --dry-run writes the folder alone")
    if get_token() is None:
        raise UserError(f"{repo}: uploading needs a token; set HF_TOKEN or run `hf auth login` (--dry-run needs none)")


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Make the repository where there is none, put the folder into it as one commit, and return its address.

    Args:
        folder: from `write_folder`.
        repo: ``owner/name``.
        private: nobody else may see it; one that is there and public is refused rather than made private.

    Raises:
        UserError: it is refused, the hub does not answer, or the upload breaks off; nothing then is committed.
    """
    from huggingface_hub import HfApi  # slow to import

    api = HfApi(library_name="hypersd_jax")
    with _explained(repo), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it makes of its own HTTP library
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(f"{repo}: is there already and public; make it private first, or leave --private out")
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="LoRAs, by hypersd_jax", ignore_patterns=[MARK]
        )
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    endpoint = constants.ENDPOINT
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{endpoint} answered {status}"
        reason += {401: "; the token is not valid", 403: "; the token may not write there"}.get(status, "")
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = f"{endpoint} does not answer, or broke off ({type(error).__name__}); run the command again"
    except ValueError as error:  # the hub's complaint about the card
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except RuntimeError as error:  # of the transfer
        reason = f"the transfer to {endpoint} broke off ({type(error).__name__})"
    else:
        return
    raise UserError(f"{repo}: not uploaded: {reason}")
