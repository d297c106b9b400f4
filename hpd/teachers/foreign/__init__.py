"""Other people's teacher data: files that hold the likeliest tokens of a teacher for whole rows."""

from hpd.teachers.foreign.axolotl import AxolotlFile
from hpd.teachers.foreign.distillkit import Compressor, DistillKitFile
from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile
from hpd.teachers.foreign.vllm import VllmFile

__all__ = [
    "FORMATS",
    "AxolotlFile",
    "Compressor",
    "DistillKitFile",
    "PlaceAnswers",
    "TeacherFile",
    "VllmFile",
]

FORMATS = ("distillkit", "axolotl", "vllm")
"""Names of the formats that are read and written."""
