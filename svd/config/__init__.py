"""The options of the whole system: pydantic models of a preset, one module per part; this is their face.

A preset is one YAML file (`presets/tiny.yaml`, `finetune.yaml`, `paper.yaml`), read by `svd.config.load`.
Section numbers refer to arXiv 2311.15127.
"""

from svd.config.base import Fraction as Fraction
from svd.config.base import PositiveInt as PositiveInt
from svd.config.base import Renderer as Renderer
from svd.config.base import Section as Section
from svd.config.data import CaptionsConfig as CaptionsConfig
from svd.config.data import ClipsConfig as ClipsConfig
from svd.config.data import CurationConfig as CurationConfig
from svd.config.data import CutPass as CutPass
from svd.config.data import CutsConfig as CutsConfig
from svd.config.data import EncodersConfig as EncodersConfig
from svd.config.data import FiltersConfig as FiltersConfig
from svd.config.data import MotionConfig as MotionConfig
from svd.config.data import SourcesConfig as SourcesConfig
from svd.config.data import SyntheticWorlds as SyntheticWorlds
from svd.config.data import TextConfig as TextConfig
from svd.config.data import Threshold as Threshold
from svd.config.evaluation import CalibrationConfig as CalibrationConfig
from svd.config.evaluation import EvaluationConfig as EvaluationConfig
from svd.config.evaluation import MultiviewBenchmark as MultiviewBenchmark
from svd.config.evaluation import Ucf101Config as Ucf101Config
from svd.config.generation import GenerationConfig as GenerationConfig
from svd.config.generation import Ramp as Ramp
from svd.config.generation import Sampling as Sampling
from svd.config.generation import Solver as Solver
from svd.config.generation import TaskGeneration as TaskGeneration
from svd.config.model import AutoencoderSection as AutoencoderSection
from svd.config.model import ModelConfig as ModelConfig
from svd.config.model import Precision as Precision
from svd.config.model import UNetSection as UNetSection
from svd.config.preset import OrbitsConfig as OrbitsConfig
from svd.config.preset import Preset as Preset
from svd.config.training import AutoencoderTraining as AutoencoderTraining
from svd.config.training import Geometry as Geometry
from svd.config.training import LatentsConfig as LatentsConfig
from svd.config.training import LoraConfig as LoraConfig
from svd.config.training import MultiviewTraining as MultiviewTraining
from svd.config.training import Phase as Phase
from svd.config.training import Subset as Subset
from svd.config.training import TrainingConfig as TrainingConfig
