"""Memory and time before the run, from the model's configuration alone."""
