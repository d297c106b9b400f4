"""The recipe: what a run is, as one tree of frozen dataclasses; its checks, and the way from a file."""

from hpd.config.check import check_tree, resolve
from hpd.config.load import load_recipe
from hpd.config.models import ModelConfig, TeacherConfig
from hpd.config.schema import CacheConfig, DataConfig, EvalConfig, GenerateConfig, LoraConfig, Recipe

__all__ = [
    "CacheConfig",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LoraConfig",
    "ModelConfig",
    "Recipe",
    "TeacherConfig",
    "check_tree",
    "load_recipe",
    "resolve",
]
