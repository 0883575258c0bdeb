"""The Hugging Face hub: limits retries and timeouts, classifies errors, and works offline without a network."""

import functools
import inspect
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import _http, httpx, validate_repo_id  # the httpx whose errors it raises

from console import InputError


class StreamError(RuntimeError):
    """The hub could not be reached or failed; the same command may work later. The message is one line."""

    exit_code = 3


def limit_retries() -> None:
    """Limit the retries in `datasets` (20 by default) and huggingface_hub (5), which would multiply with ours.

    The libraries retry a failed request twice, within 3 s or after the time that the hub asks for. This ends most
    faults, and the file stays open. They do not retry a request that times out.
    """
    config = datasets.config
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1  # attempts; an interval follows each
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    for function in (_http.http_backoff, _http.http_stream_backoff):
        defaults = inspect.unwrap(function).__kwdefaults__  # huggingface_hub has no setting for these
        defaults.update(max_retries=2, retry_on_exceptions=(httpx.NetworkError, httpx.RemoteProtocolError))
    set_timeouts()


@functools.cache  # setting the factory closes all open connections
def set_timeouts() -> None:
    """Give every request to the hub a timeout of HF_HUB_DOWNLOAD_TIMEOUT (10 s); by default some have none."""
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> httpx.Client:
    client = _http.default_client_factory()
    client.event_hooks["request"].append(limit_timeout)
    client.event_hooks["response"].append(check_length)
    return client


def limit_timeout(request: httpx.Request) -> None:
    if request.method in ("GET", "HEAD"):  # an upload may take longer
        limit = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        timeouts = request.extensions["timeout"].items()
        request.extensions["timeout"] = {kind: limit if time is None else min(time, limit) for kind, time in timeouts}


def check_length(response: httpx.Response) -> None:
    """Raise an error for a truncated response, which `datasets` would mistake for the end of the file."""
    requested = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("range", ""))
    if requested and response.status_code in (200, 206):
        length, found = int(requested[2]) - int(requested[1]) + 1, len(response.read())
        if found != length:
            raise httpx.RemoteProtocolError(f"the hub sent {found} bytes instead of {length}")


def is_transient(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a network or server error, so that a retry may succeed."""
    while error is not None:
        if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
            return error.response.status_code == 429 or error.response.status_code >= 500
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a hub name. The hub is not queried."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def stay_offline_without_network(*names: str) -> None:
    """If one of `names` is not a local path and the hub is unreachable, use only the local cache, without retries."""
    if not all(Path(name).exists() for name in names) and not hub_reachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def offline_hint(name: str) -> str:
    """Advice for an error message if the hub is unreachable; empty if it is reachable or `name` is local."""
    if Path(name).exists() or hub_reachable():
        return ""
    return ". Without a network, try `python main.py demo`, or set model_name and dataset_path to local ones"


def hub_reachable() -> bool:
    """Whether the hub's address accepts a connection within 5 s. A proxy is assumed to work."""
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        url = urlsplit(endpoint)
        address = url.hostname, url.port or {"https": 443, "http": 80}[url.scheme]
        if not url.hostname:
            raise ValueError("it names no host")
    except (ValueError, KeyError) as error:
        raise InputError(f"HF_ENDPOINT = {endpoint!r} is not a URL such as https://huggingface.co") from error
    if {url.scheme, "all"} & getproxies().keys():
        return True
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
