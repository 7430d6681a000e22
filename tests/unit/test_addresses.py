"""What of an address is shown."""

import pytest

from ml.addresses import public_text, public_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.org/a/b.tar.gz", "https://example.org/a/b.tar.gz"),
        ("https://me:s3cret@example.org:8443/a", "https://example.org:8443/a"),
        ("https://me:s3@cret@example.org/a", "https://example.org/a"),
        ("https://example.org/a?X-Amz-Signature=s3cret#s3cret", "https://example.org/a"),
        ("s3://key:s3cret@bucket/a", "s3://bucket/a"),
        ("file:///var/data", "file:///var/data"),
        ("http://[s3cret/", "(an address that cannot be read)"),
    ],
)
def test_an_address_is_shown_without_what_lets_one_in(url, shown):
    assert public_url(url) == shown


def test_addresses_in_a_message_are_shown_so_too():
    said = "API request to http://me:s3cret@127.0.0.1:9/api?token=s3cret failed with 'https://x:s3cret@y/z' (no route)"
    assert public_text(said) == "API request to http://127.0.0.1:9/api failed with 'https://y/z' (no route)"
    assert public_text("nothing to hide") == "nothing to hide"
