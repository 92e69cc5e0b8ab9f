"""The command `trainyard`: parse, call, print; no logic.

Exit codes: 0 done, 1 refused or failed with one sentence, 2 wrong arguments, 85 stopped on request, to be continued,
128 + n ended by signal n.
A command's parameters are its options, so `prepare` and `submit` have more than 60 lines.
Modules of the project are imported inside the commands, because torch alone takes longer than `--help` should.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import model_commands
from launch.console import AsJson, answering, print_values, progress_bar

if TYPE_CHECKING:
    from data_pipeline.documents import TaskTemplate
    from data_pipeline.rules import Rules

RecipeFile = Annotated[str, typer.Argument(help="Recipe file; launch/recipes/*.yaml are found from any folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe values.")]
Processes = Annotated[int | None, typer.Option(help="Worker processes here; default: one per GPU, else 2.")]
Nodes = Annotated[int, typer.Option(help="Hosts of the run; this command is started on each.")]
NodeRank = Annotated[int, typer.Option(help="This host's number, from 0.")]
Rendezvous = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of host 0, for nodes > 1.")]

app = typer.Typer(
    name="trainyard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From raw text to a chat model that can be served.",
)


def main() -> None:
    """Entry point: errors of the user's input become one sentence on stderr and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("TRAINYARD_DEBUG") == "1":
            raise
        print(f"trainyard: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Option("--input", help="File, folder, glob, URL or hf://…; may be repeated.")],
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
    template: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="How a row of a table becomes a prompt and its response.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="CSV delimiter; found from the header if not given.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    skip_bad_rows: Annotated[bool, typer.Option(help="Count bad rows in the report instead of stopping.")] = False,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents kept for validation.")] = 0.01,
    validation_input: Annotated[
        list[str] | None, typer.Option(help="Files kept for validation instead of a share; may be repeated.")
    ] = None,
    rules: Annotated[
        str | None, typer.Option(metavar="FILE", help="Cleaning rules; data_pipeline/default_rules.yaml is shipped.")
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
    from data_pipeline.report import summarize
    from data_pipeline.sources import ReadOptions
    from launch.environment import usable_cores

    delimiter = "\t" if delimiter == "\\t" else delimiter  # a shell passes the two characters
    options = PrepareOptions(
        inputs=inputs,
        output=out,
        tokenizer=tokenizer,
        train_vocabulary=train_tokenizer,
        tokenizer_sample_bytes=tokenizer_sample_bytes,
        read=ReadOptions(
            format=format,
            text_field=text_field,
            prompt_field=prompt_field,
            response_field=response_field,
            delimiter=delimiter,
            encoding=encoding,
            skip_bad_rows=skip_bad_rows,
            template=None if template is None else _load_template(template),
        ),
        validation_fraction=validation_fraction,
        validation_inputs=validation_input or [],
        rules=None if rules is None else _load_rules(rules),
        rules_file=rules or "",
        seed=seed,
        workers=workers or usable_cores(),
        task=None if task is None else parse_task(task),
        engine=engine,
    )
    with answering(as_json) as answer:
        with progress_bar("prepare") as progress:
            report = run_prepare(options, progress)
        answer(report)
        if not as_json:
            print_values(summarize(report) | ({"report": str(out / "report.html")} if "splits" in report else {}))


def _load_template(file: Path) -> "TaskTemplate":
    from data_pipeline.templates import parse_template
    from gpt.recipe_file import read_mapping

    if not file.is_file():
        raise FileNotFoundError(f"the template {file} does not exist")
    return parse_template(str(file), read_mapping(file, "template"))


def _load_rules(file: str) -> "Rules":
    from data_pipeline.rules import Rules
    from gpt.recipe_file import load_section

    return load_section(Rules, file, "rules")


@app.command()
def verify(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIRECTORY", help="Prepared data or a split of it (or its URL), a checkpoint, a run or an export."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Read everything in a folder and compare it with its checksums; the first damaged file is named.

    Example: `trainyard verify data/reviews`
    """
    from launch.verify import verify as run_verify

    with answering(as_json) as answer:
        with progress_bar("verify") as progress:
            result = run_verify(place, progress)
        answer(result)
        if not as_json:
            print_values({"whole": place} | result)


@app.command()
def preview(
    data: Annotated[
        str | None, typer.Argument(help="Folder or URL of token shards; default: the recipe's data.train.")
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

        instead = [f"data.train=[{{path: {json.dumps(data)}}}]", "data.stages=[]"] if data is not None else []
        resolved = load_recipe(recipe, instead)
        stream, tokenizer_path = open_training_data(resolved), resolved.tokenizer
        batch_rows = resolved.global_batch_sequences
    elif data is not None:
        stream = TrainingStream([(data, 1.0)], sequence_length, 0)
        tokenizer_path = shown.tokenizer_beside(data)
        batch_rows = rows
    else:
        raise typer.BadParameter("give a folder of token shards, or a recipe with --recipe")
    with answering(as_json) as answer:
        tokenizer = shown.open_tokenizer(stream, tokenizer_path)
        found = shown.preview_rows(stream, batch_rows, batches, rows)
        answer(shown.as_json(found))
        if not as_json:
            from rich.console import Console

            shown.print_preview(found, tokenizer, Console(highlight=False))


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
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
    from launch.environment import import_torch_quietly

    import_torch_quietly()
    from launch.hub import fetch
    from launch.local import default_processes, run_workers
    from launch.log_folder import refusals_recorded

    resolved = fetch(resolved)
    if processes is None:
        processes, reason = default_processes()
        print(f"processes: {processes} ({reason})", flush=True)
    with refusals_recorded(resolved.run_directory()):
        code = run_workers(resolved, processes=processes, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
    raise typer.Exit(code)


@app.command()
def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = None,
    steps: Annotated[int, typer.Option(help="Of the range test, and before the gradients are measured.")] = 200,
    lowest: Annotated[float, typer.Option(help="Learning rate at which the range test begins.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="Learning rate at which it ends.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate (range test) and a batch (gradient noise scale), from short runs on this host.

    Everything is written below `<runs_directory>/<name>-tune`; the recipe's own run is not touched.

    Example: `trainyard tune launch/recipes/quickstart_pretrain.yaml`
    """
    from gpt.recipe_file import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    from launch.environment import import_torch_quietly

    import_torch_quietly()
    from launch import tune as tuning
    from launch.hub import fetch
    from launch.local import default_processes

    with answering(as_json) as answer:
        try:
            result = tuning.tune(
                fetch(resolved),
                processes=default_processes()[0] if processes is None else processes,
                steps=steps,
                lowest=lowest,
                highest=highest,
            )
        except tuning.StoppedError as error:
            raise typer.Exit(error.exit_code) from None
        answer(result)
        if not as_json:
            print("\n".join(tuning.describe(result)))


@app.command()
def preflight(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
    as_json: AsJson = False,
) -> None:
    """Look whether a run will work, with the ranks that it will have: hosts, versions, network, disk, memory, data.

    All that fails is said together, with its host and what to do. Nothing is trained, and the run is not touched.

    Example: `trainyard preflight recipe.yaml --nodes 2 --node-rank 0 --rendezvous 10.0.0.1:29500`
    """
    from gpt.recipe_file import load_recipe

    with answering(as_json) as answer:
        resolved = load_recipe(recipe, overrides or [])
        from launch.environment import import_torch_quietly

        import_torch_quietly()
        from launch.preflight import print_report, run_preflight

        report = run_preflight(resolved, processes=processes, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
        answer(report)
        if not as_json:
            print_report(report)
    if report["failed"]:
        raise typer.Exit(1)


def _stop_before_start(number: int, frame: Any) -> None:
    # not print, which refuses to run inside another print
    os.write(2, f"trainyard: {signal.Signals(number).name}: stopped before the workers were started\n".encode())
    os._exit(85)


@app.command()
def submit(
    recipe: RecipeFile,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")],
    processes_per_node: Annotated[int, typer.Option(help="Worker processes of each node: one a GPU where it has any.")],
    overrides: Overrides = None,
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
    with answering(as_json) as answer:
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


for command in (
    model_commands.evaluate,
    model_commands.export,
    model_commands.generate,
    model_commands.chat,
    model_commands.serve,
):
    app.command()(command)


if __name__ == "__main__":
    main()
