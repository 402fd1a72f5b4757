"""Parts of the Trainer that it holds and calls at fixed points of its loop."""
