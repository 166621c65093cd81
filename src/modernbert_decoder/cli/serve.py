"""`mbd serve`: answers OpenAI's clients over HTTP."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Final

import click

from modernbert_decoder.cli.completion_options import threads_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.errors import InputError

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", re.IGNORECASE)
_KEY_VARIABLE: Final = "MBD_API_KEY"

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    "mbd serve storyteller\n"
    "mbd serve tiny=jhu-clsp/ettin-decoder-17m:int4 big=jhu-clsp/ettin-decoder-150m\n"
)


def size(text: str) -> int:
    """A number of bytes.

    >>> size("500MB"), size("2GiB"), size("0")
    (500000000, 2147483648, 0)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size; write 500MB, 2GiB or 0")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@click.command("serve", short_help="Answer OpenAI's clients over HTTP.", epilog=_EXAMPLES)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL[:DTYPE]...")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="The model with a LoRA adapter, too; repeatable.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", default=8000, show_default=True, help="0: any."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"Keys, one a line; {_KEY_VARIABLE} holds one, too.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Further name of the server; repeatable.",
)
@click.option("--cors-origin", "cors_origins", multiple=True, help="Web pages that may call; repeatable.")
@click.option("--max-body", type=size, default="4MiB", show_default=True, help="Of a request.")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    metavar="N",
    default=256,
    show_default=True,
    help="Requests in the queue; 429 beyond.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=600,
    show_default=True,
    help="For one request.",
)
@click.option(
    "--step-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=60,
    show_default=True,
    help="/ready fails if a step takes longer.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=1e6),
    default=30,
    show_default=True,
    help="For running requests at shutdown.",
)
@click.option(
    "--max-slots",
    type=click.IntRange(min=1),
    metavar="N",
    help="Completions computed at a time.  [default: 32]",
)
@click.option(
    "--max-context", type=click.IntRange(min=2), metavar="N", help="Tokens.  [default: the model's]"
)
@click.option("--kv-memory", type=size, help="Of keys and values.  [default: what the slots can hold]")
@click.option(
    "--prefix-cache",
    type=size,
    default="256MiB",
    show_default=True,
    help="For beginnings that prompts share; 0: none.",
)
@click.option(
    "--draft",
    default="off",
    show_default=True,
    metavar="off|lookup|MODEL",
    help="Speculate: from the text so far, or by a smaller model.",
)
@click.option(
    "--no-batch-invariant",
    "batch_invariant",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Cheaper int8 and int4, whose answers depend a little on others.",
)
@threads_option
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log."
)
def command(
    *,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    max_body: int,
    max_waiting: int,
    timeout: float,
    step_timeout: float,
    grace: float,
    max_slots: int | None,
    max_context: int | None,
    kv_memory: int | None,
    prefix_cache: int,
    draft: str,
    batch_invariant: bool,
    threads: int | None,
    log_format: str,
) -> None:
    """Serve MODELs over HTTP to clients of OpenAI's API; a page to try them is at /, the API's at /docs.

    DTYPE is float32, int8, int4 or w8a8; int8+w8a8 reads prompts in the latter. NAME is what requests
    call the model. See docs/serving.md.
    """
    with interrupts_deferred():
        _require_packages()
        from modernbert_decoder.serving.server import run
        from modernbert_decoder.serving.settings import EngineSettings, ServerSettings, parse_models

    settings = ServerSettings(
        models=parse_models(models, adapters),
        host=host,
        port=port,
        api_keys=_api_keys(api_key_file),
        allowed_hosts=allowed_hosts,
        cors_origins=cors_origins,
        max_body=max_body,
        timeout=timeout,
        step_timeout=step_timeout,
        grace=grace,
        log_format=log_format,
        engine=EngineSettings(
            threads=threads,
            max_slots=max_slots,
            max_context=max_context,
            max_waiting=max_waiting,
            kv_bytes=kv_memory,
            prefix_cache_bytes=prefix_cache,
            draft=draft,
            batch_invariant=batch_invariant,
        ),
    )
    run(settings)


def _require_packages() -> None:
    """Checks that the extra is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import_module("modernbert_decoder.serving.server")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("modernbert_decoder"):
            raise
        raise InputError(
            f"the server needs packages that are not installed ({error.name} is missing); install them with "
            "`pip install 'modernbert-decoder[serve]'`"
        ) from None


def _api_keys(path: Path | None) -> tuple[str, ...]:
    """Those of the environment and of the file."""
    from modernbert_decoder.serving.settings import read_api_keys

    own = os.environ.get(_KEY_VARIABLE, "").strip()
    return ((own,) if own else ()) + (read_api_keys(path) if path is not None else ())
