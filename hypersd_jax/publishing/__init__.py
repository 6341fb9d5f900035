"""A run's LoRAs as a repository of the hub: model card, files, reference images, and the upload."""
