"""What of an address is written down: credentials never, everything else byte by byte."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd.core.addresses import public_address, public_text, public_values
from svd.core.errors import UserError
from svd.core.retries import Unreachable

AWS = "X-Amz-Algorithm=a&X-Amz-Credential=SECRET&X-Amz-Date=1&X-Amz-Security-Token=SECRET&X-Amz-Signature=SECRET"

KEYS = (
    *("secret_key", "access_key", "secretKey", "secret-access-key", "private_key", "app_key", "subscription-key"),
    *("session_id", "PHPSESSID", "jsessionid", "passphrase", "credentials", "api_key_id"),
)


@pytest.mark.parametrize(
    ("full", "shown"),
    [
        ("https://user:SECRET@host:8/a.mp4", "https://host:8/a.mp4"),
        ("https://SECRET@host/a.mp4?v=1", "https://host/a.mp4?v=1"),
        ("http://user:SECRET@SECRET@host", "http://host"),
        (f"https://host/a.mp4?{AWS}", "https://host/a.mp4"),
        (f"https://host/a.mp4?versionId=3&{AWS}", "https://host/a.mp4?versionId=3"),
        (f"https://host/a.tar?{AWS}#b/c.mp4", "https://host/a.tar#b/c.mp4"),
        ("https://host/watch?v=1;token=SECRET", "https://host/watch?v=1"),
        ("https://host/a.mp4?X-Goog-Credential=SECRET&X-Goog-Signature=SECRET", "https://host/a.mp4"),
        ("https://host/a.mp4?Expires=1&Key-Pair-Id=SECRET&Signature=SECRET&Policy=SECRET", "https://host/a.mp4"),
        ("https://host/a.mp4?AWSAccessKeyId=SECRET&Expires=1&Signature=SECRET", "https://host/a.mp4"),
        ("https://host/a.mp4?sv=2&st=1&se=2&sr=b&sp=r&sig=SECRET", "https://host/a.mp4"),
        ("HTTPS://host/a b.mp4?key=SECRET&access_token=SECRET&%74oken=SECRET", "HTTPS://host/a b.mp4"),
        ("ytdl:https://user:SECRET@host/watch?v=1&key=SECRET", "ytdl:https://host/watch?v=1"),
        *((f"https://host/a.mp4?v=1&{name}=SECRET", "https://host/a.mp4?v=1") for name in KEYS),
        ("https://host/a.mp4?v=1&md5=SECRET&expires=3", "https://host/a.mp4?v=1"),
        ("https://host/a.mp4?md5=SECRET&token=SECRET", "https://host/a.mp4"),
        ("https://host/a.mp4#t=3&access_token=SECRET", "https://host/a.mp4#t=3"),
        ("https://user:SECRET/SECRET@host/a.mp4", "https://host/a.mp4"),
        ("https://user:SECRET?SECRET@SECRET@host/a.mp4", "https://host/a.mp4"),
        ("postgresql://host/db?user=u&password=SECRET&sslmode=require", "postgresql://host/db?user=u&sslmode=require"),
        ("postgresql+asyncpg://user:SECRET@host:5432/mlflow", "postgresql+asyncpg://host:5432/mlflow"),
    ],
)
def test_credentials_are_left_out(full: str, shown: str) -> None:
    assert public_address(full) == shown
    assert public_address(shown) == shown


@pytest.mark.parametrize(
    "address",
    [
        *("https://host/watch?v=abc&&t=3", "https://host/a.mp4?", "https://host/@me/a.mp4?author=x&sp=1&se=2"),
        *("s3://bucket/a?token=b.mp4", "videos/a@b.mp4?key=1", "ytdl:https://host/?v=1", "sqlite:////x/mlflow.db", ""),
        *("https://host/a.mp4#t=3", "file:///a/b@c?sig=d", "s3://bucket/a#token=b", "http://[::1]:80/@me"),
        *("https://host:8080/@me/a.mp4", "https://host/get?key=film%2Fone.mp4", "https://host/get?md5=0123"),
        *("https://host/a?policy=x", "https://host/a?expires=1", "https://host/a?monkey=1&foreign_key=2&max_tokens=3"),
        *("https://host/a?tokenizer=x&keyframe=3&author=me&passage=4&design=5", "https://host/a?sessions=2"),
    ],
)
def test_addresses_without_credentials_stay_byte_equal(address: str) -> None:
    assert public_address(address) == address
    assert public_text(address) == address


@given(st.text())
def test_a_text_without_addresses_stays(text: str) -> None:
    assert public_text(text.replace("://", "")) == text.replace("://", "")


@pytest.mark.parametrize("end", ["", ": refused", ", ", ").", "'", '"}', "\nnext"])
def test_addresses_inside_a_text(end: str) -> None:
    text = f"see ('http://u:SECRET@h/a?v=1&sig=SECRET{end} and s3://b/c"
    assert public_text(text) == f"see ('http://h/a?v=1{end} and s3://b/c"


def test_a_password_may_have_a_quotation_mark() -> None:
    assert public_text("'https://u:SEC'RET@h/a.mp4': refused, 'x@y'") == "'https://h/a.mp4': refused, 'x@y'"


def test_options_of_a_preset() -> None:
    given = {"paths": ["https://u:SECRET@h/a b?sig=SECRET", "list.csv"], "deep": {"n": 3, "url": "http://SECRET@h"}}
    assert public_values(given) == {"paths": ["https://h/a b", "list.csv"], "deep": {"n": 3, "url": "http://h"}}


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_errors_name_no_credentials(kind: type[UserError]) -> None:
    error = kind("https://u:SECRET@h/a.mp4?sig=SECRET: refused")
    assert str(error) == "https://h/a.mp4: refused"
    assert "SECRET" not in repr(pickle.loads(pickle.dumps(error)))
