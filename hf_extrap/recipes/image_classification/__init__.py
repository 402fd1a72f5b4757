"""The image classification recipe: data, model, tokenization and metric."""
