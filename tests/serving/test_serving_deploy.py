"""The container file and the systemd unit call `mbd serve` as it is."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from modernbert_decoder.cli.serve import command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


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


# That what pip installs be pinned, and a label tell the version: it is this project, as it is checked out.
NOT_FOR_US = {"DD028", "DD078"}


def objections(text: str) -> set[str]:
    """The rules of dockerfile-doctor that a container file breaks."""
    pytest.importorskip("dockerfile_doctor", reason="the container file is linted by dockerfile-doctor")
    from dockerfile_doctor.parser import parse
    from dockerfile_doctor.rules import analyze

    return {issue.rule_id for issue in analyze(parse(text))}


def test_a_linter_has_no_objection_to_the_container_file() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert objections(text) <= NOT_FOR_US
    no_user, latest = text.replace("USER 10001\n", ""), text.replace(":3.11-slim-bookworm", ":latest")
    assert "DD008" in objections(no_user)
    assert "DD001" in objections(latest)


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


def verified(text: str, folder: Path) -> str:
    """What systemd objects to in a unit; its command is replaced by one that exists here."""
    unit = folder / "modernbert-decoder.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze")
    done = subprocess.run(
        [program, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return "\n".join(line for line in lines if unit.name in line)


def test_systemd_has_no_objection_to_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "modernbert-decoder.service").read_text(encoding="utf-8")
    assert verified(text, tmp_path) == ""
    broken = text.replace("ProtectHome=yes", "ProtectHome=perhaps\nProtectHomes=yes")
    objections = verified(broken, tmp_path)
    assert "perhaps" in objections
    assert "ProtectHomes" in objections


def test_pictures_that_documents_show_are_there() -> None:
    shown = set()
    for document in (ROOT / "docs").glob("*.md"):
        for name in re.findall(
            r"""(?:src|srcset)="([^"]+)"|!\[[^\]]*\]\(([^)]+)\)""", document.read_text("utf-8")
        ):
            shown.add(document.parent / (name[0] or name[1]))
    assert {path.name for path in shown} >= {"page-dark.png", "page-light.png"}
    for path in shown:
        assert path.suffix == ".svg" or path.read_bytes().startswith(b"\x89PNG\r\n"), path
