"""The first module that a grid's fork server imports: what libraries say while they load is switched off."""

import logging

__all__: list[str] = []

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it did not find
