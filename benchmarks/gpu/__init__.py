"""What only a GPU can show: `bash benchmarks/gpu/run.sh`, see README.md."""
