"""Every verifier of Standard Webhooks accepts a signed callback, and no forgery passes ours."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_network

import pytest
import standardwebhooks
import svix.webhooks
from openai import OpenAI

from headrace_shared import errors, webhooks
from headrace_shared.ids import Tenant

SECRET = webhooks.tenant_secret(b"master key", Tenant("acme"))
OLD_SECRET = webhooks.tenant_secret(b"former master key", Tenant("acme"))
ID = "evt_0199e0c6f2a27d0c8f1ba2d4f3e5a6b7"
BODY = '{"type": "job.succeeded", "data": {"name": "Zoë"}}'.encode()
NOW = datetime(2026, 10, 5, 12, 0, 0, 400_000, tzinfo=UTC)


def signed(secret: str | list[str] = SECRET, at: datetime = NOW) -> dict[str, str]:
    return {
        "Webhook-Id": ID,
        "Webhook-Timestamp": str(int(at.timestamp())),
        "Webhook-Signature": webhooks.sign(secret, ID, at, BODY),
    }


def by_standardwebhooks(headers: dict[str, str]) -> None:
    standardwebhooks.Webhook(SECRET).verify(BODY, headers)


def by_svix(headers: dict[str, str]) -> None:
    svix.webhooks.Webhook(SECRET).verify(BODY, headers)


def by_openai(headers: dict[str, str]) -> None:
    lowered = {name.lower(): value for name, value in headers.items()}
    with OpenAI(api_key="unused") as client:
        client.webhooks.verify_signature(BODY, lowered, secret=SECRET)


@pytest.mark.parametrize("verify", [by_standardwebhooks, by_svix, by_openai])
@pytest.mark.parametrize("secrets", [[SECRET], [OLD_SECRET, SECRET]], ids=["one", "rotation"])
def test_three_independent_verifiers_accept_it(
    verify: Callable[[dict[str, str]], None], secrets: list[str]
) -> None:
    verify(signed(secrets, datetime.now(UTC)))


@pytest.mark.parametrize("verify", [by_standardwebhooks, by_svix, by_openai])
def test_three_independent_verifiers_reject_another_secret(verify: Callable[[dict[str, str]], None]) -> None:
    with pytest.raises(Exception, match="ignature"):
        verify(signed(OLD_SECRET, datetime.now(UTC)))


def test_ours_accepts_what_standardwebhooks_signs() -> None:
    signature = standardwebhooks.Webhook(SECRET).sign(ID, NOW, BODY.decode())
    webhooks.verify(BODY, signed() | {"Webhook-Signature": signature}, SECRET, now=NOW)


def test_the_moment_counts_and_not_its_spelling() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert webhooks.sign(SECRET, ID, elsewhere, BODY) == webhooks.sign(SECRET, ID, int(NOW.timestamp()), BODY)


@pytest.mark.parametrize(
    "change",
    [
        {"Webhook-Id": ID[:-1] + "0"},
        {"Webhook-Timestamp": str(int(NOW.timestamp()) + 1)},
        {"Webhook-Timestamp": "1e9"},
        {"Webhook-Timestamp": "١٢٣"},
        {"Webhook-Signature": ""},
        {"Webhook-Signature": "v1,"},
        {"Webhook-Signature": "v1"},
        {"Webhook-Signature": "v1,not base64 é, v1a,AAAA"},
        {"Webhook-Signature": signed()["Webhook-Signature"].replace("v1,", "v2,")},
    ],
)
def test_a_changed_header_is_rejected(change: dict[str, str]) -> None:
    with pytest.raises(errors.WebhookVerificationFailed):
        webhooks.verify(BODY, signed() | change, SECRET, now=NOW)


@pytest.mark.parametrize("name", ["Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"])
def test_a_missing_header_is_named(name: str) -> None:
    headers = signed()
    del headers[name]
    with pytest.raises(errors.WebhookVerificationFailed, match=name.lower()):
        webhooks.verify(BODY, headers, SECRET, now=NOW)


def test_a_changed_body_is_rejected() -> None:
    with pytest.raises(errors.WebhookVerificationFailed, match="no signature fits"):
        webhooks.verify(BODY + b" ", signed(), SECRET, now=NOW)


@pytest.mark.parametrize("seconds", [-301, 301])
def test_a_clock_that_is_301_seconds_off_is_rejected(seconds: int) -> None:
    with pytest.raises(errors.WebhookVerificationFailed, match="too far"):
        webhooks.verify(BODY, signed(), SECRET, now=NOW + timedelta(seconds=seconds))
    webhooks.verify(BODY, signed(), SECRET, now=NOW + timedelta(seconds=seconds) * 0.99)


def test_while_secrets_rotate_either_side_may_be_ahead() -> None:
    webhooks.verify(BODY, signed(OLD_SECRET), [SECRET, OLD_SECRET], now=NOW)
    webhooks.verify(BODY, signed([SECRET, OLD_SECRET]), OLD_SECRET, now=NOW)
    with pytest.raises(errors.WebhookVerificationFailed):
        webhooks.verify(BODY, signed(OLD_SECRET), SECRET, now=NOW)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_no base64", "whsec_é", []])
def test_a_secret_that_is_none_is_refused_rather_than_used(secret: str | list[str]) -> None:
    with pytest.raises(errors.InvalidInput, match="whsec_"):
        webhooks.verify(BODY, signed(), secret, now=NOW)


def test_tenants_have_secrets_of_their_own() -> None:
    assert webhooks.tenant_secret(b"master key", Tenant("acme2")) != SECRET
    assert webhooks.tenant_secret(b"master key", Tenant("acme")) == SECRET


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com:8443/a%20b?c=d&e",
        "https://[2606:4700::1111]/",
        "https://8.8.8.8/",
    ],
)
def test_a_public_https_url_is_taken_as_it_is(url: str) -> None:
    assert webhooks.check_url(url) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/", "https://"),
        ("ftp://example.com/", "https://"),
        ("example.com/hook", "https://"),
        ("https://", "host"),
        ("https:///path", "host"),
        ("https://a_-.b-/", "host name"),
        ("https://user:secret@example.com/", "user name"),
        ("https://example.com@127.0.0.1/", "user name"),
        ("https://example.com/#", "fragment"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:http/", "port"),
        ("https://[::1/", "host or port"),
        ("https://exa mple.com/", "characters"),
        ("https://example.com/\r\nx-evil: 1", "characters"),
        ("https://example.com\\@127.0.0.1/", "characters"),
        ("https://münchen.de/", "xn--"),
        ("https://example.com/" + "a" * 2048, "longer"),
        *(
            (f"https://{host}/", "public address")
            for host in (
                "127.0.0.1",
                "127.1",
                "2130706433",
                "0x7f000001",
                "0177.0.0.1",
                "127.0.0.1.",
                "localhost",
                "api.localhost.",
                "[::1]",
                "[::ffff:127.0.0.1]",
                "[64:ff9b::7f00:1]",
                "[fe80::1%25eth0]",
                "169.254.169.254",
                "100.64.0.1",
            )
        ),
    ],
)
def test_any_other_url_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(errors.InvalidWebhook, match=reason):
        webhooks.check_url(url)


def test_the_operator_can_allow_http_and_private_networks() -> None:
    allowed = (ip_network("127.0.0.0/8"),)
    assert webhooks.check_url("http://127.0.0.1:80/", allow_http=True, allowed_networks=allowed)
    with pytest.raises(errors.InvalidWebhook, match="public address"):
        webhooks.check_url("http://10.0.0.1/", allow_http=True, allowed_networks=allowed)
