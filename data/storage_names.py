"""Names of files inside a data set, and what becomes of them in a URL."""

import re
from urllib.parse import quote, urlsplit, urlunsplit

#: (file, begin, end): bytes begin..end-1.
Range = tuple[str, int, int]

HTTP = re.compile(r"https?://", re.IGNORECASE)


def check_name(name: str) -> None:
    """Refuse what could lead out of the folder of the data set."""
    parts = name.split("/")
    if not all(parts) or {".", ".."}.intersection(parts) or "\\" in name or "\0" in name:
        raise ValueError(
            f"file name {name!r}: expected a path inside the data set, without '..', '\\' or a "
            "leading '/'"
        )


def join_url(folder: str, name: str) -> str:
    """The URL of a file. A query (the signature of a signed folder URL) stays behind the path."""
    if not HTTP.match(folder):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def split_url(url: str) -> tuple[str, str]:
    """(folder, rest) of a path or URL whose last part names files: `s3://b/x-{00..09}.tar`."""
    query = ""
    if HTTP.match(url):
        url, mark, query = url.partition("?")
        query = mark + query
    folder, _, rest = url.rpartition("/")
    return folder + query, rest
