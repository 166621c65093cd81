"""`mbd rank`: candidates for a text, or documents for a query, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.job_options import JobOptions, job_options, length_options
from modernbert_decoder.engine.choices import NORMALIZATIONS
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from modernbert_decoder.jobs.tasks import Rank, Rerank

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    'mbd rank "The princess was" --candidate " happy" --candidate " purple"\n'
    "mbd rank -i questions.jsonl --candidates-column choices --normalization byte -o answers.jsonl\n"
    'mbd rank --query "dragons and knights" -i stories.csv --keep title --top 10\n'
)
_OF_QUERIES: Final = ("by", "label", "separator", "top", "truncate", "max_length")
_OF_CANDIDATES: Final = ("normalization", "unconditional_text")


@click.command("rank", short_help="Rank candidates for a text, or documents for a query.", epilog=_EXAMPLES)
@click.option(
    "--candidate", multiple=True, metavar="TEXT", help="A continuation to rank; may be given several times."
)
@click.option("--candidates-column", metavar="COLUMN", help="Column that holds each row's own candidates.")
@click.option(
    "--normalization",
    type=click.Choice(NORMALIZATIONS),
    help="Log-probability as it is, per token, per byte, or less that without the text.  [default: sum]",
)
@click.option(
    "--unconditional-text", metavar="TEXT", help="What stands for the text in it.  [default: nothing]"
)
@click.option("--query", metavar="TEXT", help="Sort the texts by how well they fit this query.")
@click.option(
    "--by",
    type=click.Choice(["likelihood", "classifier"]),
    help="The likelihood of the query after the text, or a classifier of pairs.  [default: likelihood]",
)
@click.option("--label", help="With --by classifier: the label whose probability counts.")
@click.option(
    "--separator", metavar="TEXT", help="With --by likelihood: between text and query.  [default: line break]"
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the N best texts.")
@length_options
@job_options(model="storyteller")
def command(**options: Any) -> None:
    """Rank the candidates of each of TEXTS by their likelihood as its continuation, or, with --query, sort
    TEXTS by how well they fit the query; without TEXTS and --input, the lines of standard input.

    Rows that cannot be used are reported, have an `error` in the results, and make the exit code 3.
    """
    own = {name: options.pop(name) for name in (*_OF_QUERIES, *_OF_CANDIDATES)}
    own |= {name: options.pop(name) for name in ("candidate", "candidates_column", "query")}
    _check_purpose(own)
    chosen = JobOptions(**options)
    chosen.check()
    with interrupts_deferred():
        from modernbert_decoder.cli.job_command import run_job

    task = _rank_task(own) if own["query"] is None else _rerank_task(own)
    run_job(task, chosen.inputs(task, candidates_column=own["candidates_column"]), chosen, top=own["top"])


def _check_purpose(own: dict[str, Any]) -> None:
    purposes = [own["candidate"] or None, own["candidates_column"], own["query"]]
    if sum(purpose is not None for purpose in purposes) != 1:
        raise InputError("give one of --candidate (once or more), --candidates-column and --query")
    if "" in own["candidate"]:
        raise InputError("a --candidate is empty; there is nothing to rank it by")
    if own["query"] is None:
        _refuse(own, _OF_QUERIES, "candidates")
        if own["unconditional_text"] and own["normalization"] != "unconditional":
            raise InputError("--unconditional-text goes with --normalization unconditional only")
        return
    if not own["query"].strip():
        raise InputError("--query is empty; give the words that the texts should fit")
    _refuse(own, _OF_CANDIDATES, "--query")
    if own["by"] == "classifier":
        _refuse(own, ("separator",), "--by classifier")
    else:
        _refuse(own, ("label", "truncate", "max_length"), "--by likelihood")


def _refuse(own: dict[str, Any], names: Sequence[str], purpose: str) -> None:
    for name in names:
        if own[name] not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} does not go with {purpose}; leave it out")


def _rank_task(own: dict[str, Any]) -> Rank:
    from modernbert_decoder.jobs.tasks import Rank

    return Rank(
        candidates=own["candidate"],
        normalization=own["normalization"] or "sum",
        unconditional_text=own["unconditional_text"] or "",
    )


def _rerank_task(own: dict[str, Any]) -> Rerank:
    from modernbert_decoder.jobs.tasks import Rerank

    return Rerank(
        query=own["query"],
        by=own["by"] or "likelihood",
        label=own["label"],
        separator="\n" if own["separator"] is None else own["separator"],
        truncate=own["truncate"],
        max_length=own["max_length"],
    )
