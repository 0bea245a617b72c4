"""What must be set before any test imports anything."""

import os

# Triton decides when it is first imported whether kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")
