"""What the environment says of proxies and certificates, and which variable a message names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expo.checkpoint import network
from expo.errors import ExpoError, InputError, MissingExtra

HERE = "http://127.0.0.1:8000/v1"
THERE = "https://api.example.com/v1"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in (
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
        ):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)


REFUSED = {
    "socks": (HERE, {"ALL_PROXY": "socks://a:9/"}, r"ALL_PROXY=socks://a:9/ cannot be used: .*socks5://"),
    "in lower case": (HERE, {"all_proxy": "socks://a:9/"}, "all_proxy=socks://a:9/ cannot be used"),
    "lower case wins": (HERE, {"HTTP_PROXY": "http://a", "http_proxy": "ftp://a"}, "http_proxy=ftp://a cannot be used"),
    "for https": (THERE, {"HTTPS_PROXY": "socks4://a:9"}, "HTTPS_PROXY=socks4://a:9 cannot be used"),
    "a port that is none": (HERE, {"HTTP_PROXY": "http://a:b"}, r"HTTP_PROXY=http://a:b cannot be used: its port"),
    "a password": (HERE, {"HTTP_PROXY": "socks://me:secretive@a:9"}, r"HTTP_PROXY=socks://…@a:9 cannot be used"),
    "no such file": (
        HERE,
        {"SSL_CERT_FILE": "/no/ca.pem"},
        "SSL_CERT_FILE is not a file: /no/ca.pem; correct or unset",
    ),
    "a folder": (THERE, {"SSL_CERT_FILE": "/tmp"}, "SSL_CERT_FILE is not a file: /tmp"),
    "no certificates": (
        THERE,
        {"SSL_CERT_FILE": __file__},
        "SSL_CERT_FILE=.* cannot be used: it contains no certificates",
    ),
    "no such folder": (THERE, {"SSL_CERT_DIR": "/no/certs"}, "SSL_CERT_DIR is not a folder: /no/certs"),
}


@pytest.mark.parametrize(("url", "given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_variable_that_cannot_be_used_is_named(monkeypatch, url, given, message):
    set_all(monkeypatch, given)
    with pytest.raises(InputError, match=message) as caught:
        network.require_usable(url)
    assert "\n" not in str(caught.value)
    assert "secretive" not in str(caught.value)


def test_socks_needs_a_package(monkeypatch):
    set_all(monkeypatch, {"ALL_PROXY": "socks5://a:9"})
    monkeypatch.setattr(network, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"ALL_PROXY=socks5://a:9 cannot be used: .*pip install socksio"):
        network.require_usable(HERE)
    monkeypatch.setattr(network, "find_spec", lambda _: object())
    network.require_usable(HERE)


USABLE = {
    "nothing": (HERE, {}),
    "a proxy": (HERE, {"HTTP_PROXY": "http://a:9"}),
    "without a scheme": (HERE, {"HTTP_PROXY": "a:9"}),
    "around it": (HERE, {"ALL_PROXY": "socks://a:9", "NO_PROXY": "localhost,127.0.0.1"}),
    "around everything": (THERE, {"all_proxy": "socks://a:9", "no_proxy": "*"}),
    "of its own": (HERE, {"ALL_PROXY": "socks://a:9", "HTTP_PROXY": "http://a:9"}),
    "for https": (HERE, {"HTTPS_PROXY": "socks://a:9"}),
    "empty": (HERE, {"ALL_PROXY": "", "SSL_CERT_FILE": ""}),
    "certificates of no use here": (HERE, {"SSL_CERT_DIR": "/no/certs"}),
    "a folder of certificates": (THERE, {"SSL_CERT_DIR": "/no/certs:/tmp"}),
}


@pytest.mark.parametrize(("url", "given"), USABLE.values(), ids=USABLE.keys())
def test_what_is_usable_or_of_no_concern(monkeypatch, url, given):
    set_all(monkeypatch, given)
    network.require_usable(url)
    before = dict(os.environ)
    with network.without_unusable_proxies():
        assert not any(value.startswith("socks:") for name, value in os.environ.items() if name.endswith("_PROXY"))
    assert dict(os.environ) == before


ADVICE = {
    "no proxy": (HERE, {}, "refused", "", "start it, or correct --base-url"),
    "a proxy": (
        HERE,
        {"HTTP_PROXY": "http://me:secretive@a:9"},
        "refused",
        " through the proxy of HTTP_PROXY (http://…@a:9)",
        "set NO_PROXY=127.0.0.1 to reach it directly, or correct HTTP_PROXY or --base-url",
    ),
    "a proxy for all": (
        THERE,
        {"all_proxy": "a:9"},
        "refused",
        " through the proxy of all_proxy (http://a:9)",
        "set NO",
    ),
    "others go directly": (
        HERE,
        {"HTTP_PROXY": "a:9", "no_proxy": "localhost"},
        "refused",
        " through the proxy of HTTP_PROXY (http://a:9)",
        "add 127.0.0.1 to no_proxy",
    ),
    "a certificate": (THERE, {}, "CERTIFICATE_VERIFY_FAILED", "", "set SSL_CERT_FILE to the file of the certificates"),
    "a variable that is not read": (
        THERE,
        {"REQUESTS_CA_BUNDLE": "/ca.pem"},
        "CERTIFICATE_VERIFY_FAILED",
        "",
        "(REQUESTS_CA_BUNDLE is not read)",
    ),
}


@pytest.mark.parametrize(("url", "given", "cause", "through", "advice"), ADVICE.values(), ids=ADVICE.keys())
def test_where_no_server_answers_the_proxy_in_between_is_named(monkeypatch, url, given, cause, through, advice):
    set_all(monkeypatch, given)
    assert network.through(url) == through
    assert advice in network.advice(url, cause)


def test_the_hub_names_the_variable_too(monkeypatch, tmp_path: Path):
    from huggingface_hub import constants

    from expo.checkpoint.hub import locate

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_all(monkeypatch, {"HTTPS_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks://a:9/"})
    with pytest.raises(ExpoError, match="ALL_PROXY=socks://a:9/ cannot be used"):
        locate("org/name")
