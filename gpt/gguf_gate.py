"""The gate of a GGUF file: a fresh process without Trainyard reads it back and holds it against the folder it lies in.

Run as `python -I gguf_gate.py FOLDER`; prints one JSON document, the list of checks; exit code 0 passed, 1 failed.
Both models are computed in fp32 from the stored weights, so that only another order of summation may tell them apart.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_NAME = "model.gguf"
TOKENS = 64
RELATIVE_TOLERANCE = 1e-4
"""Of the largest logit, as for fp32 in the gate of the folder."""
# No digits: transformers reads no rule from the file that takes them one by one.
SAMPLE_TEXT = "Naïve café: “Hello, World's end”, 東京 and 🙂 — it's\n\n\tthe   end."
SAMPLE_CHAT = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend."}]


def logits_of(folder: Path, ids: torch.Tensor, gguf_file: str | None = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] in fp32 of the folder's safetensors, or of a GGUF file in it."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, gguf_file=gguf_file, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def check_logits(folder: Path, alone: Path) -> dict[str, Any]:
    """The logits of fixed tokens by the folder's safetensors and by the GGUF file in the folder `alone`."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    expected, found = logits_of(folder, ids), logits_of(alone, ids, GGUF_NAME)
    same_shape = found.shape == expected.shape
    difference = float((found - expected).abs().max()) if same_shape else float("inf")
    allowed = RELATIVE_TOLERANCE * float(expected.abs().max())
    sentence = (
        f"{GGUF_NAME} gives the folder's logits at {TOKENS} tokens within {difference:.3g} (allowed {allowed:.3g})"
    )
    # written so that a difference that is not a number fails
    return {"check": "gguf_logits", "passed": difference <= allowed, "sentence": sentence, "difference": difference}


def check_tokenizer(folder: Path, alone: Path) -> dict[str, Any]:
    """Ids of a text, a rendered chat and the special tokens."""
    seen = []
    for tokenizer in (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        AutoTokenizer.from_pretrained(alone, gguf_file=GGUF_NAME, trust_remote_code=False),
    ):
        chat = tokenizer.apply_chat_template(SAMPLE_CHAT, return_dict=False) if tokenizer.chat_template else None
        ids = {"text": tokenizer(SAMPLE_TEXT)["input_ids"], "chat": chat}
        seen.append(ids | {"end": tokenizer.eos_token_id, "beginning": tokenizer.bos_token_id})
    different = [name for name in seen[0] if seen[0][name] != seen[1][name]]
    sentence = f"{GGUF_NAME} gives the folder's tokens of a text and a chat, and its special tokens"
    if different:
        sentence = f"{GGUF_NAME} gives other tokens than the folder: {', '.join(different)}"
    return {"check": "gguf_tokenizer", "passed": not different, "sentence": sentence}


def check_gguf(folder: Path) -> list[dict[str, Any]]:
    """All checks. The file is read where it lies alone: transformers would take a tokenizer beside it for its own."""
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place)
        (alone / GGUF_NAME).symlink_to((folder / GGUF_NAME).absolute())
        return [check_logits(folder, alone), check_tokenizer(folder, alone)]


def main() -> int:
    checks = check_gguf(Path(sys.argv[1]))
    print(json.dumps(checks))
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
