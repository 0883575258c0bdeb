"""The Hugging Face hub: how long it is waited for, which of its faults may pass, and what is done without it."""

import functools
import inspect
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub
from huggingface_hub.utils import _http, httpx  # the httpx whose errors it raises


class StreamError(RuntimeError):
    """The data cannot be read on for a reason that may pass; the same command may work later. One line says it."""

    exit_code = 3


def give_up_soon() -> None:
    """Bound what the hub's libraries do by themselves: their tries, 20 of 6 requests, would multiply with ours.

    A request that fails is made three times in 3 s, or when the hub says, so that not every fault makes us read a file
    anew; one that gets no answer in time is made once.
    """
    for layer in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{layer}_MAX_RETRIES", 1)  # counts the first try; a pause follows each
    for pause in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{pause}_RETRY_INTERVAL", 0)
    for function in (_http.http_backoff, _http.http_stream_backoff):
        defaults = inspect.unwrap(function).__kwdefaults__  # there is no setting
        defaults.update(max_retries=2, retry_on_exceptions=(httpx.NetworkError, httpx.RemoteProtocolError))
    never_wait_for_ever()


@functools.cache  # it closes the connections that there are
def never_wait_for_ever() -> None:
    """No request to the hub waits longer than HF_HUB_DOWNLOAD_TIMEOUT (10 s); by themselves some do for ever."""
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> httpx.Client:
    client = _http.default_client_factory()
    client.event_hooks["request"].append(limit_wait)
    client.event_hooks["response"].append(check_length)
    return client


def limit_wait(request: httpx.Request) -> None:
    if request.method in ("GET", "HEAD"):  # an upload may take longer
        limit = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = request.extensions["timeout"]
        request.extensions["timeout"] = {of: limit if wait is None else min(wait, limit) for of, wait in asked.items()}


def check_length(response: httpx.Response) -> None:
    """An answer that ends early without a word would be taken for the end of the file."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("range", ""))
    if asked and response.status_code in (200, 206):
        length, found = int(asked[2]) - int(asked[1]) + 1, len(response.read())
        if found != length:
            raise httpx.RemoteProtocolError(f"the hub sent {found} bytes where {length} were asked for")


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of the network or the server, so that a later try may succeed."""
    while error is not None:
        if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            return status == 429 or status >= 500
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def stay_offline_without_network(*names: str) -> None:
    """Where a hub name is asked for and the hub cannot be reached, look in the local cache alone, without retries."""
    if not all(Path(name).exists() for name in names) and not hub_reachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def offline_hint(name: str) -> str:
    """What to do about a hub that cannot be reached; empty if it can, or if `name` is local."""
    if Path(name).exists() or hub_reachable():
        return ""
    return ". Without a network, try `python main.py demo`, or name a local model_name and dataset_path"


def hub_reachable() -> bool:
    """Whether something answers at the hub's address within a few seconds (a proxy is taken to work)."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return False
    return True
