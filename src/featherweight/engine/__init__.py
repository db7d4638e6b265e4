"""The engine: batches, the loss, the memory meter and the one training loop."""
