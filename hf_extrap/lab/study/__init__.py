"""Studies: task × batch size × method × learning rate × seed, tuned with equal budgets, resumable, reported."""
