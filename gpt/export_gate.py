"""The gate of an export: a fresh process without Trainyard loads the folder and is held against the live engine.

Run as `python -I export_gate.py FOLDER EXPECTED.json`; prints one JSON report; exit code 0 passed, 1 failed. EXPECTED:

- `training_dtype`, `exported_dtype`; the model is computed in the training dtype, since there the folder must give the
  live engine's own logits;
- `merged`: whether the folder's weights are a base's and an adapter's together, which the live engine held apart;
- `probe`: the checkpoint's record of them; null: there is none, and the folder is not gated;
- `masters`: the folder of a `checkpoint/1` whose fp32 masters were exported, null in other cases: the export is
  also computed in fp32 and held against a forward of these masters, read from there by other code than export's;
- `tokenizer`: a sample of the training run's;
- `memory_bytes`: what the weights may take in memory; null: all of them. The rest stays on disk, layer by layer.
"""

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import get_max_memory, set_module_tensor_to_device
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECT_PACKAGES = {"gpt", "launch", "data_pipeline"}
Check = dict[str, Any]


def logit_tolerance(
    largest: float, training_dtype: str, exported_dtype: str, layers: int, *, merged: bool = False
) -> float:
    """The largest difference between two right computations of logits whose largest magnitude is `largest`.

    2 units in the last place of `largest` in the training dtype. In fp32 1e-4 of `largest`: there the order of
    summation, which threads and batch shapes decide, moves the result by far more than its last place. Weights exported
    in a coarser dtype than they were trained in are rounded on purpose, and so are the sums of a base and an adapter
    that are `merged`: then the coarser dtype's places count, and each layer adds an error of its own, which together
    grow with the square root of the number of layers.
    """
    eps, exported_eps = (torch.finfo(DTYPES[name]).eps for name in (training_dtype, exported_dtype))
    lossy = exported_eps > eps or merged
    if training_dtype == "fp32" and exported_dtype == "fp32":
        return 1e-4 * largest
    place = max(eps, exported_eps) * 2.0 ** math.floor(math.log2(max(largest, 1e-30)))
    return 2 * place * (math.sqrt(1 + layers) if lossy else 1.0)


def check_folder(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Run every check; `passed` says whether all did, `checks` what was compared, how far apart and how far allowed."""
    probe, training, exported = expected["probe"], expected["training_dtype"], expected["exported_dtype"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model, loading = _load(folder, training, expected["memory_bytes"], Path(place))
        held = _placement(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        checks = [_check_keys(loading), *_check_tokenizer(tokenizer, expected["tokenizer"])]
        if not _is_adapter(folder):  # which has no end tokens of its own
            checks.append(_check_end_tokens(_end_tokens(model), expected["tokenizer"]))
        if probe is not None:
            checks += _check_probe(model, probe, training, exported, merged=expected["merged"])
        else:
            checks.append(_check_runs(model, expected["tokenizer"]["ids"]))
        del model
    if expected["masters"] is not None:
        ids = probe["input_ids"] if probe is not None else expected["tokenizer"]["ids"]
        positions = probe["position_ids"] if probe is not None else list(range(len(ids)))
        checks.append(_check_masters(folder, Path(expected["masters"]), ids, positions, expected["memory_bytes"]))
    return {
        "gated": probe is not None,
        "passed": all(check["passed"] for check in checks),
        "computed_in": training,
        "exported_in": exported,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "weights_held": held,
        "checks": checks,
    }


def _load(
    folder: Path, dtype: str, memory_bytes: int | None, offload_folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The folder's model, or its adapter on the base, and what transformers says of its tensors. With `memory_bytes`
    accelerate leaves the layers for which they do not suffice on disk, and reads each when its turn comes."""
    options: dict[str, Any] = {}
    if memory_bytes is not None:
        options = {"max_memory": get_max_memory() | {"cpu": memory_bytes}, "offload_folder": offload_folder}
    if torch.cuda.is_available() or memory_bytes is not None:
        options["device_map"] = "auto"
    if _is_adapter(folder):
        return _load_adapter(folder, dtype, options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], output_loading_info=True, trust_remote_code=False, **options
    )
    return loaded[0].eval(), loaded[1]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _load_adapter(folder: Path, dtype: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The base with the folder's adapter on it, as peft loads it, all in the training dtype as the engine had it."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict  # here, since whole models need no peft

    place = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], trust_remote_code=False, **options)
    model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored, wanted = set(file.keys()), set(get_peft_model_state_dict(model))
    return model, {"missing_keys": wanted - stored, "unexpected_keys": stored - wanted}


def _placement(model: PreTrainedModel) -> str:
    """Where the weights are while the model runs."""
    places = Counter(str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values())
    if "disk" not in places:
        return f"whole in memory ({', '.join(sorted(places))})"
    held = ", ".join(f"{count} on {place}" for place, count in sorted(places.items()) if place != "disk")
    return f"read from disk layer by layer by accelerate's device_map ({held or 'none held in memory'})"


def _is_offloaded(model: PreTrainedModel) -> bool:
    return model.device.type == "meta" or "disk" in getattr(model, "hf_device_map", {}).values()


@torch.no_grad()
def _check_probe(
    model: PreTrainedModel, probe: dict[str, Any], training: str, exported: str, *, merged: bool
) -> list[Check]:
    """The folder's numbers against those that the live engine recorded."""
    largest = max(abs(value) for row in probe["top_logits"] for value in row)
    layers = model.config.get_text_config().num_hidden_layers
    tolerance = logit_tolerance(largest, training, exported, layers, merged=merged)
    # a GPU's kernels, and so their rounding, depend on the number of rows; on a CPU one gives the same bits
    rows = probe["rows"] if torch.cuda.is_available() else 1
    logits = _forward(model, probe["input_ids"], probe["position_ids"], rows=rows)
    return [
        _check_logits(logits, probe, tolerance),
        _check_loss(logits, probe, tolerance),
        _check_greedy(model, probe["greedy"], tolerance),
    ]


def _forward(model: PreTrainedModel, input_ids: list[int], position_ids: list[int], rows: int = 1) -> torch.Tensor:
    """Logits [tokens, vocabulary] in fp32 of the first of `rows` equal rows. No mask and no cache: then transformers
    keeps packed documents apart by their positions, as training does."""
    device = torch.device("cpu") if _is_offloaded(model) else model.device  # the hooks move them
    output = model(
        input_ids=torch.tensor([input_ids] * rows, device=device),
        position_ids=torch.tensor([position_ids] * rows, device=device),
        use_cache=False,
    )
    return output.logits[0].float().cpu()


def _check(name: str, passed: bool, sentence: str, **numbers: Any) -> Check:
    return {"check": name, "passed": passed, "sentence": sentence, **numbers}


def _check_keys(loading: dict[str, Any]) -> Check:
    wrong = {kind: sorted(map(str, found)) for kind, found in loading.items() if found}
    sentence = "transformers found every tensor that the model has, and no other"
    if wrong:
        sentence = "transformers could not match the tensors: " + "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)})" for kind, names in wrong.items()
        )
    return _check("tensors", not wrong, sentence)


def _check_logits(logits: torch.Tensor, probe: dict[str, Any], tolerance: float) -> Check:
    """The recorded logits must be met, and no token outside the recorded ones may lie above them."""
    rows = logits[probe["positions"]]
    recorded, indices = torch.tensor(probe["top_logits"]), torch.tensor(probe["top_indices"])
    difference = float((rows.gather(1, indices) - recorded).abs().max())
    others = rows.scatter(1, indices, -math.inf).amax(1)
    excess = float((others - recorded.amin(1)).max())
    passed = difference <= tolerance and not excess > tolerance and bool(torch.isfinite(logits).all())
    sentence = (
        f"the {indices.shape[1]} largest logits at {len(rows)} positions differ by at most {difference:.3g} "
        f"from the live engine's (allowed {tolerance:.3g})"
    )
    if excess > tolerance:
        sentence += f"; a token outside them lies {excess:.3g} above the lowest"
    return _check("logits", passed, sentence, difference=difference, tolerance=tolerance)


def _check_loss(logits: torch.Tensor, probe: dict[str, Any], tolerance: float) -> Check:
    targets = torch.tensor(probe["targets"])
    counted = int((targets >= 0).sum())
    # as the live engine recorded it: 0 of a row in which nothing counts
    loss = float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")) / max(1, counted)
    # A token's loss moves by at most twice what its logits move; the errors of many tokens average out.
    allowed = 2 * tolerance / math.sqrt(max(1, counted))
    difference = abs(loss - probe["loss"])
    sentence = f"the loss is {loss:.6f}, the live engine's {probe['loss']:.6f} (allowed difference {allowed:.3g})"
    return _check("loss", difference <= allowed, sentence, difference=difference, tolerance=allowed)


def _check_greedy(model: Any, greedy: dict[str, list[int]] | None, tolerance: float) -> Check:
    """`generate` must give the live engine's text, up to a tie: where two tokens' logits are closer than the tolerance,
    either is right. Then the live engine's tokens must all be best, within the tolerance, given those before them.

    Of a model that is read from disk only the latter is asked: `generate` would read it for each token.
    """
    if greedy is None:
        return _check("greedy", True, "not compared: the live engine recorded no text with this checkpoint")
    prompt, recorded, ends = greedy["prompt_ids"], greedy["new_ids"], _end_tokens(model)
    ended = next((i + 1 for i, token in enumerate(recorded) if token in ends), len(recorded))
    recorded = recorded[:ended]  # `generate` stops there; the live engine may have gone on
    found = "in one forward"
    if not _is_offloaded(model):
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(recorded), do_sample=False
        )
        generated = output[0, len(prompt) :].tolist()
        if generated == recorded:
            return _check("greedy", True, f"generate gives the live engine's {len(recorded)} tokens")
        same = next((i for i, (a, b) in enumerate(zip(generated, recorded, strict=False)) if a != b), len(generated))
        found = (
            f"after {same} equal tokens generate gives {generated[same : same + 5]} and the live engine "
            f"{recorded[same : same + 5]}"
        )
    behind = _behind_best(model, prompt, recorded, tolerance)
    sentence = (
        f"{found}; the live engine's {len(recorded)} tokens are at most {behind:.3g} below the best "
        f"(a tie up to {tolerance:.3g})"
    )
    return _check("greedy", behind <= tolerance, sentence, difference=behind, tolerance=tolerance)


def _behind_best(model: PreTrainedModel, prompt: list[int], recorded: list[int], tolerance: float) -> float:
    """How far the logit of a `recorded` token lies below the best one, given those before it, at most.

    All are asked in one forward. In a row of another length than the live engine had for a token a router of experts
    may decide a tie otherwise: one that is further than `tolerance` is asked again with exactly its row.
    """
    row = [*prompt, *recorded]

    def behind(length: int, first: int) -> torch.Tensor:
        logits = _forward(model, row[:length], list(range(length)))[first - 1 :]
        chosen = torch.tensor(row[first : length + 1])
        return logits[: len(chosen)].amax(1) - logits[: len(chosen)].gather(1, chosen[:, None])[:, 0]

    margins = behind(len(row), len(prompt))
    for index in (margins > tolerance).nonzero()[:, 0].tolist():
        length = len(prompt) + index
        margins[index] = behind(length, length)[0]
        if margins[index] > tolerance:
            break
    return float(margins.max())


def _check_runs(model: PreTrainedModel, ids: list[int]) -> Check:
    """Without a probe: that the model runs at all."""
    with torch.no_grad():
        finite = bool(torch.isfinite(_forward(model, ids, list(range(len(ids))))).all())
    sentence = f"the model's logits of {len(ids)} tokens are {'finite' if finite else 'not all finite'}"
    return _check("runs", finite, sentence)


class _Masters(Mapping[str, torch.Tensor]):
    """The weights of a `checkpoint/1` in fp32 by parameter name, each put together when it is asked for.

    Read by the safetensors library from what the manifest says of fragments: no code of export is behind them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        self._indices = {entry["name"]: index for index, entry in enumerate(self.manifest["parameters"])}

    def __getitem__(self, name: str) -> torch.Tensor:
        index = self._indices[self.manifest["tied"].get(name, name)]
        entry = self.manifest["parameters"][index]
        key = f"{'frozen' if entry['group'] is None else 'fp32'}/{entry['name']}"
        whole = torch.full((math.prod(entry["shape"]),), math.nan)
        for file, ranges in self.manifest["fragments"].items():
            start, count = ranges[index]
            if count:
                whole[start : start + count] = self._read(file, key)
        return whole.view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def buffer(self, name: str) -> torch.Tensor:
        """A persistent buffer, which rank 0 wrote."""
        return self._read(min(self.manifest["files"]), "buffer/" + name)

    def _read(self, file: str, key: str) -> torch.Tensor:
        with safe_open(self._directory / file, framework="pt") as tensors:
            return tensors.get_tensor(key)


@torch.no_grad()
def _check_masters(
    folder: Path, directory: Path, ids: list[int], positions: list[int], memory_bytes: int | None
) -> Check:
    """The folder in fp32 must give the logits of the model as it was trained, filled with the checkpoint's masters.

    Both are the same sums of the same numbers on the same machine: as a rule they are equal in every bit. Allowed is
    1e-5 of the largest, since where a weight begins in memory may decide in which order it is summed; weights that
    went through bf16 are off by 1e-3 of it and more.
    """
    masters = _Masters(directory)
    fields = dict(masters.manifest["model_config"])
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32
        ).eval()
    for name in masters.manifest["buffers"]:
        set_module_tensor_to_device(model, name, "cpu", masters.buffer(name))
    # a layer's weights are read when its turn comes
    cpu_offload(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), state_dict=masters)
    right = _forward(model, ids, positions)
    del model
    with tempfile.TemporaryDirectory(dir=folder) as place:
        exported, _ = _load(folder, "fp32", memory_bytes, Path(place))
        difference = float((_forward(exported, ids, positions) - right).abs().max())
    tolerance = 1e-5 * float(right.abs().max())
    sentence = (
        f"all logits of {len(ids)} tokens in fp32 differ by at most {difference:.3g} from those of the fp32 master "
        f"weights (allowed {tolerance:.3g})"
    )
    return _check("masters", difference <= tolerance, sentence, difference=difference, tolerance=tolerance)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, expected: dict[str, Any]) -> list[Check]:
    """The folder's tokenizer and template must give the run's tokens."""
    checks = []
    ids = tokenizer(expected["text"])["input_ids"]
    sentence = f"a text of {len(expected['text'])} characters gives the tokens of the run's tokenizer"
    if ids != expected["ids"]:
        sentence = f"the folder's tokenizer gives {ids[:8]}…, the run's {expected['ids'][:8]}…"
    checks.append(_check("tokenizer", ids == expected["ids"], sentence))
    chat = expected["chat"]
    has_template = tokenizer.chat_template is not None
    if has_template != (chat is not None):
        state = "has a chat template, though the model" if has_template else "has no chat template, though the model"
        checks.append(
            _check("chat_template", False, f"the folder {state} {'was not' if has_template else 'was'} made for chat")
        )
    elif chat is not None:
        rendered = tokenizer.apply_chat_template(chat["messages"], return_dict=False)
        sentence = "a rendered chat gives the tokens of the run's template"
        if rendered != chat["ids"]:
            sentence = f"the folder's chat template gives {rendered[:8]}…, the run's {chat['ids'][:8]}…"
        checks.append(_check("chat_template", rendered == chat["ids"], sentence))
    return checks


def _check_end_tokens(ends: list[int], expected: dict[str, Any]) -> Check:
    """Generation must stop at the run's end tokens, of which one must be in what the template puts behind an answer's
    beginning: else a chat would never end."""
    sentence, chat = f"generation stops at the tokens {ends}", expected["chat"]
    if sorted(ends) != sorted(expected["end_tokens"]):
        sentence += f", but the run's texts and turns end with {expected['end_tokens']}"
        return _check("end_tokens", False, sentence)
    turn = chat["ids"][len(chat["prompt_ids"]) :] if chat is not None else []
    if turn and chat["ids"][: len(chat["prompt_ids"])] == chat["prompt_ids"] and not set(turn) & set(ends):
        return _check("end_tokens", False, f"{sentence}, but an assistant's turn is {turn}: it would never end")
    return _check("end_tokens", True, sentence)


def main() -> int:
    folder, expected = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    report = check_folder(folder, expected)
    loaded = sorted(PROJECT_PACKAGES & set(sys.modules))
    assert not loaded, f"the gate must not depend on Trainyard, but {loaded} are imported"
    print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
