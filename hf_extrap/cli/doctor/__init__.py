"""What is installed, which devices are here, and which launch configurations this machine can run."""
