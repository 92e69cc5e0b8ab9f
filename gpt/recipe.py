"""The recipe: one YAML file that describes a run, read into strict models.

Every field has its documentation as the string below it; the README's reference is made from these strings.
Unknown keys are errors that name the nearest known key, and all problems are reported together.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NUMBER = re.compile(r"[+-]?(\d[\d_]*)?(\.[\d_]*)?([eE][+-]?\d+)?")


def _number(value: Any) -> Any:
    """Numbers as people write them: YAML 1.1 reads `3e-4` as a string."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    if isinstance(value, str) and value.strip() and NUMBER.fullmatch(value.strip()):
        try:
            return float(value.replace("_", "")) if re.search(r"[.eE]", value) else int(value.replace("_", ""))
        except ValueError:
            return value
    return value


def _whole_number(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value} is not a whole number")
        return int(value)
    return value


def _numbers_within(value: Any) -> Any:
    """A configuration with the numbers that YAML 1.1 reads as strings.

    Transformers refuses such a string, or keeps it as one where it checks no types.
    """
    if isinstance(value, dict):
        return {key: _numbers_within(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers_within(child) for child in value]
    return _number(value) if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_whole_number)]
PositiveInt = Annotated[Int, Field(gt=0)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys refused, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Model(Section):
    """What is trained: an architecture from scratch, or weights to go on from (exactly one of the two)."""

    config: Annotated[dict[str, Any] | None, BeforeValidator(_numbers_within)] = None
    """A transformers configuration: `model_type` and that model's own fields, as transformers names them.
    Without `vocab_size` the tokenizer's size is taken and printed."""
    pretrained: str | None = None
    """Weights to go on from: a Hugging Face folder, a hub id, or the directory of another Trainyard run (its newest
    checkpoint; the fp32 master weights are taken, so nothing is lost)."""

    frozen: list[str] = []
    """Parameters that are not trained: patterns of their names as transformers gives them, for example
    `model.embed_tokens.*` (`*`, `?` and `[…]` as in file names). A pattern that matches nothing is an error."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "Model":
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "give exactly one of model.config (from scratch) and model.pretrained (weights to go on from)"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("model.config needs model_type, for example `model_type: llama`")
        return self


class Lora(Section):
    """Train an adapter of low rank and leave the weights as they are (arXiv:2106.09685). Checkpoints hold the adapter
    alone, so the weights must stay where `model.pretrained` finds them, a Hugging Face folder or hub id."""

    rank: PositiveInt
    """Rank of the adapter's two matrices at each layer."""
    alpha: PositiveInt = 16
    """Their product is added times alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout of what the adapter reads."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Linear layers within the decoder layers that get one, by the ends of their names, for example
    `[q_proj, v_proj]`. One that matches nothing is an error. null: all of them."""
    base_xxh3: str | None = None
    """Checksum that the configuration and weights of `model.pretrained` must have. null: what they have when the run
    begins."""


class Source(Section):
    """One prepared training set of the mixture."""

    path: str
    """A folder of token shards, as `trainyard prepare` writes it (`…/train`), or its copy at a URL (`https://…`,
    `s3://…`, `gs://…`: any filesystem of fsspec, which finds the credentials)."""
    weight: PositiveFloat = 1.0
    """Its share of the samples, relative to the other sources' weights."""
    max_epochs: PositiveFloat | None = None
    """A run that would repeat it more often is refused. null: more than 4 times is warned about (arXiv:2305.16264)."""


class DataStage(Section):
    """A part of the run in which the training sets have weights of their own."""

    until_tokens: PositiveInt | None = None
    """Where it ends, in tokens from the beginning: a whole number of global batches. The last stage has no end."""
    weights: list[Annotated[Float, Field(ge=0)]]
    """The weight of each set of data.train, in its order; 0 leaves the set out of this stage."""


class Remote(Section):
    """How data sets at URLs are read: blocks of 8 MiB, through a cache on the node's own disk."""

    cache_directory: str | None = None
    """Folder of the cache, which all processes of a node share; blocks are checked when they are read from it. null:
    `trainyard-blocks-<user id>` in the system's folder for temporary files."""
    cache_bytes: Annotated[Int, Field(ge=16 * 2**20)] = 20 * 2**30
    """What the cache may take on a node; what was not used for longest goes first. A disk that is full: one warning,
    and training goes on without."""
    deadline_seconds: PositiveFloat = 300.0
    """How long a read is tried again, with growing pauses, while a store fails, is slow or does not answer. Then the
    run ends with exit code 1, and the same command goes on from the last checkpoint. Shorter than
    faults.hang_seconds."""


class Data(Section):
    """What the model sees."""

    train: Annotated[list[Source], Field(min_length=1)]
    """The training sets and their weights."""
    stages: list[DataStage] = []
    """A curriculum: stages, one after another, whose weights stand in the place of the sets' own. Empty: none."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How texts fill sequences. concatenate: one after another, cut where a sequence is full. best_fit: none is cut
    that fits into a sequence, and the rest of a sequence is padding (arXiv:2404.10830). Conversations are always packed
    best-fit. Either way a document does not see its neighbours."""
    order: Literal["auto", "full", "block"] = "auto"
    """How samples are shuffled. full: each set as a whole. block: in windows of 8 MiB, eight at a time, so that what is
    fetched is used before the cache drops it; rows of packed documents and sets of up to 16 windows as a whole. auto:
    block where a training set is at a URL or on a network file system. Both depend on seed and position alone."""
    remote: Remote = Remote()
    """How data sets at URLs and on network file systems are read."""
    workers: Annotated[Int, Field(ge=0)] = 1
    """Threads of each rank that read global batches ahead, one each. 0: nothing is read ahead. Any number gives the
    same batches."""
    validation: str | None = None
    """A folder of token shards, or a URL, that is never trained on. null: no evaluation."""
    sequence_length: PositiveInt
    """Tokens of one sequence (one sample)."""

    @model_validator(mode="after")
    def _stages_fit_sources(self) -> "Data":
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.train):
                raise ValueError(
                    f"data.stages.{number}.weights has {len(stage.weights)} weights, but data.train has "
                    f"{len(self.train)} sets: give one for each"
                )
            if (stage.until_tokens is None) != (number == len(self.stages) - 1):
                raise ValueError("every stage of data.stages but the last needs until_tokens, and the last has none")
        ends = [stage.until_tokens or 0 for stage in self.stages[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"until_tokens must grow from stage to stage of data.stages, but they are {ends}")
        if self.stages and any(source.weight != 1.0 for source in self.train):
            raise ValueError("the weights are in data.stages, so data.train must not have any: take them out of one")
        return self


class Train(Section):
    """Batch and length of the run (exactly one of tokens, epochs and steps), and what is done to the loss."""

    global_batch_tokens: PositiveInt
    """Tokens that one optimizer step sees, over all ranks: a whole number of sequences."""
    micro_batch_sequences: PositiveInt
    """The most sequences that one forward of a rank holds. Accumulation steps follow from this, the global batch and
    the world size."""
    tokens: PositiveInt | None = None
    """Length of the run in tokens, rounded up to whole steps (printed)."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the training data, rounded up to whole steps (printed)."""
    steps: PositiveInt | None = None
    """Length of the run in optimizer steps."""
    seed: Annotated[Int, Field(ge=0)] = 0
    """Seed of initial weights, data order, dropout and embedding noise."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that goes to all tokens of the vocabulary alike in what is minimised (arXiv:1512.00567,
    section 7). The losses that are reported, of training and validation, are without it."""
    neftune_noise_alpha: PositiveFloat | None = None
    """Add uniform noise to the embeddings of training rows, at most alpha / sqrt(sequence_length * width) (NEFTune,
    arXiv:2310.05914): a function of seed and sample, so neither ranks nor a resume change it. null: none."""

    @model_validator(mode="after")
    def _exactly_one_length(self) -> "Train":
        given = [name for name in ("tokens", "epochs", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of train.tokens, train.epochs and train.steps; given: {given or 'none'}"
            )
        return self


class Optimizer(Section):
    """The optimizer and its learning-rate schedule. All lengths are optimizer steps."""

    type: Literal["adamw", "nadam", "radam", "sgd"] = "adamw"
    """torch's optimizer of that name; weight decay is decoupled from the gradient (arXiv:1711.05101), but in sgd added
    to it. All are elementwise: ZeRO cuts parameters into flat pieces, in which Adafactor, LAMB or Muon would see
    neither rows nor norms, so these are not offered."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "warmup_stable_decay", "constant", "range_test"] = "cosine"
    """After the warm-up: cosine (arXiv:1608.03983) or linear to the minimum; constant, and linear to it over the last
    decay_steps (arXiv:2404.06395); constant; or, for `trainyard tune`, exponentially up from it (arXiv:1506.01186)."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Steps of linear warm-up; shorter than the run."""
    decay_steps: PositiveInt | None = None
    """Steps of the final decay; for warmup_stable_decay only, where it is required."""
    minimum_learning_rate_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.1
    """The last learning rate, of range_test the first, as a share of the peak (all but constant)."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.1
    """Weight decay of parameters with two or more dimensions; biases and norms have none."""
    betas: Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the first and second moment; not for sgd."""
    epsilon: PositiveFloat = 1e-8
    """What is added to the root of the second moment; not for sgd."""
    momentum: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Momentum of sgd, for which it is required; for no other type."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Largest L2 norm of the gradient over all parameters; larger ones are scaled down. null: no clipping."""

    @model_validator(mode="after")
    def _decay_steps_fit_schedule(self) -> "Optimizer":
        if (self.schedule == "warmup_stable_decay") != (self.decay_steps is not None):
            raise ValueError(
                f"optimizer.decay_steps belongs to schedule warmup_stable_decay and is required there; "
                f"schedule is {self.schedule}, decay_steps is {self.decay_steps}"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_type(self) -> "Optimizer":
        if (self.type == "sgd") != (self.momentum is not None):
            raise ValueError(
                f"optimizer.momentum belongs to type sgd and is required there; type is {self.type}, "
                f"momentum is {self.momentum}"
            )
        fields = type(self).model_fields
        for name in ("betas", "epsilon"):
            if self.type == "sgd" and getattr(self, name) != fields[name].default:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, but type sgd has none: leave it out")
        return self


class GradientCheckpointing(Section):
    """Recompute activations in the backward pass instead of keeping them."""

    every_layers: PositiveInt = 1
    """1: every decoder layer is recomputed; n: every n-th."""


class Checkpoint(Section):
    """When checkpoints are written and which are kept. One is always written at the end."""

    every_steps: PositiveInt | None = None
    """Write one each so many steps. null: only at the end. One that is due amid skipped steps or loss spikes (see
    divergence) is written after the next ordinary step."""
    keep_last: PositiveInt = 3
    """Keep the newest so many."""
    keep_every_steps: PositiveInt | None = None
    """Also keep, for ever, each whose step is a multiple of this."""
    keep_best: PositiveInt | None = None
    """Also keep the so many that are best by evaluate.metric at their step. Every save needs an evaluation for that."""
    weights_only_after: PositiveInt | None = None
    """Keep the optimizer's moments of the newest so many only: the older ones shrink to a third, can still be exported
    and evaluated, but no run can resume from them."""
    budget_bytes: PositiveInt | None = None
    """What all checkpoints may take, the one that is being written included. Refused before the run when what is to be
    kept cannot fit; while it runs, the oldest are deleted first where it is exceeded all the same."""
    commit_deadline_seconds: PositiveInt = 600
    """A save has failed when the other ranks' files are not there so long after rank 0's own."""
    max_failed_saves: PositiveInt = 3
    """Stop the run when so many saves in a row have failed. Until then training goes on, and the next one is tried."""


class Divergence(Section):
    """What happens when numbers are not finite or the loss jumps. A step whose loss or gradient is not finite never
    changes the weights; these fields say when the run goes back to its newest checkpoint and leaves samples out."""

    skipped_steps: PositiveInt = 10
    """Go back after so many steps in a row whose loss or gradient was not finite; the samples of these are left out."""
    spike_z_score: PositiveFloat | None = 10.0
    """A loss is a spike when it is above the median of the last losses by so many standard deviations, estimated as
    1.4826 times their median absolute deviation, but not as less than 1 % of the median. null: no spikes are sought."""
    spike_steps: PositiveInt = 3
    """Go back after so many spikes in a row, once there is a checkpoint; the samples of these steps are left out."""
    spike_window_steps: Annotated[Int, Field(ge=8)] = 100
    """How many finite losses make the median. They are counted anew after the warm-up and in each of data.stages, and
    nothing is a spike before there are so many."""
    rollbacks: Annotated[Int, Field(ge=0)] = 3
    """How often a run goes back, over all its starts; the next time it stops."""


class EarlyStopping(Section):
    """The run ends when validation no longer gets better."""

    patience_evaluations: PositiveInt = 3
    """End after so many evaluations in a row that were no improvement."""
    minimum_improvement: Annotated[Float, Field(ge=0)] = 0.0
    """By more than this, in the metric's own unit, an evaluation must be better than the best before, to be one."""


class Evaluate(Section):
    """Validation while training."""

    every_steps: PositiveInt | None = None
    """Evaluate each so many steps, and always at the end. null: only at the end."""
    batches: PositiveInt | None = None
    """Global batches of validation data per evaluation, from the start, in fixed order. null: all of it."""
    micro_batch_sequences: PositiveInt | None = None
    """The most sequences that one forward of a rank holds in an evaluation, which needs less memory than training.
    null: as many as in training."""
    metric: Literal["loss", "perplexity", "accuracy", "bits_per_byte"] = "loss"
    """What tells the best step, for early_stopping, checkpoint.keep_best and `trainyard export --best`: the highest
    accuracy, the lowest of the others."""
    early_stopping: EarlyStopping | None = None
    """End the run, with a checkpoint, when the metric no longer gets better. checkpoint.keep_best keeps the best one.
    null: off."""
    sample_prompt: Annotated[str, Field(min_length=1)] | None = None
    """Prompt of the text sample that every evaluation writes to TensorBoard: a user's message for chat data, else the
    beginning of a text. null: the first 16 tokens of the validation set (the first message for chat data)."""
    sample_tokens: Annotated[Int, Field(ge=0)] = 64
    """Tokens of that sample (greedy). 0: no sample."""


class Logging(Section):
    """What is written while training; metrics.jsonl and TensorBoard always get every step."""

    console_every_steps: PositiveInt = 10
    """Print a line each so many steps."""


class Profile(Section):
    """Where the time of some steps goes."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    """First and last step whose operations, of rank 0, are traced by torch's profiler, into a Chrome trace in
    `tensorboard/`, the format of Perfetto and TensorBoard's profiler plugin. Traced steps are slower; the first are
    never typical."""

    @model_validator(mode="after")
    def _steps_ascend(self) -> "Profile":
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"profile.steps is {self.steps}: the first step comes before the last, as in [20, 22]")
        return self


class Faults(Section):
    """What happens when ranks hang, die or are cut off."""

    hang_seconds: Annotated[Float, Field(gt=0)] = 600.0
    """When no rank has gone on to another step, phase or batch of an evaluation for so long, their stacks are written
    to the logs, the one behind is named, and all are ended. Longer than the slowest step or compilation, and than
    loading or writing a checkpoint. Until the ranks have met, at least 600."""
    restarts: Annotated[Int, Field(ge=0)] = 2
    """How often one `trainyard train` starts its ranks again, from the newest good checkpoint, after a crash or a hang.
    What was refused is not tried again; with several nodes nothing is, since all hosts must start together."""
    stale_seconds: Annotated[Float, Field(gt=0)] = 60.0
    """Another start may take the run directory over when this one gave no sign of life for so long."""


class Recipe(Section):
    """A complete run."""

    name: Annotated[str, Field(pattern=r"^[.]*[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
    """The run's name, of letters, digits, `.`, `_` and `-`; its directory is `<runs_directory>/<name>`."""
    runs_directory: str = Field(default_factory=lambda: os.environ.get("TRAINYARD_RUNS", "runs"))
    """Where run directories are. Default: the environment variable TRAINYARD_RUNS, else `runs`."""
    model: Model
    """What is trained."""
    lora: Lora | None = None
    """Train an adapter only. null: all parameters but the frozen ones."""
    tokenizer: str
    """The tokenizer's folder, as `trainyard prepare` writes it, or `hf://OWNER/NAME` on the hub. It must be the one of
    the data."""
    data: Data
    """What the model sees."""
    train: Train
    """Batch and length of the run."""
    optimizer: Optimizer
    """The optimizer and its schedule."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and activations in the forward and backward pass. Master weights, moments and the accumulation of
    gradients are fp32 in each. Processors without AVX-512 may be tens of times slower with bf16 and fp16 than with
    fp32: a start that finds it says so."""
    gradient_checkpointing: GradientCheckpointing | None = None
    """Recompute activations to save memory. null: off."""
    deepspeed: str = "ds_configs/zero3.json"
    """A DeepSpeed JSON file, of ZeRO stage 1, 2 or 3. "auto" in it marks what the recipe owns; a value in both that
    differs is an error."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the decoder layers with torch.compile. auto: on for CUDA devices, and on a CPU for runs of 1,000 steps or
    more: shorter ones may gain less than the first compilation takes."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How attention is computed, by transformers' names. auto: transformers' choice, sdpa where the model has it.
    flash_attention_2 needs a CUDA device and the package flash-attn; it was not run here."""
    fused_loss: Literal["auto", False] = "auto"
    """Compute the output layer and the loss together, 512 tokens at a time, so that a forward's logits never take
    memory as a whole; the gradient of the output layer's weights is meanwhile held in fp32. auto: on where the logits
    are the output layer's product alone, as of most models, and without train.label_smoothing; a line at the start says
    which."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written and which are kept."""
    divergence: Divergence = Divergence()
    """What happens when numbers are not finite or the loss jumps."""
    evaluate: Evaluate = Evaluate()
    """Validation while training."""
    logging: Logging = Logging()
    """What is printed."""
    profile: Profile | None = None
    """Trace some steps. null: none."""
    faults: Faults = Faults()
    """What happens when ranks hang, die or are cut off."""

    @model_validator(mode="after")
    def _whole_sequences(self) -> "Recipe":
        batch, length = self.train.global_batch_tokens, self.data.sequence_length
        if batch % length:
            below, above = batch // length * length, (batch // length + 1) * length
            raise ValueError(
                f"train.global_batch_tokens is {batch}, which is not a whole number of sequences of "
                f"data.sequence_length {length}: use {f'{below} or ' if below else ''}{above}"
            )
        for number, stage in enumerate(self.data.stages):
            if stage.until_tokens is not None and stage.until_tokens % batch:
                below, above = stage.until_tokens // batch * batch, (stage.until_tokens // batch + 1) * batch
                raise ValueError(
                    f"data.stages.{number}.until_tokens is {stage.until_tokens}, which is not a whole number of global "
                    f"batches of {batch} tokens: use {f'{below} or ' if below else ''}{above}"
                )
        return self

    @model_validator(mode="after")
    def _adapter_has_base(self) -> "Recipe":
        if self.lora is not None and (self.model.pretrained is None or self.model.frozen):
            raise ValueError(
                f"lora adapts weights that are there and freezes all of them: give model.pretrained (now "
                f"{self.model.pretrained}) and no model.frozen (now {self.model.frozen})"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> "Recipe":
        saves, evaluations = self.checkpoint.every_steps, self.evaluate.every_steps
        if self.evaluate.early_stopping is not None and (self.data.validation is None or evaluations is None):
            raise ValueError(
                f"evaluate.early_stopping waits for evaluate.metric {self.evaluate.metric}, which is never computed "
                f"while training: give data.validation (now {self.data.validation}) and evaluate.every_steps (now "
                f"{evaluations})"
            )
        if self.checkpoint.keep_best is None:
            return self
        if self.data.validation is None or saves is None or evaluations is None or saves % evaluations:
            raise ValueError(
                f"checkpoint.keep_best needs an evaluation at every save: give data.validation, and a "
                f"checkpoint.every_steps (now {saves}) that is a multiple of evaluate.every_steps (now {evaluations})"
            )
        return self

    @property
    def global_batch_sequences(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.train.global_batch_tokens // self.data.sequence_length

    def run_directory(self) -> Path:
        """The directory of this run."""
        return Path(self.runs_directory) / self.name
