"""Where a checkpoint's directory comes from: here, or the hub."""

import os
from pathlib import Path

from jaxreason.data import hub
from jaxreason.errors import UserError
from jaxreason.paths import local

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def fetch(path: str | os.PathLike) -> Path:
    """The local directory of ``path``; a hub id that is no directory here is downloaded. Raises UserError."""
    place = local(path)
    if place.is_dir():
        return place
    if place.exists():
        raise UserError(f"{path} is a file; give the directory that holds config.json and the weights")
    name = str(path)
    if not hub.ID.match(name):
        raise UserError(f"{path}: no such directory, and not a hub id of the form OWNER/NAME either")
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    by_hand = f"or download it elsewhere (hf download {name} --local-dir DIR) and give that directory"
    offline = hub.offline()
    try:
        # Weights in sub-directories are other formats of the same model.
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=_FILES, ignore_patterns=["*/*"], local_files_only=offline
        )
    except errors.GatedRepoError:
        message = f"the model is gated: accept its license on {page}, then log in with `hf auth login`, {by_hand}"
    except errors.RepositoryNotFoundError:
        message = "the hub shows no such model: check the name, or log in with `hf auth login` if it is private"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        state = "the hub cannot be reached and it is not in the local cache" if offline else hub.reason(error)
        message = f"{state}; {hub.HELP} ({page})"
    else:
        return Path(found)
    raise UserError(f"{path}: no such directory, and as a hub id: {message}")
