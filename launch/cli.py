"""The command `trainyard`: parse, call, print; no logic.

Exit codes: 0 done, 1 refused or failed with one sentence, 2 wrong arguments, 85 stopped on request, to be continued,
128 + n ended by signal n.
A command's parameters are its options, so `prepare` has more than 60 lines.
Modules of the project are imported inside the commands, because torch alone takes longer than `--help` should.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="trainyard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From raw text to a chat model that can be served.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
ModelFolder = Annotated[Path, typer.Argument(help="Model folder, as `trainyard export` writes it.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of the probability.")]
SamplingSeed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
AsChat = Annotated[
    bool | None, typer.Option("--as-chat/--as-text", help="Default: chat where the folder has a chat template.")
]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as the weights are stored.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto (GPUs, then host memory, then disk), sequential, or a device; default: auto with a GPU."),
]
HostMemory = Annotated[
    float | None, typer.Option(help="With --device-map auto: host memory for weights, the rest stays on disk.")
]
OffloadFolder = Annotated[
    Path | None, typer.Option(help="For weights on disk that cannot be read in place; default: a temporary folder.")
]


def main() -> None:
    """Entry point: errors of the user's input become one sentence on stderr and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("TRAINYARD_DEBUG") == "1":
            raise
        print(f"trainyard: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _answer(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Gives the function that prints a command's answer.

    With --json, what libraries print on stdout (also from C++) goes to stderr, and the answer is all that stdout gets.
    """
    if not as_json:
        yield lambda answer: None
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    answers: list[Any] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answers.append
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False, indent=2))


@contextlib.contextmanager
def _progress(what: str, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an ETA on stderr; gives the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Option("--input", help="File, folder, glob or hf://…; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for train/, validation/, tokenizer/ and report.json.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer to use.")] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar="VOCABULARY", help="Train a byte-level BPE tokenizer of this size.")
    ] = None,
    tokenizer_sample_bytes: Annotated[
        int, typer.Option(help="Text that it is trained on, at most, from everywhere.")
    ] = 512 * 2**20,
    format: Annotated[
        str, typer.Option(help="auto, text, csv, jsonl, json, parquet, arrow, megatron or chat.")
    ] = "auto",
    text_field: Annotated[str, typer.Option(help="Column or field that holds the text.")] = "text",
    prompt_field: Annotated[str, typer.Option(help="Column of the user's message (chat).")] = "prompt",
    response_field: Annotated[str, typer.Option(help="Column of the assistant's message (chat).")] = "response",
    delimiter: Annotated[str | None, typer.Option(help="CSV delimiter; found from the header if not given.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    skip_bad_rows: Annotated[bool, typer.Option(help="Count bad rows in the report instead of stopping.")] = False,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents kept for validation.")] = 0.01,
    validation_input: Annotated[
        list[str] | None, typer.Option(help="Files kept for validation instead of a share; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="I/N", help="Of N calls on one output, this is I (from 0): its share only.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="auto (the fastest that is equal), gigatoken, tiktoken or huggingface.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Turn text, CSV, JSONL, Parquet or chat files into token shards and a tokenizer.

    The same call goes on with what an interrupted one has left, and gives the same bytes for any number of workers.

    Example: `trainyard prepare --input reviews.csv --text-field review --train-tokenizer 8192 --out data/reviews`
    """
    from data_pipeline.prepare import PrepareOptions, parse_task
    from data_pipeline.prepare import prepare as run_prepare
    from data_pipeline.sources import ReadOptions
    from launch.environment import usable_cores

    delimiter = "\t" if delimiter == "\\t" else delimiter  # a shell passes the two characters
    options = PrepareOptions(
        inputs=inputs,
        output=out,
        tokenizer=tokenizer,
        train_vocabulary=train_tokenizer,
        tokenizer_sample_bytes=tokenizer_sample_bytes,
        read=ReadOptions(format, text_field, prompt_field, response_field, delimiter, encoding, skip_bad_rows),
        validation_fraction=validation_fraction,
        validation_inputs=validation_input or [],
        seed=seed,
        workers=workers or usable_cores(),
        task=None if task is None else parse_task(task),
        engine=engine,
    )
    with _answer(as_json) as answer:
        with _progress("prepare") as progress:
            report = run_prepare(options, progress)
        answer(report)
        if not as_json:
            keys = ("kind", "tokenizer", "splits", "duplicates", "empty_documents", "skipped_rows", "cut_short", "task")
            shown = {key: report[key] for key in (*keys, "units", "units_done", "reused", "run") if key in report}
            _print_values(shown | ({"report": str(out / "report.json")} if "splits" in report else {}))


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="Prepared data or a split of it, a checkpoint, a run or an export.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read everything in a folder and compare it with its checksums; the first damaged file is named.

    Example: `trainyard verify data/reviews`
    """
    from launch.verify import verify as run_verify

    with _answer(as_json) as answer:
        with _progress("verify") as progress:
            result = run_verify(directory, progress)
        answer(result)
        if not as_json:
            _print_values({"whole": str(directory)} | result)


@app.command()
def preview(
    data: Annotated[
        Path | None, typer.Argument(help="Folder of token shards; default: the recipe's data.train.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose batches, order and tokenizer are shown.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Global batches.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each batch.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a row where there is no recipe.")] = 256,
    as_json: AsJson = False,
) -> None:
    """The first batches as the model sees them: learnt tokens green (or in « »), document boundaries, padding.

    Example: `trainyard preview data/shakespeare/train` or `trainyard preview --recipe recipe.yaml --batches 2`
    """
    from data_pipeline import preview as shown
    from data_pipeline.stream import TrainingStream

    if recipe is not None:
        from gpt.recipe_file import load_recipe
        from gpt.train import open_training_data

        instead = [f"data.train=[{{path: {json.dumps(str(data))}}}]", "data.stages=[]"] if data is not None else []
        resolved = load_recipe(recipe, instead)
        stream, tokenizer_path = open_training_data(resolved), Path(resolved.tokenizer)
        batch_rows = resolved.global_batch_sequences
    elif data is not None:
        stream, tokenizer_path = TrainingStream([(data, 1.0)], sequence_length, 0), data.parent / "tokenizer"
        batch_rows = rows
    else:
        raise typer.BadParameter("give a folder of token shards, or a recipe with --recipe")
    with _answer(as_json) as answer:
        tokenizer = shown.open_tokenizer(stream, tokenizer_path)
        found = shown.preview_rows(stream, batch_rows, batches, rows)
        answer(shown.as_json(found))
        if not as_json:
            from rich.console import Console

            shown.print_preview(found, tokenizer, Console(highlight=False))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file; launch/recipes/*.yaml are found from any folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe values.")] = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes here; default: one per GPU, else 2.")] = None,
    nodes: Annotated[int, typer.Option(help="Hosts of the run; this command is started on each.")] = 1,
    node_rank: Annotated[int, typer.Option(help="This host's number, from 0.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of host 0, for nodes > 1.")
    ] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="NEW_NAME", help="New run from this run's newest weights.")
    ] = None,
) -> None:
    """Train a model, or go on with a run whose directory holds a checkpoint.

    Example: `trainyard train launch/recipes/quickstart_pretrain.yaml optimizer.learning_rate=1e-3 --processes 2`
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the workers are started, which takes seconds
        signal.signal(number, _stop_before_start)
    from gpt.recipe_file import fork_recipe, load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if fork is not None:
        resolved = fork_recipe(resolved, fork)
    # after the recipe is known to be good: these take seconds
    from gpt.train import check
    from launch.hub import fetch
    from launch.local import default_processes, run_workers
    from launch.log_folder import refusals_recorded

    resolved = fetch(resolved)

    if processes is None:
        processes, reason = default_processes()
        print(f"processes: {processes} ({reason})", flush=True)
    with refusals_recorded(resolved.run_directory()):
        if nodes == 1:  # else the ranks do, so that the other hosts do not wait for one that was refused here
            check(resolved, processes)
        code = run_workers(resolved, processes=processes, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
    raise typer.Exit(code)


@app.command()
def preflight(
    recipe: Annotated[str, typer.Argument(help="Recipe file, as for `train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe values.")] = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes here; default: one per GPU, else 2.")] = None,
    nodes: Annotated[int, typer.Option(help="Hosts of the run; this command is started on each.")] = 1,
    node_rank: Annotated[int, typer.Option(help="This host's number, from 0.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of host 0, for nodes > 1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look whether a run will work, with the ranks that it will have: hosts, versions, network, disk, memory, data.

    All that fails is said together, with its host and what to do. Nothing is trained, and the run is not touched.

    Example: `trainyard preflight recipe.yaml --nodes 2 --node-rank 0 --rendezvous 10.0.0.1:29500`
    """
    from gpt.recipe_file import load_recipe

    with _answer(as_json) as answer:
        resolved = load_recipe(recipe, overrides or [])
        from launch.preflight import print_report, run_preflight

        report = run_preflight(resolved, processes=processes, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
        answer(report)
        if not as_json:
            print_report(report)
    if report["failed"]:
        raise typer.Exit(1)


def _stop_before_start(number: int, frame: Any) -> None:
    print(f"trainyard: {signal.Signals(number).name}: stopped before the workers were started", file=sys.stderr)
    sys.stderr.flush()
    os._exit(85)


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="Recipe file; launch/recipes/*.yaml are found from any folder.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")],
    processes_per_node: Annotated[int, typer.Option(help="Worker processes of each node: one a GPU where it has any.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe values.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node.")] = None,
    cpus_per_process: Annotated[
        int | None, typer.Option(help="Cores for each process; default: 1, and all of the node with --exclusive.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition, as sbatch takes it; so are the next ones.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: MINUTES, HH:MM:SS, DAYS-HH, …")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node: 500G, …")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features of the nodes.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Whole nodes.")] = False,
    reservation: Annotated[str | None, typer.Option(help="Reservation.")] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Apptainer image (.sif or a folder), else an image for Pyxis.")
    ] = None,
    module: Annotated[list[str] | None, typer.Option(help="Environment module to load; may be repeated.")] = None,
    extra_line: Annotated[
        list[str] | None,
        typer.Option(help="A line for the script as it is, #SBATCH … or a command before the start; may be repeated."),
    ] = None,
    chain: Annotated[
        int, typer.Option(help="So many jobs one after another, for clusters that forbid requeueing.")
    ] = 1,
    then: Annotated[
        str | None, typer.Option(metavar="export", help="Also submit the export of the finished run.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,…", help="A run for each value, as an array; may be repeated.")
    ] = None,
    write_bandwidth: Annotated[
        str | None, typer.Option(metavar="500MB/s", help="Bandwidth of writing a checkpoint; default: measured here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the job script instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe here, freeze it, and submit a Slurm job that saves and requeues itself until the run is finished.

    Example: `trainyard submit launch/recipes/llama_7b_64gpu.yaml --nodes 8 --processes-per-node 8 --gpus-per-node 8`
    """
    if then not in (None, "export"):
        raise typer.BadParameter(f"--then is {then!r}; the one thing that may follow is export")
    from launch.slurm import Request
    from launch.submit import submit as run_submit
    from launch.submit import what_to_watch

    request = Request(
        nodes=nodes,
        processes_per_node=processes_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_process=cpus_per_process,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        memory=memory,
        constraint=constraint,
        exclusive=exclusive,
        reservation=reservation,
        container=container,
        modules=module or [],
        extra_lines=extra_line or [],
    )
    with _answer(as_json) as answer:
        result = run_submit(
            recipe,
            overrides or [],
            request,
            chain=chain,
            then_export=then is not None,
            sweep=sweep or [],
            write_bandwidth=write_bandwidth,
            dry_run=dry_run,
        )
        answer(result)
        print("\n".join([*result["notes"], *(f"warning: {text}" for text in result["warnings"])]), file=sys.stderr)
        if not as_json:
            print("\n".join(result["scripts"].values() if dry_run else what_to_watch(result)))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Run directory, or a sweep's folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until the run ends or Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a run is doing, from its directory alone: state, step, loss, speed, ETA, checkpoint, restarts, queue, ranks.

    Example: `trainyard status runs/quickstart-pretrain --watch`
    """
    from launch import status as shown

    if watch and as_json:
        raise typer.BadParameter("give --watch or --json, not both")
    if watch:
        from rich.live import Live
        from rich.text import Text

        with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
            for lines in shown.watch(run):
                live.update(Text("\n".join(lines)), refresh=True)
        return
    answer, lines, _ = shown.read(run)
    print(json.dumps(answer, ensure_ascii=False, indent=2) if as_json else "\n".join(lines))


@app.command()
def why(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    as_json: AsJson = False,
) -> None:
    """Why a run died, or that it did not: one sentence, the evidence with its files, and what to do next.

    Example: `trainyard why runs/quickstart-pretrain`
    """
    from launch import why as explained

    found = explained.explain(run)
    print(json.dumps(found, ensure_ascii=False, indent=2) if as_json else "\n".join(explained.describe(found)))


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="Run directory or model folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder of token shards, or a text file.")] = None,
    task: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Questions with right answers.")] = None,
    lm_eval: Annotated[
        Path | None, typer.Option(help="Task file of lm-evaluation-harness, or a folder of them (extra eval).")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --task: gets a line for each question.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="With --data: only the first so many; default: all.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; default: the run's, which an export remembers.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of a text file.")] = "utf-8",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    host_memory_gib: HostMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: AsJson = False,
) -> None:
    """How good a run or a model folder is on held-out text, on the questions of a task, or on the harness's tasks.

    Example: `trainyard evaluate runs/quickstart-pretrain --data data/shakespeare/validation --json`
    """
    if [data, task, lm_eval].count(None) != 2 or (predictions is not None and task is None):
        raise typer.BadParameter("give one of --data, --task (which --predictions belongs to) and --lm-eval")
    from gpt import evaluate as run
    from gpt.generate import Loading

    loading = Loading(dtype, device_map, host_memory_gib, offload_folder)
    with _answer(as_json) as answer:
        with _progress("evaluate", in_bytes=False) as progress:
            if data is not None:
                how: dict[str, Any] = {"sequences": sequences, "sequence_length": sequence_length}
                result = run.evaluate_path(
                    source, data, text_encoding=encoding, loading=loading, progress=progress, **how
                )
            elif task is not None:
                result = run.evaluate_task(source, task, loading=loading, predictions=predictions, progress=progress)
            elif lm_eval is not None:
                result = run.evaluate_harness(source, lm_eval, loading=loading)
        answer(result)
        if not as_json:
            _print_values(result)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run directory, or a folder of DeepSpeed's own save_checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the model to write; must not exist or be empty.")],
    step: Annotated[int | None, typer.Option(help="Step of a run's checkpoint; default: the newest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the training precision.")] = None,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="Also where the checkpoint has no record of the engine's logits.")
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write the model as one file for llama.cpp.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="DIR|FILE", help="Configuration of the model in a DeepSpeed checkpoint.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Its tokenizer.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load DeepSpeed files with more than tensors: they may run any code.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, as 5GB, 500MB or 2GiB.")] = "5GB",
    licence: Annotated[
        str, typer.Option("--license", help="The hub's identifier of the weights' licence, for the model card.")
    ] = "unknown",
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face model folder, reload it and compare it with what the training engine computed.

    A DeepSpeed checkpoint (ZeRO 1, 2 or 3) is a folder with `latest`, or one of its tag folders; it needs --ungated,
    since it has no record of the engine's logits. Without --config or --tokenizer, config.json and the tokenizer are
    looked for in the tag folder, in the folder of the tags, and in the one above it: the first that is found is taken.

    Example: `trainyard export runs/quickstart-chat --out exports/quickstart-chat` or
    `trainyard export old/checkpoints --config old/model --tokenizer old/model --ungated --out exports/old`
    """
    from data_pipeline.provenance import describe_origin
    from gpt.deepspeed_checkpoint import is_deepspeed_checkpoint
    from gpt.export import export_deepspeed, export_run

    foreign = is_deepspeed_checkpoint(source)
    if foreign and step is not None:
        raise typer.BadParameter("--step is for runs; name the tag folder of a DeepSpeed checkpoint instead")
    if not foreign and (config or tokenizer or trust_pickle):
        raise typer.BadParameter("--config, --tokenizer and --trust-pickle are for DeepSpeed checkpoints")
    with _answer(as_json) as answer:
        with _progress("export") as progress:
            given: dict[str, Any] = {"dtype": dtype, "ungated": ungated, "progress": progress}
            given |= {"max_shard_size": max_shard_size, "licence": licence, "gguf": gguf}
            if foreign:
                given |= {"config": config, "tokenizer": tokenizer, "trust_pickle": trust_pickle}
                report = export_deepspeed(source, out, **given)
            else:
                report = export_run(source, out, step=step, describe_data=describe_origin, **given)
        answer(report)
        if not as_json:
            _print_values(report)


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[list[str] | None, typer.Option(help="Text or question; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Instead: lines with prompt or messages, and maybe id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --prompts: gets each line with its answer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: lines answered at once.")] = 8,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    as_chat: AsChat = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    host_memory_gib: HostMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts or answer questions; a file of prompts in batches, which the same call goes on with after a kill.

    Example: `trainyard generate exports/quickstart-chat --prompt "What is AI?"`
    """
    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise typer.BadParameter("give either --prompt, or --prompts with --out")
    from gpt.generate import Loading, Sampling
    from gpt.generate import generate as run_generate
    from gpt.generate_file import generate_file

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    how: dict[str, Any] = {"loading": Loading(dtype, device_map, host_memory_gib, offload_folder), "as_chat": as_chat}
    with _answer(as_json) as answer:
        if prompts is not None and out is not None:
            with _progress("generate", in_bytes=False) as progress:
                done = generate_file(
                    model, prompts, out, sampling, system=system, batch_size=batch_size, progress=progress, **how
                )
            answer(done)
            if not as_json:
                _print_values(done)
        else:
            answer(run_generate(model, prompt or [], sampling, system=system, stream=not as_json, **how))


@app.command()
def chat(
    model: ModelFolder,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    host_memory_gib: HostMemory = None,
    offload_folder: OffloadFolder = None,
) -> None:
    """Talk with a model in the terminal; /exit ends.

    Example: `trainyard chat exports/quickstart-chat`
    """
    from gpt.generate import Loading, Sampling
    from gpt.generate import chat as run_chat

    loading = Loading(dtype, device_map, host_memory_gib, offload_folder)
    run_chat(model, Sampling(max_new_tokens, temperature, top_p, seed), loading=loading, system=system)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Model folder, as `trainyard export` writes it.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this host only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Answer everyone, without the printed token.")] = False,
) -> None:
    """Serve a model with an OpenAI-compatible interface; Ctrl-C ends.

    Prints its address, the model's name and a token, made anew each time, which requests must carry as their API key.

    Example: `trainyard serve exports/quickstart-chat --port 8000`
    """
    from gpt.serve import serve as run_serve

    run_serve(model, host=host, port=port, authenticate=not no_auth)


def _print_values(values: dict[str, Any]) -> None:
    """One line a value, nested ones with their keys joined by dots."""
    for name, value in _flatten(values):
        print(f"{name}: {value:,.5g}" if isinstance(value, float) else f"{name}: {value}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    main()
