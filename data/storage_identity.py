"""Which files a URL and its options lead to: the name of a data set in the cache.

Two data sets must never have the same name, or the cache serves the bytes of one for the other. Two
signed URLs of one data set should have the same, or nothing is found again once a signature has
expired. So only what is known to be a credential is left out, and whatever else is there stays in.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import fsspec.config

from groundwork.data.storage_names import HTTP


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What signs a URL -> what comes with it and is left out with it, in lower case. A parameter that
#: merely has such a name (`?st=...` without a `sig`) may select a file, and is kept.
SIGNATURES: Mapping[frozenset[str], frozenset[str]] = {
    # S3 and what imitates it (version 4), Google (version 4)
    frozenset({"x-amz-signature"}): _words(
        "x-amz-algorithm x-amz-credential x-amz-date x-amz-expires x-amz-security-token "
        "x-amz-signedheaders"
    ),
    frozenset({"x-goog-signature"}): _words(
        "x-goog-algorithm x-goog-credential x-goog-date x-goog-expires x-goog-signedheaders"
    ),
    # S3 and Google (version 2), CloudFront
    frozenset({"signature"}): _words(
        "expires policy key-pair-id awsaccesskeyid googleaccessid hash-algorithm "
        "x-amz-security-token"
    ),
    # Azure
    frozenset({"sig"}): _words(
        "se sp sv sr st spr sip ss srt ses skoid sktid skt ske sks skv saoid suoid scid"
    ),
    # content delivery networks; a token that does not expire may be the name of a share
    frozenset({"token", "expires"}): frozenset({"token_path"}),
}

#: Options that are credentials, or say how to connect and not whereto.
NOT_IDENTITY = _words(
    "key secret token password passwd credential credentials access_key secret_key account_key "
    "sas_token client_secret session session_token username_password anon requester_pays "
    "config_kwargs aws_access_key_id aws_secret_access_key aws_session_token "
    "default_block_size default_cache_type default_fill_cache skip_instance_cache "
    "use_listings_cache listings_expiry_time max_concurrency timeout"
)
#: Parts of the names of HTTP headers that hold credentials, and headers that change no file.
SECRET_HEADERS = ("auth", "token", "secret", "key", "signature", "cookie", "password")
IDLE_HEADERS = frozenset({"user-agent", "referer", "connection"})
#: Parts of a connection string of Azure that hold credentials.
SECRET_PARTS = ("accountkey=", "sharedaccesssignature=", "sharedaccesskey=")

#: Protocol -> what of the environment leads its URLs to another server.
ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "s3": (
        *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
        # a profile may name an endpoint
        *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CONFIG_FILE"),
    ),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "hf": ("HF_ENDPOINT",),
    "abfs": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"),
}
SAME_PROTOCOL = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "adl": "abfs"}


def identity(url: str, options: Mapping[str, Any]) -> str:
    """A digest of all that decides which files are below a URL, without the credentials.

    That is the URL with its user and query, but without password and signature; the options of
    the file system (its endpoint, its account); and the endpoint that the environment sets.
    """
    protocols = url.partition("://")[0].lower().split("::")
    configured = {}
    if not HTTP.match(url) and protocols != ["hf"]:  # those two do not go through fsspec
        configured = {name: _plain(fsspec.config.conf.get(name) or {}) for name in protocols}
    variables = {
        variable: _plain(os.environ[variable], variable)
        for protocol in protocols
        for variable in ENVIRONMENT.get(SAME_PROTOCOL.get(protocol, protocol), ())
        if os.environ.get(variable)
    }
    parts = [unsigned(url), _plain(options), configured, variables]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def unsigned(url: str) -> str:
    """A URL without password, and if it is one of HTTP without signature and fragment."""
    if not HTTP.match(url):
        # to fsspec a question mark is part of a name
        protocol, mark, rest = url.partition("://")
        place, slash, path = rest.partition("/")
        return f"{protocol.lower()}{mark}{_without_password(place)}{slash}{path}".rstrip("/")
    parts = urlsplit(url)
    return parts._replace(
        netloc=_without_password(parts.netloc, lower=True),
        path=parts.path.rstrip("/"),
        query=_unsigned_query(parts.query),
        fragment="",  # never sent
    ).geturl()


def _without_password(place: str, *, lower: bool = False) -> str:
    user, mark, host = place.rpartition("@")
    return f"{user.partition(':')[0]}{mark}{host.lower() if lower else host}"


def _unsigned_query(query: str) -> str:
    named = [
        (unquote_plus(part.partition("=")[0]).lower(), part) for part in query.split("&") if part
    ]
    present = {name for name, _ in named}
    dropped: set[str] = set()
    for signing, accompanying in SIGNATURES.items():
        if signing <= present:
            dropped |= signing | accompanying
    return "&".join(part for name, part in named if name not in dropped)


def _plain(value: Any, name: str = "") -> Any:
    """An option as JSON, the same in every process, without credentials."""
    if isinstance(value, Mapping):
        keep = _is_header if name == "headers" else _is_option
        return {str(key): _plain(v, str(key)) for key, v in value.items() if keep(str(key).lower())}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, str) and name.lower().endswith("connection_string"):
        return [p for p in value.split(";") if not p.strip().lower().startswith(SECRET_PARTS)]
    if value is None or isinstance(value, str | int | float):
        return value
    # the text of an object often holds its address, which is another in every process
    return type(value).__qualname__


def _is_option(name: str) -> bool:
    return name not in NOT_IDENTITY


def _is_header(name: str) -> bool:
    return name not in IDLE_HEADERS and not any(part in name for part in SECRET_HEADERS)
