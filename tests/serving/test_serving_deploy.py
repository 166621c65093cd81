"""The container file and the systemd unit call `mbd serve` as it is."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import click
import pytest

from modernbert_decoder.cli.serve import command

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def parsed(arguments: list[str]) -> dict[str, object]:
    """What `mbd serve` makes of its arguments."""
    assert arguments[:2] == ["mbd", "serve"]
    context = click.Context(command)
    command.parse_args(context, arguments[2:])
    return context.params


def test_the_container_starts_the_server_on_every_address_of_its_own() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    entry, models = (
        json.loads(found) for found in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
    )
    values = parsed([*entry, *models])
    assert values["host"] == "0.0.0.0"
    assert values["log_format"] == "json"
    assert f"EXPOSE {values['port']}" in text
    assert f"http://127.0.0.1:{values['port']}/ready" in text
    assert re.search(r"^USER \d+$", text, re.MULTILINE), "it must not run as root"
    assert "[serve]" in text


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "modernbert-decoder.service")
    return dict(parser["Service"])


def test_the_unit_starts_the_server_on_loopback_with_keys() -> None:
    service = unit()
    start = service["ExecStart"].replace("/opt/modernbert-decoder/bin/mbd", "mbd")
    values = parsed(start.replace("$MBD_MODELS", "storyteller").split())
    assert values["host"] == "127.0.0.1"
    assert values["api_key_file"] == Path("%d/keys")
    assert service["LoadCredential"].startswith("keys:")
    grace = values["grace"]
    assert isinstance(grace, float)
    assert float(service["TimeoutStopSec"]) > grace + 5, "the server would be killed while it says goodbye"


@pytest.mark.parametrize("setting", ["NoNewPrivileges", "DynamicUser", "ProtectHome", "PrivateTmp"])
def test_the_unit_has_few_rights(setting: str) -> None:
    assert unit()[setting] == "yes"
