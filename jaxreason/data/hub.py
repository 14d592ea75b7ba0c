"""Whether the hub can be reached, found out at once instead of after the hub client's minute of retries."""

import os
import re
import socket

ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
HELP = (
    "log in with `hf auth login` (and accept the licence on its page) if it is gated, download it where there is a "
    "network and give the directory, or check the name"
)


def offline() -> bool:
    """True where the user asked for no network or the hub's name does not resolve."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    # Behind a proxy names need not resolve here.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    host = constants.ENDPOINT.split("://")[-1].split("/")[0].split(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def reason(error: BaseException) -> str:
    """The first line of a hub client's message, which often is a page long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
