"""Names of pretrained checkpoints: family, version and configuration of a model id."""
