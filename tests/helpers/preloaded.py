"""Everything that a short run imports, for processes that are forked from one with this module."""

import gc

from tests.fault_injection.cases import preload

preload()
gc.freeze()  # a collection in a forked process would copy the pages of all these objects
