"""The translation recipe: data, model, tokenization and metric."""
