"""What a server is told when it starts: models, address, keys and limits, checked once.

This module knows the spelling of models on the command line; it opens nothing.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.hosts import ANY_HOST, LOOPBACK_HOSTS, plain_address

DTYPES: Final = ("float32", "int8", "int4", "w8a8")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")
_MIB: Final = 2**20


@dataclass(frozen=True)
class ModelSource:
    """A model to serve.

    Attributes:
        name: what requests call it.
        model: bundled name, folder or Hub id.
        dtype: weight format; None for the model's own default.
        prefill_dtype: that in which prompts are read; None for the same.
        adapter: folder of a LoRA adapter that changes its weights.
        parent: the name under which it is served without the adapter.
    """

    name: str
    model: str
    dtype: str | None = None
    prefill_dtype: str | None = None
    adapter: str | None = None
    parent: str | None = None

    @classmethod
    def parse(cls, spelling: str) -> ModelSource:
        """Reads `[NAME=]MODEL[:DTYPE[+PREFILL_DTYPE]]`.

        Without a name, a Hub id or bundled name stands for itself and a folder for its last part, followed by
        what was said of dtypes.

        Raises:
            InputError: the name cannot be used.

        >>> ModelSource.parse("small=models/ettin:int4") == ModelSource("small", "models/ettin", "int4")
        True
        >>> ModelSource.parse("storyteller:w8a8").name
        'storyteller:w8a8'
        >>> ModelSource.parse("fast=storyteller:int8+w8a8").prefill_dtype
        'w8a8'
        """
        name, separator, rest = spelling.partition("=")
        if not separator:
            name, rest = "", spelling
        model, _, suffix = rest.rpartition(":")
        dtype, _, prefill_dtype = suffix.partition("+")
        is_dtype = dtype in DTYPES and (suffix == dtype or prefill_dtype in DTYPES)
        if not model or not is_dtype:
            model, suffix = rest, ""
        if not model:
            raise InputError(f"{spelling!r} names no model; write [NAME=]MODEL[:DTYPE[+PREFILL_DTYPE]]")
        if not separator:
            is_folder = Path(model).is_dir() or model.count("/") > 1 or "\\" in model
            name = (Path(model).resolve().name if is_folder else model) + (f":{suffix}" if suffix else "")
        name = _checked_name(name, example=f"small={rest}")
        return cls(name, model, dtype if suffix else None, prefill_dtype if "+" in suffix else None)

    def adapted(self, name: str, folder: str) -> ModelSource:
        """This model with an adapter, under a name of its own.

        Raises:
            InputError: the name cannot be used.
        """
        name = _checked_name(name, example=f"mine={folder}")
        return replace(self, name=name, adapter=folder, parent=self.name)


def _checked_name(name: str, *, example: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a model cannot be served under the name {name!r}: give it one of letters, digits and "
            f"._:/@+-, as in {example}"
        )
    return name


def parse_models(spellings: Iterable[str], adapters: Iterable[str] = ()) -> tuple[ModelSource, ...]:
    """All models of a server, those with adapters behind the others.

    Args:
        spellings: `[NAME=]MODEL[:DTYPE[+PREFILL_DTYPE]]`.
        adapters: `NAME=[MODEL=]FOLDER`, where MODEL is the name of one of the models.

    Raises:
        InputError: two have one name, a name cannot be used, or it is not clear what an adapter is for.
    """
    models = tuple(ModelSource.parse(spelling) for spelling in spellings)
    sources = (*models, *(_adapted(models, spelling) for spelling in adapters))
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise InputError(f"{count} models are called {name!r}; give them names, as in first={name}")
    return sources


def _adapted(models: Sequence[ModelSource], spelling: str) -> ModelSource:
    by_name = {model.name: model for model in models}
    name, _, rest = spelling.partition("=")
    parent, separator, folder = rest.partition("=")
    if not separator or parent not in by_name:  # the folder alone, which may have such a sign in its name
        parent, folder = models[0].name, rest
        if len(models) > 1:
            raise InputError(
                f"--adapter {spelling}: several models are served; say which of them the adapter is for, as "
                f"in {name}={parent}={rest or 'FOLDER'}"
            )
    if not folder:
        raise InputError(f"--adapter {spelling}: there is no folder; write NAME=FOLDER")
    return by_name[parent].adapted(name, folder)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How every model is opened; None leaves the engine's own default.

    Attributes:
        threads: for the kernels of each model.
        max_slots: completions computed at a time.
        max_context: tokens of prompt and completion.
        max_waiting: requests that wait before further ones are refused.
        kv_bytes: of keys and values that running requests may reserve.
        prefix_cache_bytes: for beginnings of prompts; 0 keeps none.
        draft: "lookup", "off", or a model that drafts for the ones served.
        batch_invariant: whether completions do not depend on what else is computed.
    """

    threads: int | None = None
    max_slots: int | None = None
    max_context: int | None = None
    max_waiting: int = 256
    kv_bytes: int | None = None
    prefix_cache_bytes: int = 256 * _MIB
    draft: str = "off"
    batch_invariant: bool = True


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Everything about the server itself. Sizes are bytes, times seconds.

    Attributes:
        models: at least one.
        host: address to listen on.
        port: 0 takes a free one.
        api_keys: any of them opens the API; none: no key is asked for.
        allowed_hosts: further names of the server that requests may be for; `*` is any.
        cors_origins: pages of these origins may call the API from a browser; `*` is any.
        max_body: of a request.
        timeout: from a request's arrival to its last token.
        body_timeout: for a request's head and body to arrive.
        write_timeout: how long a client may take nothing off its connection before it is dropped.
        step_timeout: how long a step of an engine may run before the server is said not to be ready.
        grace: how long running requests may go on after the server was told to stop.
        log_format: "text" or "json".
        engine: of every model.
    """

    models: Sequence[ModelSource]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 4 * _MIB
    timeout: float = 600.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    step_timeout: float = 60.0
    grace: float = 30.0
    log_format: str = "text"
    engine: EngineSettings = EngineSettings()

    def __post_init__(self) -> None:
        assert self.models, "a server without models"
        assert self.log_format in ("text", "json")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or " " in key or len(key) < 8:
                raise InputError(
                    "an API key must have at least 8 characters, all of them printable ASCII without spaces; "
                    "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
        for name in self.allowed_hosts:
            if name != ANY_HOST and not _HOST_NAME.fullmatch(name):
                raise InputError(
                    f"{name!r} is no name that a server can have; write one without scheme, port and path, "
                    "as in models.example.org, or * for any"
                )

    @property
    def host_names(self) -> tuple[str, ...] | None:
        """Names of the server that requests may be for; None for any.

        A server that anybody on this machine may use is for nobody else: names are then compared, or a web
        page could call it under a name that it made point here. Keys keep such a page out by themselves.

        A host given by name is looked up, which may take a moment.
        """
        is_open = is_loopback(self.host) and not self.api_keys
        if not is_open and not self.allowed_hosts:
            return None
        return (*LOOPBACK_HOSTS, self.host, *_addresses(self.host), *self.allowed_hosts)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address, whichever way it is spelled.

    A name that cannot be looked up is not, nor can a server listen on it.

    >>> is_loopback("::1"), is_loopback("127.1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return any(plain_address(address).is_loopback for address in _addresses(host))


def socket_family(host: str) -> socket.AddressFamily:
    """Of the socket that listens on a host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _addresses(host: str) -> tuple[str, ...]:
    """What listening on a host may come to; nothing where it cannot be looked up."""
    try:
        found = socket.getaddrinfo(host, None, family=socket_family(host), type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # the latter, a UnicodeError, of what is no name at all
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and those that start with # do not count.

    Raises:
        InputError: the file cannot be read or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the API keys in {path}: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise InputError(f"{path} holds no API key; write one a line, or leave the option out")
    return keys
