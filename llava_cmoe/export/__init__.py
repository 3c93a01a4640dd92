"""What leaves a run for others: a PEFT adapter, a plain checkpoint, a model whose `generate` locates, the hub."""
