"""What was tried to make the network faster, as programs: `python -m benchmarks.experiments`.

Every experiment changes one thing of the shipped configuration and is measured against it. Nothing here is
used by the package; graphs that the package does not build are built here, by altering its builder.
"""
