"""What the tutorial does not teach: each file serves one optional package or foreign format."""
