"""The options of the whole system: the pydantic models of a preset, and the face of this package.

A preset is one YAML file (`presets/tiny.yaml`, `finetune.yaml`, `paper.yaml`); `svd.config.load` reads it. Section
numbers in the descriptions refer to arXiv 2311.15127.
"""

from svd.config.base import Fraction, PositiveInt, Renderer, Section
from svd.config.compute import (
    AutoencoderCompute,
    ComputeConfig,
    CurationCompute,
    EvaluationCompute,
    LatentsCompute,
    TrainingCompute,
    Ucf101Compute,
)
from svd.config.data import (
    CaptionerName,
    CaptionsConfig,
    ClipsConfig,
    CurationConfig,
    CutPass,
    CutsConfig,
    EncodersConfig,
    FiltersConfig,
    MotionConfig,
    OrbitsConfig,
    SourcesConfig,
    SyntheticWorlds,
    TextConfig,
    Threshold,
)
from svd.config.evaluation import (
    BranchEvaluation,
    CalibrationConfig,
    EvaluationConfig,
    ImageToVideoEvaluation,
    MultiviewBenchmark,
    RecognitionConfig,
    Ucf101Config,
)
from svd.config.generation import GenerationConfig, Ramp, Sampling, Solver, TaskGeneration
from svd.config.model import AutoencoderSection, ModelConfig, Precision, UNetSection
from svd.config.preset import Preset
from svd.config.training import (
    AutoencoderTraining,
    Geometry,
    LatentsConfig,
    LoraConfig,
    MultiviewTraining,
    Phase,
    Subset,
    TrainingConfig,
)

__all__ = [
    "AutoencoderCompute",
    "AutoencoderSection",
    "AutoencoderTraining",
    "BranchEvaluation",
    "CalibrationConfig",
    "CaptionerName",
    "CaptionsConfig",
    "ClipsConfig",
    "ComputeConfig",
    "CurationCompute",
    "CurationConfig",
    "CutPass",
    "CutsConfig",
    "EncodersConfig",
    "EvaluationCompute",
    "EvaluationConfig",
    "FiltersConfig",
    "Fraction",
    "GenerationConfig",
    "Geometry",
    "ImageToVideoEvaluation",
    "LatentsCompute",
    "LatentsConfig",
    "LoraConfig",
    "ModelConfig",
    "MotionConfig",
    "MultiviewBenchmark",
    "MultiviewTraining",
    "OrbitsConfig",
    "Phase",
    "PositiveInt",
    "Precision",
    "Preset",
    "Ramp",
    "RecognitionConfig",
    "Renderer",
    "Sampling",
    "Section",
    "Solver",
    "SourcesConfig",
    "Subset",
    "SyntheticWorlds",
    "TaskGeneration",
    "TextConfig",
    "Threshold",
    "TrainingCompute",
    "TrainingConfig",
    "UNetSection",
    "Ucf101Compute",
    "Ucf101Config",
]
