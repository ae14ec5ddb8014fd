"""Check whether the model hub can be reached, and describe its errors. Imports nothing heavy."""

import functools
import os
import re

_TIMEOUT = 4.0  # seconds
_DEFAULT_ENDPOINT = "https://huggingface.co"
_HUB_PAGE = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


@functools.cache
def hub_reachable() -> bool:
    """Return whether the hub answers. Only the first call sends a request (at most 5 seconds)."""
    # No request is sent if the user turned the hub off, or if its address is not a web address.
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper()
    if offline in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
    if not endpoint.startswith(("https://", "http://")):
        return False

    import threading
    import urllib.request

    answers: list[int] = []

    def ask() -> None:
        # The scheme of the address was checked above.
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
                answers.append(answer.status)
        except (OSError, ValueError):  # unreachable, an error status, or not an address
            pass

    # The lookup of the host name has no timeout, so another thread sends the request. If it hangs,
    # this function returns without it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT + 0.5)
    return bool(answers)


def hub_id_in(address: str) -> str:
    """Return the hub id in the address of a page of the hub, or "" if it is another address."""
    found = _HUB_PAGE.match(address)
    return found[1] if found else ""


def reason_of(problem: Exception) -> str:
    """Return the first line of an error of the hub's client, with advice.

    A server may repeat the user's token, so the token is removed.
    """
    from huggingface_hub import get_token

    lines = [line for line in str(problem).splitlines() if line.strip()]
    reason = lines[0] if lines else type(problem).__name__

    token = get_token()
    if token:
        reason = reason.replace(token, "(token)")
    advice = "check the name, or run hf auth login"
    if not hub_reachable():
        advice = "the hub can't be reached: connect, or set HF_HUB_OFFLINE=0 if it is set"
    return f"{reason}; {advice}"
