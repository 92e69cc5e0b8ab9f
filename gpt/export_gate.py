"""The gate of an export: a fresh process without Trainyard loads the folder and is held against the live engine.

Run as `python -I export_gate.py FOLDER EXPECTED.json`; prints one JSON report; exit code 0 passed, 1 failed. EXPECTED
holds `training_dtype`, `exported_dtype`, the checkpoint's `probe` (null: there is none, and the folder is not gated),
and a `tokenizer` sample of the training run.
The model is computed in the training dtype, since there the folder must give the live engine's own logits.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECT_PACKAGES = {"gpt", "launch", "data_pipeline"}
Check = dict[str, Any]


def logit_tolerance(largest: float, training_dtype: str, exported_dtype: str, layers: int) -> float:
    """The largest difference between two right computations of logits whose largest magnitude is `largest`.

    2 units in the last place of `largest` in the training dtype. In fp32 1e-4 of `largest`: there the order of
    summation, which threads and batch shapes decide, moves the result by far more than its last place. Weights exported
    in a coarser dtype than they were trained in are rounded on purpose: then the coarser one's places count, and each
    layer adds an error of its own, which together grow with the square root of the number of layers.
    """
    eps, exported_eps = (torch.finfo(DTYPES[name]).eps for name in (training_dtype, exported_dtype))
    lossy = exported_eps > eps
    if training_dtype == "fp32" and not lossy:
        return 1e-4 * largest
    place = max(eps, exported_eps) * 2.0 ** math.floor(math.log2(max(largest, 1e-30)))
    return 2 * place * (math.sqrt(1 + layers) if lossy else 1.0)


def check_folder(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Run every check; `passed` says whether all did, `checks` what was compared, how far apart and how far allowed."""
    probe = expected["probe"]
    training, exported = expected["training_dtype"], expected["exported_dtype"]
    cuda = torch.cuda.is_available()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[training],
        device_map="auto" if cuda else None,
        output_loading_info=True,
    )
    model, loading = loaded[0].eval(), loaded[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checks = [_check_keys(loading), *_check_tokenizer(tokenizer, model, expected["tokenizer"])]
    if probe is not None:
        checks += _check_probe(model, probe, training, exported)
    return {
        "gated": probe is not None,
        "passed": all(check["passed"] for check in checks),
        "computed_in": training,
        "exported_in": exported,
        "device": "cuda" if cuda else "cpu",
        "checks": checks,
    }


@torch.no_grad()
def _check_probe(model: PreTrainedModel, probe: dict[str, Any], training: str, exported: str) -> list[Check]:
    """The folder's numbers against those that the live engine recorded."""
    largest = max(abs(value) for row in probe["top_logits"] for value in row)
    tolerance = logit_tolerance(largest, training, exported, model.config.get_text_config().num_hidden_layers)
    # a GPU's kernels, and so their rounding, depend on the number of rows; on a CPU one gives the same bits
    rows = probe["rows"] if model.device.type == "cuda" else 1
    logits = _forward(model, probe["input_ids"], probe["position_ids"], rows=rows)
    return [
        _check_logits(logits, probe, tolerance),
        _check_loss(logits, probe, tolerance),
        _check_greedy(model, probe["greedy"], tolerance),
    ]


def _forward(model: PreTrainedModel, input_ids: list[int], position_ids: list[int], rows: int = 1) -> torch.Tensor:
    """Logits [tokens, vocabulary] in fp32 of the first of `rows` equal rows. No mask and no cache: then transformers
    keeps packed documents apart by their positions, as training does."""
    device = model.device
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
    loss = float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1))
    # A token's loss moves by at most twice what its logits move; the errors of many tokens average out.
    allowed = 2 * tolerance / math.sqrt(max(1, counted))
    difference = abs(loss - probe["loss"])
    sentence = f"the loss is {loss:.6f}, the live engine's {probe['loss']:.6f} (allowed difference {allowed:.3g})"
    return _check("loss", difference <= allowed, sentence, difference=difference, tolerance=allowed)


def _check_greedy(model: Any, greedy: dict[str, list[int]] | None, tolerance: float) -> Check:
    """`generate` must give the live engine's text, up to a tie: where two tokens' logits are closer than the tolerance,
    either is right. Then the live engine's tokens must all be best, within the tolerance, given those before them."""
    if greedy is None:
        return _check("greedy", True, "not compared: the live engine recorded no text with this checkpoint")
    prompt, recorded, ends = greedy["prompt_ids"], greedy["new_ids"], _end_tokens(model)
    ended = next((i + 1 for i, token in enumerate(recorded) if token in ends), len(recorded))
    recorded = recorded[:ended]  # `generate` stops there; the live engine may have gone on
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(recorded), do_sample=False
    )
    generated = output[0, len(prompt) :].tolist()
    if generated == recorded:
        return _check("greedy", True, f"generate gives the live engine's {len(recorded)} tokens")
    row = [*prompt, *recorded]
    logits = _forward(model, row, list(range(len(row))))[len(prompt) - 1 : -1]
    behind = float((logits.amax(1) - logits.gather(1, torch.tensor(recorded)[:, None])[:, 0]).max())
    same = next((i for i, (a, b) in enumerate(zip(generated, recorded, strict=False)) if a != b), len(generated))
    sentence = (
        f"after {same} equal tokens generate gives {generated[same : same + 5]} and the live engine "
        f"{recorded[same : same + 5]}; the live engine's tokens are at most {behind:.3g} below the best "
        f"(a tie up to {tolerance:.3g})"
    )
    return _check("greedy", behind <= tolerance, sentence, difference=behind, tolerance=tolerance)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, expected: dict[str, Any]
) -> list[Check]:
    """The folder's tokenizer and template must give the run's tokens, and generation must stop at its end tokens."""
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
    ends = _end_tokens(model)
    equal = sorted(ends) == sorted(expected["end_tokens"])
    sentence = f"generation stops at the tokens {ends}"
    if not equal:
        sentence += f", but the run's texts and turns end with {expected['end_tokens']}"
    checks.append(_check("end_tokens", equal, sentence))
    return checks


def main() -> int:
    folder, expected = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    report = check_folder(folder, expected)
    loaded = sorted(PROJECT_PACKAGES & set(sys.modules))
    assert not loaded, f"the gate must not depend on Trainyard, but {loaded} are imported"
    print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
