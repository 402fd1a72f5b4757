"""The language modeling recipe: data, model, tokenization and metric."""
