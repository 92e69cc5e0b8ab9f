"""The commands on models: evaluate, export, generate, chat, serve. See cli.py.

A command's parameters are its options, so `evaluate` and `export` have more than 60 lines.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.console import AsJson, answering, print_values, progress_bar

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


def evaluate(
    source: Annotated[Path, typer.Argument(help="Run directory or model folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder of token shards, or a text file.")] = None,
    task: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Questions with right answers.")] = None,
    lm_eval: Annotated[
        Path | None, typer.Option(help="Task file of lm-evaluation-harness, or a folder of them (extra eval).")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="With --task: the model whose scores are given beside.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --task: gets a line for each question.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="With --task: each checkpoint of a run, until the run has ended.")
    ] = False,
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
    if [data, task, lm_eval].count(None) != 2 or (task is None and (predictions or baseline or follow)):
        raise typer.BadParameter(
            "give one of --data, --task (which --predictions, --baseline and --follow belong to), --lm-eval"
        )
    if follow and (predictions or baseline):
        raise typer.BadParameter("--follow goes without --predictions and --baseline")
    if data is None and (sequences is not None or sequence_length is not None or encoding != "utf-8"):
        raise typer.BadParameter("--sequences, --sequence-length and --encoding belong to --data")
    from gpt import evaluate as run
    from gpt.generate import Loading

    loading = Loading(dtype, device_map, host_memory_gib, offload_folder)
    if follow and task is not None:
        from gpt.follow import follow as run_follow

        with answering(as_json) as answer:
            answer(run_follow(source, task, loading=loading))
        return
    with answering(as_json) as answer:
        with progress_bar("evaluate", in_bytes=False) as progress:
            if data is not None:
                how: dict[str, Any] = {"sequences": sequences, "sequence_length": sequence_length}
                result = run.evaluate_path(
                    source, data, text_encoding=encoding, loading=loading, progress=progress, **how
                )
            elif task is not None:
                result = run.evaluate_task(
                    source, task, baseline=baseline, loading=loading, predictions=predictions, progress=progress
                )
            elif lm_eval is not None:
                result = run.evaluate_harness(source, lm_eval, loading=loading)
        answer(result)
        if not as_json:
            print_values(result)


def export(
    source: Annotated[Path, typer.Argument(help="Run directory, or a folder of DeepSpeed's own save_checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the model to write; must not exist or be empty.")],
    step: Annotated[int | None, typer.Option(help="Step of a run's checkpoint; default: the newest.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Instead: the run's best checkpoint, by its recipe's evaluate.metric.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with lora: the adapter alone, for peft; default: merged.")
    ] = False,
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
    if best and step is not None:
        raise typer.BadParameter("give --step or --best, not both")
    if foreign and (best or adapter or step is not None):
        raise typer.BadParameter(
            "--step, --best and --adapter are for runs; name the tag folder of a DeepSpeed checkpoint instead"
        )
    if not foreign and (config or tokenizer or trust_pickle):
        raise typer.BadParameter("--config, --tokenizer and --trust-pickle are for DeepSpeed checkpoints")
    with answering(as_json) as answer:
        with progress_bar("export") as progress:
            given: dict[str, Any] = {"dtype": dtype, "ungated": ungated, "progress": progress}
            given |= {"max_shard_size": max_shard_size, "licence": licence, "gguf": gguf}
            if foreign:
                given |= {"config": config, "tokenizer": tokenizer, "trust_pickle": trust_pickle}
                report = export_deepspeed(source, out, **given)
            else:
                report = export_run(
                    source, out, step=step, best=best, adapter=adapter, describe_data=describe_origin, **given
                )
        answer(report)
        if not as_json:
            print_values(report)


def generate(
    model: ModelFolder,
    prompt: Annotated[list[str] | None, typer.Option(help="Text or question; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Instead: lines with prompt or messages, and maybe id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --prompts: gets each line with its answer.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --prompts: lines answered at once; default: 8.")
    ] = None,
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
    if prompt is not None and batch_size is not None:
        raise typer.BadParameter("--batch-size is for --prompts; each --prompt is answered by itself")
    from gpt.generate import Loading, Sampling
    from gpt.generate import generate as run_generate
    from gpt.generate_file import generate_file

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    how: dict[str, Any] = {"loading": Loading(dtype, device_map, host_memory_gib, offload_folder), "as_chat": as_chat}
    with answering(as_json) as answer:
        if prompts is not None and out is not None:
            with progress_bar("generate", in_bytes=False) as progress:
                done = generate_file(
                    model, prompts, out, sampling, system=system, batch_size=batch_size or 8, progress=progress, **how
                )
            answer(done)
            if not as_json:
                print_values(done)
        else:
            answer(run_generate(model, prompt or [], sampling, system=system, stream=not as_json, **how))


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
