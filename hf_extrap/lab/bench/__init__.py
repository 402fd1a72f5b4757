"""Step time, memory and communication, beside the base optimizer and the peers, in one run."""
