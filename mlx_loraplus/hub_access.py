"""Whether the model hub can be asked at all, and what went wrong there. Nothing heavy is imported here."""

import functools
import os

_HUB_SECONDS = 4.0  # for the whole look at the hub


@functools.cache
def hub_reachable() -> bool:
    """Find out, once per process and within 5 seconds, whether the hub answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        return False
    import threading
    import urllib.request

    answers: list[int] = []

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 (the scheme was checked)
        try:
            with urllib.request.urlopen(request, timeout=_HUB_SECONDS) as answer:  # noqa: S310
                answers.append(answer.status)
        except (
            OSError,
            ValueError,
        ):  # refused, timed out, no such host, an error status, not an address at all
            pass

    asking = threading.Thread(
        target=ask, daemon=True
    )  # a name server may hang where no time-out reaches
    asking.start()
    asking.join(_HUB_SECONDS + 0.5)
    return bool(answers)


def reason_of(problem: Exception) -> str:
    """Return the first line of what the hub's client raised, and advice; no token, since a server may say anything."""
    from huggingface_hub import get_token

    line = next(
        (line for line in str(problem).splitlines() if line.strip()), type(problem).__name__
    )
    said = line.replace(get_token() or "\0", "(token)")
    return f"{said}; check the name, or run hf auth login"
