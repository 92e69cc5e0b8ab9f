"""Loss, perplexity, token accuracy and bits per byte on held-out data: while training, and of a folder afterwards.

Both ways sum the same quantities over the same rows with `sum_over_rows`, so they can be compared. `evaluate_task` lets
`gpt.scores` score a run or a folder on the questions of a task.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data_pipeline.sources import read_tables
from data_pipeline.stream import ValidationStream
from data_pipeline.tokenizer import load_tokenizer, token_byte_lengths
from gpt.batch import MicroBatch, micro_batches
from gpt.checkpoint.format import Greedy
from gpt.checkpoint.read import load_plain_model, open_checkpoint
from gpt.export_source import trained_on_chat
from gpt.generate import DEVICE_MAPS, DTYPES, Loading, input_device, load_model
from gpt.lora import load_adapted_model
from gpt.loss import count_correct, cross_entropy_sum
from gpt.metrics import Evaluation, Record
from gpt.model import is_run_directory
from gpt.run_directory import check_kept_tokenizer, stored_recipe
from gpt.scores import require_libraries, score
from gpt.task import AnyTask, Question, read_question, read_task

if TYPE_CHECKING:
    from gpt.trainer import Trainer

FOLDER_ROWS_PER_FORWARD = 8
LARGEST_DEFAULT_SEQUENCE_LENGTH = 2048

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def sum_over_rows(forward: Forward, batch: MicroBatch, byte_lengths: np.ndarray | None) -> list[float]:
    """[loss sum in nats, target tokens, correct tokens, bytes of the targets' text] of one forward."""
    logits = forward(batch.input_ids, batch.position_ids)
    loss = cross_entropy_sum(logits, batch.targets, batch.mask)
    correct = count_correct(logits, batch.targets, batch.mask)
    counted = batch.targets[batch.mask].cpu().numpy()
    size = float(byte_lengths[counted].sum()) if byte_lengths is not None else 0.0
    return [float(loss), float(len(counted)), float(correct), size]


def metrics_of(sums: Sequence[float], has_bytes: bool) -> Record:
    """The metrics of summed quantities.

    Bits per byte is the loss in bits over the bytes of the predicted text: it does not depend on the vocabulary, so
    models with different tokenizers can be compared. Without exact byte lengths it is None.
    """
    loss_sum, tokens, correct, size = sums
    if tokens == 0:
        raise ValueError("the validation data has no target token")
    loss = loss_sum / tokens
    return {
        "evaluate/loss": loss,
        "evaluate/perplexity": math.exp(min(loss, 700.0)),
        "evaluate/accuracy": correct / tokens,
        "evaluate/bits_per_byte": loss_sum / math.log(2) / size if has_bytes and size else None,
    }


@dataclass(frozen=True)
class RunEvaluation:
    """Evaluation within a run, on all ranks in step: `evaluate` of the Trainer."""

    stream: ValidationStream
    batches: int | None
    micro_batch_sequences: int | None
    byte_lengths: np.ndarray | None
    tokenizer: PreTrainedTokenizerBase
    sample_prompt_ids: list[int]
    sample_tokens: int
    end_ids: frozenset[int]

    def __call__(self, trainer: "Trainer") -> Evaluation:
        """The metrics and the text sample. No random number is drawn, so training does not depend on it."""
        from gpt import distributed  # here, since evaluating a folder needs no deepspeed

        trainer.engine.eval()
        plan, ranks = trainer.batch, trainer.ranks
        samples = self.stream.number_of_samples
        if self.batches is not None:
            samples = min(samples, self.batches * plan.global_batch_sequences)
        share = -(-samples // ranks.world_size)
        rows_per_forward = min(self.micro_batch_sequences or plan.rows_per_forward, share)
        sums = np.zeros(4)
        for start in range(0, share, rows_per_forward):
            first = ranks.rank * share + start
            end = min(first + rows_per_forward, (ranks.rank + 1) * share, samples)
            indices = np.arange(first, max(first, end), dtype=np.uint64)
            rows = self.stream.rows(indices)
            [batch] = micro_batches(rows, 1, rows_per_forward, ranks.device)
            sums += sum_over_rows(trainer.forward, batch, self.byte_lengths)
            if trainer.heartbeat is not None:
                trainer.heartbeat.progress()
        everyone = distributed.gather_floats(sums.tolist(), ranks)
        metrics = metrics_of(everyone.sum(axis=0).tolist(), self.byte_lengths is not None)
        text, greedy = None, None
        if self.sample_tokens:
            greedy = self._sample(trainer)
            text = f"{self.tokenizer.decode(greedy.prompt_ids)} ⟶ {self.tokenizer.decode(greedy.new_ids)}"
        return Evaluation(metrics, text, greedy)

    @torch.no_grad()
    def _sample(self, trainer: "Trainer") -> Greedy:
        """Greedy continuation. Every rank runs the same number of forwards, whatever it generates: under ZeRO-3 each is
        a series of all-gathers, and a rank that stopped early would leave the others waiting."""
        device = trainer.ranks.device
        ids = list(self.sample_prompt_ids)
        for _ in range(self.sample_tokens):
            window = torch.tensor([ids], device=device)
            logits = trainer.forward(window, torch.arange(len(ids), device=device)[None])
            ids.append(int(logits[0, -1].argmax()))
        new = ids[len(self.sample_prompt_ids) :]
        end = next((i + 1 for i, token in enumerate(new) if token in self.end_ids), len(new))
        return Greedy(prompt_ids=list(self.sample_prompt_ids), new_ids=new[:end])


def evaluate_path(
    source: Path,
    data: Path,
    *,
    sequences: int | None = None,
    sequence_length: int | None = None,
    text_encoding: str = "utf-8",
    loading: Loading | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a run directory (its newest checkpoint) or a Hugging Face folder, with transformers in this process.

    Args:
        data: a folder of token shards, or a UTF-8 text file, which is tokenised with the model's tokenizer.
        sequences: only the first so many; None: all.
        sequence_length: tokens of a window; None: the run's, else the model's positions but at most 2048.

    Raises:
        FileNotFoundError, ValueError: no model, no data, data made with another tokenizer, or more tokens in a window
            than the model has positions.
    """
    model, tokenizer_path, length = _load(source, loading)
    tokenizer = load_tokenizer(tokenizer_path)
    length = sequence_length or length
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"the sequence length is {length}, but the model has {positions} positions: give fewer tokens")
    device = input_device(model)
    with tempfile.TemporaryDirectory() as scratch:
        stream = _open_data(data, tokenizer, tokenizer_path, length, text_encoding, Path(scratch))

        def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.to(device)

        byte_lengths = token_byte_lengths(tokenizer)
        samples = min(stream.number_of_samples, sequences or stream.number_of_samples)
        sums = np.zeros(4)
        for start in range(0, samples, FOLDER_ROWS_PER_FORWARD):
            indices = np.arange(start, min(start + FOLDER_ROWS_PER_FORWARD, samples), dtype=np.uint64)
            [batch] = micro_batches(stream.rows(indices), 1, len(indices), device)
            sums += sum_over_rows(forward, batch, byte_lengths)
            if progress is not None:
                progress(int(indices[-1]) + 1, samples)
    result = {
        key.removeprefix("evaluate/"): value
        for key, value in metrics_of(sums.tolist(), byte_lengths is not None).items()
    }
    return {**result, "target_tokens": int(sums[1]), "sequences": samples, "sequence_length": length}


def load_task(file: Path) -> tuple[AnyTask, list[Question]]:
    """A task and its questions. Raises FileNotFoundError or ValueError for a bad task, table or row."""
    task = read_task(file)
    questions = [read_question(task, *row) for row in read_tables(os.path.expanduser(task.data))]
    if not questions:
        raise ValueError(f"{task.data} has no rows: a score needs at least one")
    return task, questions


def evaluate_task(
    source: Path,
    task_file: Path,
    *,
    baseline: Path | None = None,
    loading: Loading | None = None,
    predictions: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a run directory (its newest checkpoint) or a Hugging Face folder on the questions of a task.

    `predictions` gets a line for each question; `baseline` is scored likewise, for comparison, and first: should it
    fail, no scores of `source` are lost. Raises as `evaluate_path`, and ValueError for a bad task or question, or a
    library that is not installed.
    """
    task, questions = load_task(task_file)
    require_libraries(task)
    for model in (source, baseline):
        if model is not None:
            _require_model(model)
    if predictions is not None:  # a place that cannot be written is refused now, not when all is scored
        predictions.parent.mkdir(parents=True, exist_ok=True)
        predictions.open("a").close()
    compared = {}
    if baseline is not None:
        other = score(*load_with_tokenizer(baseline, loading), task, questions, progress)
        compared = {str(baseline): {"as_chat": other.facts["as_chat"], **other.scores()}}
    scored = score(*load_with_tokenizer(source, loading), task, questions, progress)
    if predictions is not None:
        lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in scored.predictions]
        predictions.write_text("".join(lines), encoding="utf-8")
    about = {"task": str(task_file), "kind": task.kind, "examples": len(questions), **scored.facts}
    baselines = {**scored.baseline_scores(), **compared}
    return {**about, "scores": scored.scores(), **({"baselines": baselines} if baselines else {})}


def evaluate_harness(source: Path, tasks: Path, *, loading: Loading | None = None) -> dict[str, Any]:
    """Score a run directory or a Hugging Face folder on local tasks of lm-evaluation-harness. Raises as it does."""
    from gpt.harness import evaluate_with_harness

    return evaluate_with_harness(*load_with_tokenizer(source, loading), tasks)


def load_with_tokenizer(
    source: Path, loading: Loading | None, step: int | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a run's checkpoint, the newest by default, or of a model folder, and its tokenizer.

    Raises as `evaluate_path`.
    """
    model, tokenizer_path, _ = _load(source, loading, step)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(tokenizer_path)
    if is_run_directory(str(source)) and not trained_on_chat(open_checkpoint(source, step).manifest):
        tokenizer.chat_template = None  # the model knows nothing of its turns; export leaves it out, too
    return model, tokenizer


def _require_model(source: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a run directory or a model folder")


def _load(source: Path, loading: Loading | None, step: int | None = None) -> tuple[Any, Path, int]:
    """(model, tokenizer folder, default sequence length) of a run directory or a model folder."""
    _require_model(source)
    loading = loading or Loading()
    recipe = stored_recipe(source) if is_run_directory(str(source)) else None
    if recipe is not None:
        if loading.device_map in DEVICE_MAPS:
            raise ValueError(
                f"the device map {loading.device_map} needs a model folder, but {source} is a run directory: export it"
            )
        own, device = source / "tokenizer", loading.device()
        if own.exists():
            check_kept_tokenizer(source)
        load = load_plain_model if recipe.lora is None else load_adapted_model
        model: Any = load(source, DTYPES[loading.dtype] if loading.dtype else None, step=step)
        return model.to(device), own if own.exists() else Path(recipe.tokenizer), recipe.data.sequence_length
    model = load_model(source, loading)
    report = source / "export_report.json"
    try:
        recorded = json.loads(report.read_text(encoding="utf-8")).get("sequence_length") if report.exists() else None
    except (ValueError, AttributeError):
        raise ValueError(f"{report} is damaged: export the run again, or remove the file") from None
    positions = getattr(model.config, "max_position_embeddings", LARGEST_DEFAULT_SEQUENCE_LENGTH)
    return model, source, recorded or min(positions, LARGEST_DEFAULT_SEQUENCE_LENGTH)


def _open_data(
    data: Path, tokenizer: PreTrainedTokenizerBase, tokenizer_path: Path, length: int, encoding: str, scratch: Path
) -> ValidationStream:
    from data_pipeline.prepare import PrepareOptions, prepare
    from data_pipeline.sources import ReadOptions
    from data_pipeline.tokenizer import tokenizer_fingerprint

    if not data.exists():
        raise FileNotFoundError(f"{data} does not exist: give a folder of token shards or a text file")
    if data.is_dir():
        stream = ValidationStream(data, length)
        if stream.tokenizer_sha256 != tokenizer_fingerprint(tokenizer_path):
            raise ValueError(f"{data} was prepared with another tokenizer than the model's, {tokenizer_path}")
        return stream
    options = PrepareOptions(
        inputs=[str(data)],
        output=scratch / "data",
        tokenizer=tokenizer_path,
        read=ReadOptions(encoding=encoding),
        validation_fraction=0.0,
    )
    prepare(options, None)
    return ValidationStream(scratch / "data" / "train", length)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's end token and, in a chat, the end of a turn."""
    return frozenset(i for i in (tokenizer.eos_token_id, *_end_of_turn(tokenizer)) if i is not None)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    known = tokenizer.get_vocab()
    return [known[name] for name in names if name in known and name in (tokenizer.chat_template or "")]
