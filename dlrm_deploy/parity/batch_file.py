"""`read_batch`, where it used to be."""

from dlrm_deploy.batch_file import read_batch

__all__ = ["read_batch"]
