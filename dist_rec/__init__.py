"""dist_rec: distributed training of recommenders whose embedding tables do not fit on one GPU."""

from dist_rec import versions

__version__ = "0.1.0"

versions.check()
