"""Models in folders, as diffusers and transformers keep them: a `config.json` and safetensors for each component."""
