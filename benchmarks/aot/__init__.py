"""Programs compiled for TPU chips that are not there."""
