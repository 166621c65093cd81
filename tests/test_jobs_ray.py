"""Ray's workers, one engine each, write what one process writes; two of them run on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

import counting_engine  # noqa: E402
import dying_engine  # noqa: E402
from checkpoints import tiny_architecture, write_checkpoint  # noqa: E402
from modernbert_decoder.architecture import Head  # noqa: E402
from modernbert_decoder.cli import main  # noqa: E402
from modernbert_decoder.errors import InputError  # noqa: E402
from modernbert_decoder.jobs import inputs as inputs_module  # noqa: E402
from modernbert_decoder.jobs.inputs import Columns, Inputs  # noqa: E402
from modernbert_decoder.jobs.job import EngineOptions, Job, Listeners, run_to_file  # noqa: E402
from modernbert_decoder.jobs.map_over_files import map_files  # noqa: E402
from modernbert_decoder.jobs.ray_workers import (  # noqa: E402
    RayOptions,
    _for_workers,
    compute_with_ray,
    shares,
)
from modernbert_decoder.jobs.tasks import Classify, Embed, Rank, Rerank, ScoreTexts, Task  # noqa: E402

TWO_WORKERS = RayOptions(workers=2, threads=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One small cluster for all tests of this file; a job that finds it running leaves it running."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten blocks over two files named relative to the working folder, with rows that cannot be used."""
    monkeypatch.setattr(inputs_module, "BLOCK_ROWS", 30)
    monkeypatch.chdir(tmp_path)
    lines = [f"The king had {row} sons." for row in range(200)]
    lines[17] = "\udcff"
    Path("a.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    Path("b.csv").write_text("text,id\n" + "".join(f"Queen {row},{row}\n" for row in range(80)) + "bad\n")
    return ["a.txt", "b.csv"]


@pytest.mark.filterwarnings("ignore")
def test_two_workers_write_what_one_process_writes(files: list[str]) -> None:
    engine = EngineOptions(model="storyteller", threads=1)
    alone = map_files(ScoreTexts(), files, "alone.jsonl", model=engine, columns=Columns(keep=("*",)))
    columns = Columns(keep=("*",))
    shared = map_files(ScoreTexts(), files, "shared.jsonl", model=engine, columns=columns, ray=TWO_WORKERS)
    assert (shared.num_rows, shared.num_errors) == (alone.num_rows, alone.num_errors) == (281, 2)
    assert Path("shared.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()
    assert ray.is_initialized()

    # A job that was begun by one process and killed is continued by two workers.
    inputs = Inputs(files=tuple(files), columns=columns)
    job = Job(task=ScoreTexts(), inputs=inputs, engine=engine)
    num_calls = 0

    def on_rows(num_rows: int, share: float | None) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_to_file(job, Path("mixed.jsonl"), format="jsonl", listeners=Listeners(on_rows=on_rows))

    def compute(start, digest):  # type: ignore[no-untyped-def]
        return compute_with_ray(job, TWO_WORKERS, start, digest)

    mixed = run_to_file(job, Path("mixed.jsonl"), format="jsonl", compute=compute)
    assert (mixed.num_rows, mixed.num_computed) == (281, 281 - 90)
    assert Path("mixed.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION, id2label={0: "no", 1: "yes"})
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "classifier", architecture))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "lm", tiny_architecture()))


@pytest.mark.filterwarnings("ignore")
def test_labels_of_two_workers_are_those_of_one_process_even_if_a_worker_dies(
    files: list[str], classifier: str, tmp_path: Path
) -> None:
    engine = EngineOptions(model=classifier, dtype="float32", threads=1)
    task = Classify(all_labels=True)
    alone = map_files(task, files, "alone.jsonl", model=engine)
    mark = tmp_path / "died"
    ray.cloudpickle.register_pickle_by_value(dying_engine)  # workers do not see this folder
    dying = dying_engine.DyingEngine(model=classifier, dtype="float32", threads=1, mark=str(mark))
    shared = map_files(task, files, "shared.jsonl", model=dying, ray=TWO_WORKERS)
    assert mark.exists(), "no worker died"
    assert (shared.num_rows, shared.num_errors) == (alone.num_rows, alone.num_errors) == (281, 2)
    assert Path("shared.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "task", [Embed(), Rank(candidates=(" a", " b")), Rerank(query="q")], ids=lambda task: task.name
)
def test_two_engines_are_opened_once_each_and_work_at_the_same_time(
    task: Task, files: list[str], lm: str, tmp_path: Path
) -> None:
    engine = EngineOptions(model=lm, dtype="float32", threads=1)
    map_files(task, files, "alone.jsonl", model=engine)
    opened = tmp_path / "opened"
    opened.mkdir()
    ray.cloudpickle.register_pickle_by_value(counting_engine)
    counting = counting_engine.CountingEngine(model=lm, dtype="float32", threads=1, folder=str(opened))
    context = ray.data.DataContext.get_current()
    before = (context.execution_options.preserve_order, context.enable_progress_bars)
    map_files(task, files, "shared.jsonl", model=counting, ray=TWO_WORKERS)
    assert (context.execution_options.preserve_order, context.enable_progress_bars) == before != (True, False)
    processes = [path.name.split("-")[0] for path in opened.iterdir()]
    assert len(processes) == len(set(processes)) == 2
    assert str(os.getpid()) not in processes
    assert Path("shared.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()


# Blocks as small as those of `files`; killed by itself when so many are written.
COMMAND = """
import os, signal, sys
from modernbert_decoder.cli import main
from modernbert_decoder.jobs import inputs, resumable

inputs.BLOCK_ROWS = 30
num_blocks = int(sys.argv[1])
append = resumable.ResumableOutput.append

def appended(*arguments, **values):
    global num_blocks
    append(*arguments, **values)
    num_blocks -= 1
    if not num_blocks:
        os.kill(os.getpid(), signal.SIGKILL)

resumable.ResumableOutput.append = appended
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.filterwarnings("ignore")
def test_the_command_joins_a_cluster_and_goes_on_without_it_when_killed(
    files: list[str], classifier: str
) -> None:
    arguments = ["classify", "-m", classifier, "-i", "a.txt", "-i", "b.csv", "--threads", "1", "--quiet"]
    engine = EngineOptions(model=classifier, threads=1)
    map_files(Classify(), files, "alone.jsonl", model=engine)
    address = ray.get_runtime_context().gcs_address

    def joined(num_blocks: int, output: str) -> subprocess.CompletedProcess[str]:
        ray_arguments = ["--workers", "2", f"--ray={address}"]
        command = [sys.executable, "-c", COMMAND, str(num_blocks), *arguments, *ray_arguments, "-o", output]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = joined(-1, "joined.jsonl")
    assert done.returncode == 3, done.stderr  # two rows cannot be used
    assert "Traceback" not in done.stderr
    assert Path("joined.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()
    assert [node["Alive"] for node in ray.nodes()] == [True]

    killed = joined(2, "killed.jsonl")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert '"num_rows": 60' in Path("killed.jsonl.job.json").read_text()
    assert not Path("killed.jsonl").exists()
    assert main([*arguments, "-o", "killed.jsonl"]) == 3
    assert Path("killed.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()


def test_names_of_folders_are_completed_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "adapters" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    engine = EngineOptions(model="model", adapter="adapters/one")
    job = Job(task=ScoreTexts(), inputs=Inputs(files=("a.txt",)), engine=engine)
    told = _for_workers(job, threads=3)
    assert (told.engine.model, told.engine.adapter) == (
        str(tmp_path / "model"),
        str(tmp_path / "adapters/one"),
    )
    assert (told.engine.threads, told.inputs.folder) == (3, str(tmp_path))
    hub = Job(task=ScoreTexts(), inputs=Inputs(), engine=EngineOptions(model="somebody/a-model"))
    assert _for_workers(hub, threads=1).engine == EngineOptions(model="somebody/a-model", threads=1)


@pytest.mark.filterwarnings("ignore")
def test_what_a_worker_cannot_do_is_the_users_error(files: list[str]) -> None:
    with pytest.raises(InputError, match=r"a worker cannot go on: storyteller.*cannot classify"):
        map_files(Classify(), files, "out.csv", model="storyteller", ray=TWO_WORKERS)
    # One that asked Ray for something after its shutdown would end the process.
    assert not [each.name for each in threading.enumerate() if each.name.startswith("StreamingExecutor")]


def test_an_address_where_nobody_listens_is_told_at_once(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        options = RayOptions(address=address)
        with pytest.raises(InputError, match=f"no Ray cluster can be reached at {address}"):
            map_files(ScoreTexts(), files, "out.csv", model="storyteller", ray=options)


def test_standard_input_is_refused() -> None:
    job = Job(task=ScoreTexts(), inputs=Inputs(files=("-",)), engine=EngineOptions(model="storyteller"))
    with pytest.raises(InputError, match="cannot read standard input"):
        next(compute_with_ray(job, TWO_WORKERS, None, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "threads", "nodes", "expected"),
    [
        (None, None, [4, 4], (8, 1)),
        (None, 3, [4, 8, 0], (3, 3)),
        (2, None, [4, 4, 4, 4], (2, 4)),  # not 8 CPUs, which no node has
        (3, None, [8, 2], (3, 2)),
        (2, None, [8, 2], (2, 4)),
        (2, 1, [2], (2, 1)),
        (50, None, [2, 2], (4, 1)),  # there are no more blocks than 4
    ],
)
def test_every_worker_has_its_cpus_on_one_node(
    workers: int | None, threads: int | None, nodes: list[int], expected: tuple[int, int]
) -> None:
    num_blocks = 4 if workers == 50 else 100
    assert shares(RayOptions(workers=workers, threads=threads), nodes, num_blocks=num_blocks) == expected


@pytest.mark.parametrize(
    ("workers", "threads", "nodes"), [(None, 5, [4, 4]), (2, 3, [4]), (3, None, [2]), (1, None, [])]
)
def test_workers_without_room_are_refused_instead_of_waited_for(
    workers: int | None, threads: int | None, nodes: list[int]
) -> None:
    with pytest.raises(InputError, match=r"room for \d workers of \d threads.*fewer --workers or --threads"):
        shares(RayOptions(workers=workers, threads=threads), nodes, num_blocks=100)


def test_two_numbers_of_threads_are_refused() -> None:
    engine = EngineOptions(model="storyteller", threads=2)
    job = Job(task=ScoreTexts(), inputs=Inputs(files=("a.txt",)), engine=engine)
    with pytest.raises(InputError, match="1 threads and EngineOptions 2; state them once"):
        next(compute_with_ray(job, TWO_WORKERS, None, None))  # type: ignore[arg-type]
