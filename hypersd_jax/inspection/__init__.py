"""What a file or folder is, told without running anything in it: `hypersd inspect`."""
