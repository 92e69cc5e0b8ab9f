#!/usr/bin/env bash
# The whole story on this machine: raw text -> tokenizer and token shards -> pretraining on 2 processes with ZeRO-3 ->
# fine-tuning on chat -> evaluation -> export -> three answers. 4 to 6 minutes on 2 cores after the installation, 10 on two
# without AVX-512.
# A second call reuses the environment and the prepared data, and trains anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
install_trainyard
trainyard=.venv/bin/trainyard
unset TRAINYARD_RUNS # everything below lies in runs/, data/ and exports/ of this checkout

say() { printf '\n== %s\n' "$1"; }

# Only what an earlier quickstart made is removed.
rm -rf runs/quickstart-pretrain runs/quickstart-chat exports/quickstart-chat exports/quickstart-chat.failed

say "Prepare 14 plays of Shakespeare; two more are kept for validation"
"$trainyard" prepare --input data_pipeline/embedded/shakespeare/train \
  --validation-input data_pipeline/embedded/shakespeare/validation --train-tokenizer 4096 --out data/quickstart/shakespeare

say "Prepare conversations with the same tokenizer: six topics of the corpus, as many as a minute can teach"
chat=data_pipeline/embedded/chat/english
"$trainyard" prepare --input $chat/ai.jsonl --input $chat/botprofile.jsonl --input $chat/food.jsonl \
  --input $chat/greetings.jsonl --input $chat/humor.jsonl --input $chat/psychology.jsonl --format chat \
  --tokenizer data/quickstart/shakespeare/tokenizer --validation-fraction 0.05 --out data/quickstart/chat

# bf16, but on processors that have no instructions for it, as many laptops'
precision="$(.venv/bin/python -c 'from gpt.metrics import fast_precision; print(fast_precision())')"

say "Pretrain on Shakespeare in $precision (3 to 6 minutes)"
"$trainyard" train launch/recipes/quickstart_pretrain.yaml precision="$precision" --processes 2

say "Fine-tune on the conversations (1 to 2 minutes)"
"$trainyard" train launch/recipes/quickstart_chat.yaml precision="$precision" --processes 2

say "Evaluate the pretrained model on the two kept plays"
"$trainyard" evaluate runs/quickstart-pretrain --data data/quickstart/shakespeare/validation

say "Export the chat model to a Hugging Face folder, reloaded and compared"
"$trainyard" export runs/quickstart-chat --out exports/quickstart-chat

say "Ask it what the corpus has one answer to (where it has several, the likeliest words mix them)"
"$trainyard" generate exports/quickstart-chat --prompt "What is AI?" --prompt "Why can't you eat food" \
  --prompt "Who is your mother"

cat <<END

== What you have
TensorBoard: .venv/bin/tensorboard --logdir runs
the model:   $PWD/exports/quickstart-chat (loads with transformers alone)
next:        .venv/bin/trainyard chat exports/quickstart-chat
             .venv/bin/trainyard prepare --input YOUR.csv --text-field COLUMN --train-tokenizer 4096 --out data/mine
             .venv/bin/trainyard train launch/recipes/quickstart_pretrain.yaml name=mine tokenizer=data/mine/tokenizer \\
               data.train.0.path=data/mine/train data.validation=data/mine/validation
END
