"""How other programs read our files, and how to sample with them there: loaders, workflows, settings, code."""
