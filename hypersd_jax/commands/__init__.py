"""The commands of ``hypersd``: one file a command, which imports JAX only once its input has been checked."""
