"""A job's blocks computed by Ray Data: an actor pool with one engine for each worker. Needs the extra `ray`.

Workers read the files themselves, from the position they are told, so every node must see them under the same
names. Results come back in the order of the inputs; the caller writes them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from modernbert_decoder.checkpoint import BUNDLED_MODEL
from modernbert_decoder.errors import InputError, UserError
from modernbert_decoder.jobs.inputs import STANDARD_INPUT
from modernbert_decoder.jobs.job import ComputedBlock, EngineOptions, Job, compute_block
from modernbert_decoder.jobs.parquet_files import MissingExtraError
from modernbert_decoder.jobs.rows import Block, Position
from modernbert_decoder.jobs.standard_input import StreamDigest
from modernbert_decoder.machine import usable_threads

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM

LOCAL: Final = "local"
_CONNECT_SECONDS: Final = 10.0
_MAX_RAY_BLOCKS: Final = 4096  # of Ray Data; each costs a task
# How Ray Data names the threads that execute a data set and hand on its rows.
_EXECUTING: Final = ("StreamingExecutor", "iter_threaded", "ray-data-metadata", "Prefetcher")
_STOP_SECONDS: Final = 10.0
# Ray Data warns that there are no progress bars; ours is the caller's.
_LOG_LEVELS: Final = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where a job runs.

    Attributes:
        address: "local" starts Ray on this machine; "auto", "host:port" or "ray://host:port" joins a cluster.
        workers: engines; by default as many as have room with their threads.
        threads: of each engine, and the CPUs that Ray reserves for it; by default those of `EngineOptions`,
            or as many as `workers` have room with, or 1.
    """

    address: str = LOCAL
    workers: int | None = None
    threads: int | None = None


def compute_with_ray(
    job: Job, options: RayOptions, start: Position, digest: StreamDigest
) -> Generator[ComputedBlock, None, None]:
    """The results from a position on, in the order of the inputs.

    Raises:
        InputError: standard input, which workers cannot read, or a cluster that cannot be reached or has no
            room.
        MissingExtraError: Ray is not installed.
    """
    if STANDARD_INPUT in job.inputs.files:
        raise InputError("Ray's workers cannot read standard input; write it to a file first")
    options = replace(options, threads=_threads(options, job.engine))
    ray, ray_data = _require_ray()
    items = list(_items(job, start))
    if not items:
        return
    with _settings(ray_data):
        joined_here = _join(ray, options)
        earlier = set(threading.enumerate())
        rows: Iterator[dict[str, Any]] = iter(())
        try:
            nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            workers, threads = shares(options, nodes, num_blocks=len(items))
            dataset = ray_data.from_items(items, override_num_blocks=min(len(items), _MAX_RAY_BLOCKS)).map(
                BlockWorker,
                fn_constructor_kwargs={"job": _for_workers(job, threads=threads)},
                compute=ray_data.ActorPoolStrategy(size=workers),
                num_cpus=threads,
            )
            rows = iter(dataset.iter_rows())
            yield from map(_computed_block, rows)
        finally:
            del rows  # which stops what still runs
            _await_threads(earlier)
            if joined_here:
                ray.shutdown()


def _computed_block(row: Mapping[str, Any]) -> ComputedBlock:
    if row["problem"]:
        raise InputError(f"a worker cannot go on: {row['problem']}")
    return ComputedBlock(
        lines=row["lines"],
        num_rows=int(row["num_rows"]),
        reports=[(where, message) for where, message in json.loads(row["reports"])],
        end=Position(int(row["end_file"]), int(row["end_offset"]), int(row["end_row"])),
    )


def _await_threads(earlier: Set[threading.Thread]) -> None:
    """Waits for the threads that execute a data set: one that asked Ray for something after `shutdown` would
    end the process.
    """
    for thread in set(threading.enumerate()) - earlier:
        if thread.name.startswith(_EXECUTING):
            thread.join(_STOP_SECONDS)


class BlockWorker:
    """One engine; Ray makes one in each actor and calls it with items.

    What the user can put right is an answer like others: as an exception it would come back wrapped in Ray's.
    """

    def __init__(self, job: Job) -> None:
        """Loads the model."""
        self._job = job
        self._llm: LLM | None = None
        self._problem = ""
        try:
            self._llm = job.engine.open()
        except UserError as error:
            self._problem = self._told(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """The results of the block that the item describes, or the problem that there are none."""
        start = Position(int(item["file"]), int(item["offset"]), int(item["row"]))
        computed = ComputedBlock(b"", 0, [], start)
        problem = self._problem
        if self._llm is not None:
            try:
                with closing(self._job.inputs.records(start)) as records:
                    block = Block(start, list(islice(records, int(item["num_rows"]))))
                computed = compute_block(self._job, self._llm, block)
            except UserError as error:
                problem = self._told(error)
        return {
            "problem": problem,
            "lines": computed.lines,
            "num_rows": computed.num_rows,
            "reports": json.dumps(computed.reports),
            **{f"end_{name}": value for name, value in asdict(computed.end).items()},
        }

    def _told(self, error: UserError) -> str:
        return error.on_command_line() if self._job.on_command_line else str(error)


def _for_workers(job: Job, *, threads: int) -> Job:
    """The same job for processes in other folders: names of files are completed."""
    engine = job.engine
    model = engine.model if engine.model == BUNDLED_MODEL else _completed(engine.model)
    adapter = None if engine.adapter is None else _completed(engine.adapter)
    return replace(
        job,
        engine=replace(engine, model=model, adapter=adapter, threads=threads),
        inputs=replace(job.inputs, folder=os.getcwd()),
    )


def _completed(name: str | os.PathLike[str]) -> str:
    """The whole name of a folder; what is none, such as an id on the Hub, is left alone."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else os.fspath(name)


def _items(job: Job, start: Position) -> Iterator[dict[str, int]]:
    """Where each block begins and how many rows it has: the same blocks as in one process."""
    for block in job.inputs.blocks(start):
        yield {**asdict(block.start), "num_rows": len(block.records)}


def _require_ray() -> tuple[ModuleType, ModuleType]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import, which reads it
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--ray needs Ray, which is not installed; install it with `pip install 'modernbert-decoder[ray]'`"
        ) from error
    return ray, ray.data


@contextmanager
def _settings(ray_data: ModuleType) -> Iterator[None]:
    """Ray Data's settings for a job; at its end they are the caller's again."""
    context = ray_data.DataContext.get_current()
    execution = context.execution_options
    order, bars = execution.preserve_order, context.enable_progress_bars
    levels = {name: logging.getLogger(name).level for name in _LOG_LEVELS}
    try:
        execution.preserve_order, context.enable_progress_bars = True, False
        for name, level in _LOG_LEVELS.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        execution.preserve_order, context.enable_progress_bars = order, bars
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _join(ray: ModuleType, options: RayOptions) -> bool:
    """Joins the cluster, or starts one here; False where the caller has done so before."""
    if ray.is_initialized():
        return False
    _require_reachable(options.address)
    here: dict[str, Any] = {}
    if options.address == LOCAL:
        num_cpus = max(usable_threads(), (options.workers or 1) * (options.threads or 1))
        here = {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.WARNING, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot join the Ray cluster at {options.address}: {error}") from error
    return True


def _require_reachable(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not found or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster can be reached at {address}: {error}") from error


def _threads(options: RayOptions, engine: EngineOptions) -> int | None:
    """Those of each worker, which can be told in two places."""
    if None not in (options.threads, engine.threads) and options.threads != engine.threads:
        raise InputError(
            f"RayOptions say {options.threads} threads and EngineOptions {engine.threads}; state them once"
        )
    return options.threads or engine.threads


def shares(options: RayOptions, nodes: Sequence[int], *, num_blocks: int) -> tuple[int, int]:
    """Workers and the threads of each.

    Args:
        options: what is asked for.
        nodes: CPUs of each node; a worker cannot have those of two.
        num_blocks: more workers would have nothing to do.

    Raises:
        InputError: the cluster has no room for them, so that Ray would wait for ever.
    """

    def room(threads: int) -> int:
        return sum(num_cpus // threads for num_cpus in nodes)

    largest = max(nodes, default=0)
    threads = options.threads
    if threads is None and options.workers is not None:
        fitting = (
            count for count in range(largest, 0, -1) if room(count) >= min(options.workers, num_blocks)
        )
        threads = next(fitting, None)
    threads = threads or 1
    workers = min(options.workers or room(threads), num_blocks)
    if not 0 < workers <= room(threads):
        raise InputError(
            f"the Ray cluster has room for {room(threads)} workers of {threads} threads, and "
            f"{max(workers, 1)} are asked for; its largest node has {largest} CPUs. Give fewer --workers or "
            "--threads"
        )
    return workers, threads
