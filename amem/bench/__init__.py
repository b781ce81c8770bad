"""What amem costs and how faithful it is, measured on the machine at hand: `python -m amem.bench`."""
