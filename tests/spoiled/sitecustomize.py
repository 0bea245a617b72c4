"""In a job under test, Python runs this first where PYTHONPATH has this folder."""

from tests.save_faults import spoil_as_told

spoil_as_told()
