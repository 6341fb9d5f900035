"""What a GPU does with this package, in at most twelve minutes: `benchmarks/gpu.sh` runs it all."""
