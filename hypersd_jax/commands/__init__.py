"""What ``hypersd`` can be told to do: one file a command, which imports JAX only once its input has been checked."""
