"""What makes the handbook: pages from the methods' own files, figures, numbers read from `benchmarks/results`."""
