"""An exported folder, sent to a hub as a model of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.model_card import NAME, for_hub
from tsqlora_scale.model.weight_files import DESCRIPTION


def check_push(repo: str) -> None:
    """What can be seen wrong before anything is written.

    Raises:
        UserError: a name that is none, no token, or a hub that is switched off.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo!r}: is no name of a repository ({_line(error)}); give NAMESPACE/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {repo!r}: HF_HUB_OFFLINE is set, so no hub is asked; unset it")
    if get_token() is None:
        raise UserError(f"--push {repo!r}: no token is there to write with; run 'hf auth login', or set HF_TOKEN")


def push(folder: Path, repo: str, *, public: bool) -> list[str]:
    """Send the files of ``folder`` to the repository ``repo``, made private where it is new. On one process.

    Returns:
        What is worth saying about it, line by line.

    Raises:
        UserError: the hub is not reached, or refuses; or the repository is there and public, against ``public``.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as place:
        sent = Path(place) / "model"
        shutil.copytree(folder, sent, copy_function=_link)
        card = sent / NAME
        if card.is_file():
            text = for_hub(card.read_text(encoding="utf-8"))
            card.unlink()  # a link to the folder's own
            card.write_text(text, encoding="utf-8")
        try:
            url = api.create_repo(repo, private=not public, exist_ok=True)
            if not public and _is_public(api, url.repo_id):
                raise UserError(f"--push {repo!r}: is there and open to everybody; give --public, or another name")
            api.upload_folder(repo_id=url.repo_id, folder_path=sent, commit_message="Upload a trained adapter")
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            remedy = "give a token that may write there" if status in (401, 403) else "try again later"
            raise UserError(f"--push {repo!r}: {api.endpoint} refuses ({_line(error)}); {remedy}") from None
        except UserError:
            raise
        except Exception as error:  # of the network, of whatever library speaks to it
            raise UserError(
                f"--push {repo!r}: {api.endpoint} cannot be reached ({type(error).__name__}: {_line(error)}); look at "
                "the network and HF_ENDPOINT"
            ) from None
    return [f"pushed: {url} ({'public' if public else 'private'})", *_local_base(folder)]


def _is_public(api: HfApi, repo: str) -> bool:
    """Whether the hub says that everybody may read; it need not say."""
    try:
        return api.model_info(repo).private is False
    except HfHubHTTPError:
        return False


def _local_base(folder: Path) -> list[str]:
    path = folder / DESCRIPTION
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path.is_file() else None
    if base is None or not Path(base).is_dir():
        return []
    return [f"its {DESCRIPTION} names a folder of this machine as the base ({base}): others need that model, too"]


def _link(source: str, target: str) -> str:
    """A name for the same file, or a copy where disks differ: merged models are large."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
