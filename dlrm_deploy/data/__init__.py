"""Datasets: real data (MovieLens-100K) and the random data of the DLRM paper. NumPy only; nothing is
redistributed."""
