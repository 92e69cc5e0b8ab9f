"""The model, its training and its way out: recipe -> DeepSpeed engine -> checkpoints -> Hugging Face folder."""
