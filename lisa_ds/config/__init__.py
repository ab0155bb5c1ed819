"""A run, described by one file: read once, checked whole, never changed afterwards.

``lisa`` holds the method's section, ``run`` the file with all its sections, ``base`` what all sections share (checks,
error messages), ``files`` reads YAML and JSON, ``deepspeed`` what is read of DeepSpeed's config, ``contradictions``
compares values that two files could set differently.
"""

from __future__ import annotations

from lisa_ds.config.contradictions import check_contradictions as check_contradictions
from lisa_ds.config.galore import GaloreConfig as GaloreConfig
from lisa_ds.config.lisa import LisaConfig as LisaConfig
from lisa_ds.config.lisa import OptimizerConfig as OptimizerConfig
from lisa_ds.config.lora import LoraConfig as LoraConfig
from lisa_ds.config.run import DataConfig as DataConfig
from lisa_ds.config.run import ModelConfig as ModelConfig
from lisa_ds.config.run import RunConfig as RunConfig
from lisa_ds.config.run import from_fields as from_fields
from lisa_ds.config.run import load_config as load_config
from lisa_ds.config.run import model_alone as model_alone
from lisa_ds.config.sampler import GrowthConfig as GrowthConfig
from lisa_ds.config.sampler import SamplerConfig as SamplerConfig

__all__ = [
    "DataConfig",
    "GaloreConfig",
    "GrowthConfig",
    "LisaConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SamplerConfig",
    "check_contradictions",
    "from_fields",
    "load_config",
    "model_alone",
]
