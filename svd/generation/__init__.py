"""Generating clips with trained or released networks; the functions to import stand here.

from svd.generation import image_to_video, load_models
"""

from svd.generation.clips import image_to_video as image_to_video
from svd.generation.clips import multiview as multiview
from svd.generation.clips import text_to_video as text_to_video
from svd.generation.interpolating import interpolate as interpolate
from svd.generation.models import Models as Models
from svd.generation.models import load_models as load_models
