"""Credentials in a location: refused before they can reach a log, a record or a database."""

from __future__ import annotations

import re

SIGNED = re.compile(
    r"(?i)(?:^|&)(x-amz-\w[\w-]*|x-goog-\w[\w-]*|sig|signature|[\w-]*token|[\w-]*secret[\w-]*|"
    r"password|api-?key|awsaccesskeyid)="
)


def refuse_credentials(location: str) -> str:
    """`location` unless it holds a user, a password or a signature.

    Locations are written into the store, the report and the database of the flows' server.

    Raises:
        ValueError: it does; the message does not repeat them.
    """
    for url in location.split("::"):
        if "://" not in url:
            continue
        scheme, _, rest = url.partition("://")
        host = rest.partition("/")[0]
        query = rest.partition("?")[2]
        # A secret may have slashes: "KEY:se/cret@bucket". After a host a colon begins a port only.
        _, colon, port = host.rpartition("]")[2].partition(":")
        is_split = bool(colon) and (not port.isdigit() or "@" in rest)
        if "@" in host or is_split or SIGNED.search(query):
            raise ValueError(
                f"a {scheme} location holds credentials; they would be stored with the result: "
                "give them by environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE), or fetch the file first"
            )
    return location
