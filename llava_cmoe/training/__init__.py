"""One stage of training as one `transformers.Trainer`."""
