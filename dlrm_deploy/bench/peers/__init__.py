"""Other ways of running a DLRM on a CPU, at their best settings, built from an fp32 bundle to be measured beside ours.

They are engines for the benchmark alone: they take ids as valid, and models of plain tables only.
Main path: `registry.open_peer`.
"""
