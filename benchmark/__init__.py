"""Many runs and measurements of speed: `python -m benchmark --help`."""
