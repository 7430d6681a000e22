"""What of an address may be shown: where something lies, without what lets one in.

An address may hold a password, and its query a signature that stands for one (a presigned URL). Logs, errors,
manifests and tags show it as it is written here.
"""

import re
import urllib.parse

_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def public_url(url: str) -> str:
    """`url` without user, password, query and fragment. What cannot be read as a URL is not shown at all."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "(an address that cannot be read)"
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def public_text(text: str) -> str:
    """A message of somebody else's with every URL in it as `public_url` shows it."""
    return _URL.sub(lambda found: public_url(found[0]), text)
